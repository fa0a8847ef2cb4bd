"""Min-max: the one way in which maps, and scores of segments, are brought to [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

RELEASED_FLOOR = 1e-7
"""What the authors' code adds to the range that it divides by; it decides where maps are tiny."""


def minmax(maps: Tensor, floor: float = 0.0) -> Tensor:
    """``(x - min) / (floor + max(x - min))`` over the last two axes; constant maps become zero."""
    shifted = maps - maps.amin(dim=(-2, -1), keepdim=True)
    peak = shifted.amax(dim=(-2, -1), keepdim=True) + floor
    return shifted / torch.where(peak > 0, peak, torch.ones_like(peak))
