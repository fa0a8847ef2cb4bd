"""The two losses of WeCLIP (section 3.4). Both are means over pixels or pairs of the whole batch, of all processes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from clipseed.train.distributed import ALONE, Team
from clipseed.train.weclip.affinity import DIFFERENT, SAME
from clipseed.types import IGNORE


def balanced_loss(logits: Tensor, labels: Tensor, team: Team = ALONE) -> Tensor:
    """Half the mean cross-entropy of the background's pixels, plus half that of all others.

    A side without a pixel counts 0, with a gradient of 0; in the released code its value is NaN (with the same
    gradient).

    Args:
        logits: ``(B, K, h, w)`` float32, brought to the labels' size (bilinear, half-pixel centres).
        labels: ``(B, H, W)`` uint8: 0 background, class index + 1, 255 ignore.
        team: The processes that share a batch.
    """
    wide = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    each = F.cross_entropy(wide, labels.long(), ignore_index=IGNORE, reduction="none")
    background = labels == 0
    foreground = ~background & (labels != IGNORE)
    return 0.5 * _mean(each, background, team) + 0.5 * _mean(each, foreground, team)


def _mean(values: Tensor, chosen: Tensor, team: Team) -> Tensor:
    return team.mean((values * chosen).sum(), chosen.sum())


def affinity_loss(affinity: Tensor, pairs: Tensor, team: Team = ALONE) -> Tensor:
    """Half the mean of ``1 - A`` over pairs that are the same, plus half that of ``A`` over different ones.

    Each mean divides by one more than the number of pairs.

    Args:
        affinity: A ``(B, n, n)`` in [0, 1].
        pairs: See :func:`~clipseed.train.weclip.affinity.pair_labels`.
        team: The processes that share a batch.
    """
    same, different = pairs == SAME, pairs == DIFFERENT
    apart = ((1 - affinity) * same).sum() * team.count / (team.total(same.sum()) + 1)
    together = (affinity * different).sum() * team.count / (team.total(different.sum()) + 1)
    return 0.5 * apart + 0.5 * together
