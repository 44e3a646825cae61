"""Frames and labels, from files to batches."""
