"""Along what CAMs spread: the mean attention at first, later the attention that the decoder's affinity confirms.

The second is the paper's refinement module (RFM, section 3.3, Eq. 5 to 7). Shapes: B images, n patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipseed.defaults import RfmFilter


def static_map(attention: Sequence[Tensor]) -> Tensor:
    """Mean ``(B, n, n)`` of attention maps ``(B, n, n)``, one for each block."""
    return torch.stack(list(attention)).mean(dim=0)


def confirmed_map(affinity: Tensor, attention: Sequence[Tensor], choice: RfmFilter = "signed") -> Tensor:
    """The affinity times the mean of those attention maps that agree with it best: ``(B, n, n)``.

    Args:
        affinity: ``(B, n, n)`` of the decoder's tokens.
        attention: One ``(B, n, n)`` for each candidate block, rows are queries, prefix tokens cut off.
        choice: See :func:`agreeing`.
    """
    maps = torch.stack(list(attention))
    kept = agreeing(affinity, maps, choice)
    total = torch.einsum("lb,lbij->bij", kept.to(maps.dtype), maps)
    return affinity * total / (kept.sum(dim=0).to(maps.dtype) + 1e-5)[:, None, None]


def agreeing(affinity: Tensor, attention: Tensor, choice: RfmFilter = "signed") -> Tensor:
    """Which blocks to keep for each image: ``(L, B)`` booleans, of attention ``(L, B, n, n)``.

    Args:
        affinity: ``(B, n, n)``.
        attention: All candidates.
        choice: ``signed``: those where the sum of ``affinity - attention`` is at most its mean over the blocks, as the
            released code has it. The affinity cancels: these are the blocks whose patches attend least to the prefix
            tokens, whatever the decoder thinks. ``abs``: the sum of absolute differences, below or at its mean, as the
            paper has it. ``none``: all.
    """
    if choice == "none":
        return torch.ones(attention.shape[:2], dtype=torch.bool, device=attention.device)
    if choice == "signed":
        mass = attention.sum(dim=(-2, -1), dtype=torch.float64)
        # Without prefix tokens every row sums to 1, and rounding must not choose among equals.
        return mass >= mass.mean(dim=0) * (1 - 1e-6)
    distance = (affinity - attention).abs().sum(dim=(-2, -1), dtype=torch.float64)
    return distance <= distance.mean(dim=0)
