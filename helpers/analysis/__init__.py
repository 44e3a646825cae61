"""What the notebooks show of a trained model."""
