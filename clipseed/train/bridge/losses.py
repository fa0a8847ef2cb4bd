"""Losses from label masks and from soft labels, absent classes left out. Means over the pixels of the whole batch.

Shapes: B images, K classes with the background; logits are brought to the labels' size (bilinear, half-pixel centres).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.defaults import AbsentPolicy, BridgeLoss
from clipseed.train.distributed import ALONE, Team
from clipseed.train.losses import confidence_guided_loss
from clipseed.types import IGNORE


def without_absent(
    labels: Tensor, soft: Tensor | None, allowed: Tensor, policy: AbsentPolicy
) -> tuple[Tensor, Tensor | None]:
    """Labels in which no class is claimed that an image is known not to show.

    Args:
        labels: ``(B, H, W)`` uint8: 0 background, class index + 1, 255 ignore.
        soft: ``(B, K, H, W)``, or none.
        allowed: ``(B, K)`` booleans; the background is always allowed.
        policy: ``keep`` changes nothing. Otherwise pixels of absent classes become 255, and their soft labels 0.
    """
    if policy == "keep":
        return labels, soft
    known = F.pad(allowed, (0, 256 - allowed.shape[1]), value=True)  # 255 stays what it is
    present = known.gather(1, labels.flatten(1).long()).view(labels.shape)
    return labels.masked_fill(~present, IGNORE), None if soft is None else soft * allowed[:, :, None, None]


def hidden(logits: Tensor, allowed: Tensor) -> Tensor:
    """Logits ``(B, K, h, w)``, those of absent classes lower than any other: they take no part in a softmax."""
    return logits.masked_fill(~allowed[:, :, None, None], torch.finfo(logits.dtype).min / 4)


def label_loss(logits: Tensor, labels: Tensor, confidence: Tensor | None, least: float, team: Team = ALONE) -> Tensor:
    """Cross-entropy of pixels with a label, and with at least this confidence where there is one.

    Args:
        logits: ``(B, K, h, w)``.
        labels: ``(B, H, W)`` uint8, 255 ignore.
        confidence: ``(B, H, W)`` in [0, 1], or none.
        least: Confidence that counts.
        team: The processes that share a batch.
    """
    if confidence is not None:
        labels = labels.masked_fill(confidence < least, IGNORE)
    total = confidence_guided_loss(logits, labels, reduction="sum")
    return team.mean(total, (labels != IGNORE).sum())


def soft_loss(logits: Tensor, soft: Tensor, known: Tensor, kind: BridgeLoss, team: Team = ALONE) -> Tensor:
    """A loss of probabilities p from logits and soft labels y: ``collision`` or ``soft-ce``.

    ``collision``: ``-log sum_c y_c p_c`` (the DS-CRF preprint, 2026): cross-entropy where y is one class, without
    gradient where y is uniform. ``soft-ce``: ``-sum_c y_c log p_c``.

    Args:
        logits: ``(B, K, h, w)``.
        soft: ``(B, K, H, W)``, at least 0; brought to a sum of 1. Pixels without any do not count.
        known: ``(B, H, W)`` uint8: 255 where pixels do not count.
        kind: Which.
        team: The processes that share a batch.
    """
    wide = F.interpolate(logits.float(), size=known.shape[-2:], mode="bilinear", align_corners=False)
    log_p = wide.log_softmax(dim=1)
    mass = soft.sum(dim=1)
    counts = (known != IGNORE) & (mass > 0)
    y = soft / mass.clamp(min=1e-6)[:, None]
    if kind == "collision":
        # -inf where y is 0; the pixels that do not count get a label of their own first, or their gradient is NaN.
        y = torch.where(counts[:, None], y, 1.0)
        each = -torch.logsumexp(y.log() + log_p, dim=1)
    else:
        each = -(y * log_p).sum(dim=1)
    total = torch.where(counts, each, 0.0).sum()
    return team.mean(total, counts.sum())
