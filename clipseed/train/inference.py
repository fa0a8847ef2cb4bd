"""From an image to class logits at the size of the patch grid: sizes, scales and the mirrored image.

Shapes: B images of one size, K classes with the background.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipseed.data.images import patch_grid, resize_to_grid
from clipseed.defaults import PREDICT_MAX_SIDE
from clipseed.errors import UsageError


class Network(Protocol):
    """What segments, whatever it is."""

    @property
    def patch(self) -> int:
        """Sides of images are at least this, and best a multiple of it."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def describe(self) -> dict[str, Any]:
        """``model`` and ``weights`` as manifests say them: what computes beside what was trained."""
        ...

    def logits(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` RGB from 0 to 255, of any type, to float32 logits ``(B, K, h, w)`` of any smaller size."""
        ...


@dataclass(frozen=True)
class ViewOptions:
    """How an image is shown to a network.

    Attributes:
        scales: Factors on its size; logits are averaged at the size that the first gives.
        flip: Average with those of the mirrored image, too.
        max_side: Longer images are shrunk to it first; 0: never.
        window: Side of a window in pixels that slides over the image, brought to whole patches; 0: the whole image.
        window_stride: How far it slides; 0: two thirds of its side.
        released: As WeCLIP's released code: each image is brought to ``max_side``, smaller ones, too, and sides are
            cut off to whole patches. Otherwise sides are stretched to whole patches.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    max_side: int = PREDICT_MAX_SIDE
    window: int = 0
    window_stride: int = 0
    released: bool = False

    def check(self) -> None:
        """Raise :class:`~clipseed.errors.UsageError` for what cannot be."""
        if not self.scales or any(not 0.1 <= scale <= 8 for scale in self.scales):
            raise UsageError("--scales: give factors between 0.1 and 8, such as 1,0.75")
        if self.max_side < 0 or (self.released and not self.max_side):
            raise UsageError(f"--max-side {self.max_side}: give a number of pixels")
        if self.window < 0 or self.window_stride < 0 or (self.window_stride and not self.window):
            raise UsageError("--window, --window-stride: give numbers of pixels, a stride only with a window")
        if self.window and self.released:
            raise UsageError("--window: WeCLIP's published test sees whole images; leave --window or --paper out")
        if self.window_stride > self.window:
            raise UsageError(f"--window-stride {self.window_stride}: at most the window's {self.window} pixels")


def shown(image: Image.Image, patch: int, options: ViewOptions) -> Tensor:
    """An RGB image as the network sees it: ``(3, H, W)``, 0 to 255, uint8 or float32."""
    if not options.released:
        grid = patch_grid(image.height, image.width, patch, options.max_side)
        return torch.from_numpy(resize_to_grid(image, grid, patch).copy()).permute(2, 0, 1)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float()
    return released_size(pixels, patch, options.max_side)[0]


def released_size(images: Tensor, patch: int, longest: int) -> Tensor:
    """Images ``(B, 3, H, W)`` whose longer side is ``longest``, the other ``int(side * ratio)``, at least a patch."""
    height, width = images.shape[-2:]
    ratio = longest / max(height, width)
    size = (max(patch, int(height * ratio)), max(patch, int(width * ratio)))
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def averaged_logits(network: Network, images: Tensor, options: ViewOptions) -> Tensor:
    """Logits ``(B, K, h, w)`` of images ``(B, 3, H, W)``, averaged over scales and mirror images."""
    total: Tensor | None = None
    for scale in options.scales:
        view = _scaled(images, scale, network.patch, released=options.released)
        found = _seen(network, view, options)
        if options.flip:
            found = (found + _seen(network, view.flip(-1), options).flip(-1)) / 2
        if total is None:
            total = found
        elif found.shape == total.shape:
            total = total + found
        else:
            total = total + F.interpolate(found, size=total.shape[-2:], mode="bilinear", align_corners=False)
    assert total is not None
    return total / len(options.scales)


def _seen(network: Network, images: Tensor, options: ViewOptions) -> Tensor:
    """Logits of images as a whole, or through a window."""
    return (
        windowed_logits(network, images, options.window, options.window_stride)
        if options.window
        else network.logits(images)
    )


def windowed_logits(network: Network, images: Tensor, window: int, stride: int = 0) -> Tensor:
    """Logits ``(B, K, h, w)`` of images ``(B, 3, H, W)`` of whole patches, seen through a sliding window.

    Where windows overlap, their logits are averaged. The last ones end with the image.

    Args:
        network: Whose logits have a whole number of cells for each patch, or one for several patches.
        images: 0 to 255.
        window: Side in pixels, brought up to whole patches; longer than the image it is the image.
        stride: Between two windows, brought down to whole patches; 0: two thirds of the window.
    """
    patch = network.patch
    sides = [min(-(-window // patch) * patch, side) for side in images.shape[-2:]]
    step = max(1, (stride or 2 * window // 3) // patch) * patch
    total: Tensor | None = None
    for top in _starts(images.shape[-2], sides[0], step):
        for left in _starts(images.shape[-1], sides[1], step):
            found = network.logits(images[..., top : top + sides[0], left : left + sides[1]])
            cell = sides[0] // found.shape[-2]
            if total is None:
                size = (images.shape[-2] // cell, images.shape[-1] // cell)
                total, seen = found.new_zeros(*found.shape[:2], *size), found.new_zeros(size)
            place = (..., slice(top // cell, (top + sides[0]) // cell), slice(left // cell, (left + sides[1]) // cell))
            total[place] += found
            seen[place] += 1
    assert total is not None
    return total / seen


def _starts(length: int, window: int, step: int) -> list[int]:
    """Where windows begin along one side."""
    starts = list(range(0, length - window + 1, step))
    return starts if starts[-1] + window == length else [*starts, length - window]


def _scaled(images: Tensor, scale: float, patch: int, *, released: bool) -> Tensor:
    if scale == 1:
        return images
    height, width = images.shape[-2:]
    images = images.float()
    if released and min(height, width) * scale >= patch:  # not the ratio of the rounded sizes, but the scale itself
        return F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
    size = [max(1, round(side * scale / patch)) * patch for side in (height, width)]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=not released)
