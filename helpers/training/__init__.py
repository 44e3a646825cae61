"""Training: the loop, the kinds of target, and the record of a run."""
