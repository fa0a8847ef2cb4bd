"""Scores: confusion matrices, intersection over union, threshold sweeps."""
