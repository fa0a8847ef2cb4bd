"""Class activation maps: pure functions from tokens and text prototypes to maps."""

from clipseed.cam.methods import METHODS, CamBatch, Method, compute_cams

__all__ = ["METHODS", "CamBatch", "Method", "compute_cams"]
