"""Affinities between patches and spreading maps along them: CAA (CLIP-ES, section 3.3, Eq. 5 to 8).

Shapes: B images, n patches of one grid ``h x w``, K maps of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipseed.defaults import SINKHORN_ROUNDS, SPREAD_POWER


def balance(weights: Tensor, rounds: int = SINKHORN_ROUNDS) -> Tensor:
    """Sinkhorn balancing and symmetrisation: affinity ``(…, n, n)`` from attention ``(…, n, n)`` (Eq. 5 and 6).

    Each round divides every column by its sum, then every row; the result is the mean with its transpose. In exact
    arithmetic many rounds give a doubly stochastic matrix; the released code takes three.

    Args:
        weights: Non-negative, rows are queries. Rows need not sum to 1 (the class token has been cut off).
        rounds: Number of column and row normalisations.
    """
    found = weights.float()
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(rounds):
        found = found / found.sum(dim=-2, keepdim=True).clamp_min(tiny)
        found = found / found.sum(dim=-1, keepdim=True).clamp_min(tiny)
    return (found + found.transpose(-2, -1)) / 2


def spread(affinity: Tensor, maps: Tensor, power: int = SPREAD_POWER) -> Tensor:
    """``affinity ** power @ map`` for each of the maps ``(…, K, h, w)``; ``affinity`` ``(…, n, n)`` (Eq. 8).

    The power is never formed: multiplying the maps ``power`` times costs ``n^2 K`` instead of ``n^3``.
    """
    flat = maps.flatten(-2).transpose(-2, -1).float()
    for _ in range(power):
        flat = affinity @ flat
    return flat.transpose(-2, -1).reshape(maps.shape)
