"""Refinement of class activation maps: affinities, pixel-adaptive refinement, dense CRF. No files, no models."""
