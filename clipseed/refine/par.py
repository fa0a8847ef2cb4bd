"""Pixel-adaptive refinement (PAR; AFA, Ru et al. 2022, section 3.4, in the form WeCLIP runs it).

Every pixel becomes a weighted mean of 48 neighbours (8 directions at 6 distances), again and again; neighbours of like
colour weigh most. Plain torch: each neighbour is a shifted view of a padded image, added into one buffer, so nothing
of size 48 x H x W x channels is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.defaults import PAR_DILATIONS, PAR_ITERATIONS, PAR_POSITION_WEIGHT, PAR_SHARPNESS


def refine_par(
    scores: Tensor,
    image: Tensor,
    iterations: int = PAR_ITERATIONS,
    dilations: Sequence[int] = PAR_DILATIONS,
    sharpness: float = PAR_SHARPNESS,
    position_weight: float = PAR_POSITION_WEIGHT,
) -> Tensor:
    """Refine score maps along the colours of the image.

    Args:
        scores: ``(B, M, H, W)`` maps of any scale, usually background and classes. Their total grows by
            ``(1 + position_weight) ** iterations``, which an arg-max does not see.
        image: ``(B, 3, h, w)`` image in any affine scale of its colours (they are compared with their own spread);
            brought to ``H x W`` where it differs (bilinear, corners aligned, as WeCLIP does).
        iterations: 20 in WeCLIP, 10 in AFA.
        dilations: Distances of the neighbours in pixels; borders are replicated.
        sharpness: See :data:`~clipseed.defaults.PAR_SHARPNESS`.
        position_weight: Weight of nearness beside likeness.

    Returns:
        ``(B, M, H, W)`` float32.
    """
    size = (scores.shape[-2], scores.shape[-1])
    image = image.float()
    if image.shape[-2:] != size:
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=True)
    weights = neighbour_weights(image, dilations, sharpness, position_weight)
    found = scores.float()
    for _ in range(iterations):
        total = torch.zeros_like(found)
        for index, neighbour in enumerate(_neighbours(found, dilations)):
            total.addcmul_(neighbour, weights[:, index, None])
        found = total
    return found


def neighbour_weights(
    image: Tensor,
    dilations: Sequence[int] = PAR_DILATIONS,
    sharpness: float = PAR_SHARPNESS,
    position_weight: float = PAR_POSITION_WEIGHT,
) -> Tensor:
    """Weight of each neighbour: ``(B, 8 * len(dilations), H, W)`` for a float image ``(B, C, H, W)``.

    The softmax over k of ``-mean_c((|I_c(x + d_k) - I_c(x)| / (std_c(x) + 1e-8) / sharpness)^2)``, plus
    ``position_weight`` times that of ``-(|d_k| / (std|d| + 1e-8) / sharpness)^2``; ``std`` is the unbiased one over the
    neighbours.
    """
    count = 8 * len(dilations)
    # Differences to the centre are summed, not raw colours: the variance of nearly flat regions keeps its digits.
    total, square, difference = torch.zeros_like(image), torch.zeros_like(image), torch.empty_like(image)
    for neighbour in _neighbours(image, dilations):
        torch.sub(neighbour, image, out=difference)
        total += difference
        square.addcmul_(difference, difference)
    variance = (square - total * total / count).clamp_min_(0) / (count - 1)
    scale = 1 / ((variance.sqrt() + 1e-8) * (sharpness * image.shape[1] ** 0.5))
    unlikeness = image.new_zeros((image.shape[0], count, *image.shape[-2:]))
    for index, neighbour in enumerate(_neighbours(image, dilations)):
        torch.sub(neighbour, image, out=difference).mul_(scale)
        for channel in difference.unbind(dim=1):
            unlikeness[:, index].addcmul_(channel, channel, value=-1)
    weights = unlikeness.softmax(dim=1)
    away = torch.tensor([step * (2**0.5 if diagonal else 1.0) for step in dilations for diagonal in _DIAGONAL])
    nearness = (-((away / (away.std() + 1e-8) / sharpness) ** 2)).softmax(dim=0).to(image.device)
    return weights.add_(position_weight * nearness.view(1, -1, 1, 1))


_DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
_DIAGONAL = tuple(row != 0 and column != 0 for row, column in _DIRECTIONS)


def _neighbours(x: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """Views of ``x`` ``(B, C, H, W)`` shifted to each neighbour, borders replicated; distance by distance."""
    height, width = x.shape[-2:]
    for step in dilations:
        padded = F.pad(x, (step, step, step, step), mode="replicate")
        for row, column in _DIRECTIONS:
            top, left = step + row * step, step + column * step
            yield padded[..., top : top + height, left : left + width]
