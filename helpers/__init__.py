"""What the notebooks of the course share: one idea a file."""
