"""Training on pseudo-labels: losses. Tensors in, tensors out; no files, no models."""

from clipseed.train.losses import ConfidenceGuidedLoss, confidence_guided_loss

__all__ = ["ConfidenceGuidedLoss", "confidence_guided_loss"]
