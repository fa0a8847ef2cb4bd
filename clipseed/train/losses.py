"""Losses for training a segmentation network on pseudo-labels."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipseed.defaults import CONFIDENCE
from clipseed.types import IGNORE

Reduction = Literal["mean", "sum", "none"]
_REDUCTIONS = ("mean", "sum", "none")

THRESHOLD = CONFIDENCE


def confidence_guided_loss(
    logits: Tensor,
    labels: Tensor,
    confidence: Tensor | None = None,
    *,
    threshold: float = THRESHOLD,
    ignore_index: int = IGNORE,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy over confident pixels only (confidence-guided loss, CGL, of CLIP-ES; Lin et al., CVPR 2023).

    The paper's form: a pixel counts where ``max_c Q_c >= threshold``, Q being the scores of background and classes
    after the dense CRF. The released code's form: the other pixels (``max_c Q_c < threshold``, strictly) carry 255 in
    the mask already, and ``confidence`` is None. Both give the same number and the same gradient.

    Args:
        logits: ``(B, C, h, w)`` floating, any precision (the loss is computed in at least float32). Smaller maps are
            upsampled to the labels' size, bilinearly with half-pixel centres (``align_corners=False``).
        labels: ``(B, H, W)`` of any integer type: 0 background, class index + 1, or ``ignore_index``.
        confidence: ``(B, H, W)`` floating in [0, 1], or None when ``labels`` say everything.
        threshold: The least confidence that counts, in [0, 1]. Unused without ``confidence``.
        ignore_index: Label of pixels that never count.
        reduction: ``mean`` over the pixels that count, their ``sum``, or ``none``: a loss for each pixel.

    Returns:
        A scalar, or ``(B, H, W)`` with 0 where a pixel does not count. Where no pixel counts at all, the loss is 0 and
        so is its gradient, not NaN: one unsure image must not end a training run.

    Raises:
        ValueError: shapes that do not fit, labels that are neither a class nor ``ignore_index``, confidence outside
            [0, 1], or impossible options. Looking at the values waits for the device, once for each tensor; a label
            out of range would otherwise kill the whole CUDA context.
    """
    _check_options(threshold, reduction)
    _check_shapes(logits, labels, confidence)
    target = labels.long()  # first of all: an 8-bit label cannot be compared with an ignore_index of -100
    _check_labels(target, logits.shape[1], ignore_index)
    if confidence is not None:
        _check_confidence(confidence)
        target = target.masked_fill(confidence < threshold, ignore_index)
    scores = logits if logits.dtype == torch.float64 else logits.float()
    size = (labels.shape[-2], labels.shape[-1])
    if scores.shape[-2:] != size:
        scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    loss = F.cross_entropy(scores, target, ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (target != ignore_index).sum().clamp(min=1)


class ConfidenceGuidedLoss(nn.Module):
    """:func:`confidence_guided_loss` with its options fixed; no parameters of its own.

    Raises:
        ValueError: impossible options.
    """

    def __init__(
        self, threshold: float = THRESHOLD, *, ignore_index: int = IGNORE, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        _check_options(threshold, reduction)
        self.threshold, self.ignore_index = threshold, ignore_index
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor, confidence: Tensor | None = None) -> Tensor:
        """Loss of logits ``(B, C, h, w)`` for labels and confidence ``(B, H, W)``."""
        return confidence_guided_loss(
            logits, labels, confidence,
            threshold=self.threshold, ignore_index=self.ignore_index, reduction=self.reduction,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"threshold={self.threshold:g}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


def _check_options(threshold: float, reduction: str) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold}: give a number from 0 to 1")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction {reduction!r}: choose one of {', '.join(_REDUCTIONS)}")


def _check_shapes(logits: Tensor, labels: Tensor, confidence: Tensor | None) -> None:
    if logits.ndim != 4 or not logits.is_floating_point():
        raise ValueError(f"logits: expected floating (B, C, h, w), got {_describe(logits)}")
    if labels.ndim != 3 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected integers (B, H, W), got {_describe(labels)}")
    if logits.shape[0] != labels.shape[0]:
        raise ValueError(f"{logits.shape[0]} images in the logits, {labels.shape[0]} in the labels")
    if 0 in logits.shape or 0 in labels.shape:
        raise ValueError(f"nothing to compare: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}")
    if logits.shape[-2] > labels.shape[-2] or logits.shape[-1] > labels.shape[-1]:
        raise ValueError(f"logits {tuple(logits.shape[-2:])} are larger than the labels {tuple(labels.shape[-2:])}")
    if confidence is not None and (confidence.shape != labels.shape or not confidence.is_floating_point()):
        raise ValueError(f"confidence: expected floating {tuple(labels.shape)}, got {_describe(confidence)}")


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if wrong.any():
        found = sorted(set(labels[wrong].tolist()))[:5]
        raise ValueError(f"labels {found} are neither 0 to {classes - 1} nor ignore_index {ignore_index}")


def _check_confidence(confidence: Tensor) -> None:
    if not ((confidence >= 0) & (confidence <= 1)).all():  # NaN fails both
        low, high = (float(value) for value in torch.aminmax(confidence.detach()))
        raise ValueError(f"confidence: expected values from 0 to 1, got {low:g} to {high:g}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
