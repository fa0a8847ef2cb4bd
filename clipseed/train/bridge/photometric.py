"""Brightness, contrast and saturation, varied at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GREY = (0.299, 0.587, 0.114)


def varied(pixels: Tensor, seeds: Sequence[int]) -> Tensor:
    """Images ``(B, 3, H, W)`` from 0 to 255, float32, each changed as its seed says.

    Each of the three with probability 1/2: brightness by up to 32 of 255, contrast and saturation by factors of 0.5 to
    1.5 (the settings of DenseCLIP, but for its shift of hue). Every image depends on its own seed alone, so that it is
    the same however a batch is shared among processes.
    """
    dice = torch.stack([torch.rand(6, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    chosen, amount = (dice[:, :3] < 0.5).to(pixels.device), (2 * dice[:, 3:] - 1).to(pixels.device)
    change = torch.where(chosen, amount, 0.0)[:, :, None, None, None]
    images = (pixels.float() + 32 * change[:, 0]) * (1 + 0.5 * change[:, 1])
    grey = (images * images.new_tensor(_GREY).view(3, 1, 1)).sum(dim=1, keepdim=True)
    return (grey + (images - grey) * (1 + 0.5 * change[:, 2])).clamp(0, 255)
