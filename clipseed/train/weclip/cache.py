"""What the frozen CLIP gives for each image, kept in memory: for runs without augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from clipseed.clip.vision import VisionTower
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


def bytes_for_each(tower: VisionTower, crop: int, layers: int) -> int:
    """Memory that one image takes, with the attention of so many blocks."""
    patches, blocks = (crop // tower.patch) ** 2, len(tower.blocks)
    return patches * ((blocks - 1) * tower.width * tower.stream.itemsize + min(layers, blocks) * patches * 4)
