"""What the frozen CLIP gives for each image, kept in memory: for runs without augmentation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from clipseed.clip.vision import VisionTower
from clipseed.errors import UsageError
from clipseed.train.weclip.frozen import Seen

See = Callable[[Tensor, Sequence[Sequence[int]]], Seen]
"""From pixels ``(B, 3, H, W)`` and labels to what the tower sees."""


class SeenCache:
    """Remembers images by their number, each computed by itself, so that nothing depends on who shared a batch with it.

    Args:
        see: Computes what is not there yet.
    """

    def __init__(self, see: See) -> None:
        self._see = see
        self._known: dict[int, Seen] = {}
        self._labels: dict[int, Tensor] = {}

    def __call__(self, indices: Sequence[int], pixels: Tensor, labels: Sequence[Sequence[int]]) -> Seen:
        """The batch of images with these numbers."""
        for place, index in enumerate(indices):
            if index not in self._known:
                self._known[index] = self._see(pixels[place : place + 1], labels[place : place + 1])
        rows = [self._known[index] for index in indices]
        return Seen(
            tuple(torch.cat(level) for level in zip(*(row.levels for row in rows), strict=True)),
            rows[0].grid,
            tuple(torch.cat(block) for block in zip(*(row.attention for row in rows), strict=True)),
            list(chain.from_iterable(row.cams for row in rows)),
            torch.cat([row.probability for row in rows]),
        )

    def labels(self, indices: Sequence[int], make: Callable[[], Tensor]) -> Tensor:
        """Pseudo-labels ``(B, H, W)`` that do not change while training; made once for each image."""
        if any(index not in self._labels for index in indices):
            for index, mask in zip(indices, make(), strict=True):
                self._labels.setdefault(index, mask)
        return torch.stack([self._labels[index] for index in indices])


def refuse_too_large(tower: VisionTower, images: int, crop: int, layers: int) -> None:
    """Find out before the work whether a cache fits into the machine's memory.

    Raises:
        UsageError: it does not.
    """
    patches = (crop // tower.patch) ** 2
    blocks = len(tower.blocks)
    one = patches * ((blocks - 1) * tower.width * tower.stream.itemsize + min(layers, blocks) * patches * 4)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if images * one > 0.8 * there:
        raise UsageError(
            f"--cache: {images} images need {images * one / 2**30:.0f} GiB, and the machine has {there / 2**30:.0f}; "
            "leave it out, or take fewer images with --limit"
        )
