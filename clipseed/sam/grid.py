"""Where masks are asked for: crops of an image, and a grid of points in each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image: columns ``left`` to ``right``, rows ``top`` to ``bottom``, ends excluded."""

    left: int
    top: int
    right: int
    bottom: int
    layer: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return (self.bottom - self.top, self.right - self.left)

    @property
    def area(self) -> int:
        """Pixels."""
        return (self.bottom - self.top) * (self.right - self.left)


def crops_of(height: int, width: int, layers: int, overlap: float) -> list[Crop]:
    """The whole image, then for each layer i a grid of ``2^i`` by ``2^i`` overlapping crops, column by column.

    The overlap is a share of the shorter side in layer 1 and halves with each layer. Crops that would be empty, on
    images of a few pixels, are left out.
    """
    crops = [Crop(0, 0, width, height, 0)]
    for layer in range(1, layers + 1):
        count = 2**layer
        shared = int(overlap * min(height, width) * (2 / count))
        crop_width, crop_height = (math.ceil((shared * (count - 1) + side) / count) for side in (width, height))
        for column in range(count):
            for row in range(count):
                left, top = column * (crop_width - shared), row * (crop_height - shared)
                crop = Crop(left, top, min(left + crop_width, width), min(top + crop_height, height), layer)
                if min(crop.size) > 0:
                    crops.append(crop)
    return crops


def point_grid(count: int, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """``(count², 2)`` x, y in pixels: the centres of ``count`` by ``count`` cells of a crop, row by row."""
    offset = 1 / (2 * count)
    centres = np.linspace(offset, 1 - offset, count)
    x, y = np.meshgrid(centres, centres)
    points: npt.NDArray[np.float64] = np.stack([x.ravel(), y.ravel()], axis=1) * np.array([size[1], size[0]])
    return points
