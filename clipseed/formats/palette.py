"""The colors of label values: PASCAL VOC's color map."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Colors = npt.NDArray[np.uint8]
"""``(256, 3)``: red, green and blue of every value."""


@lru_cache(maxsize=1)
def voc_palette() -> Colors:
    """The PASCAL VOC color map: ``(256, 3)`` uint8, bits of the label spread over the channels' high bits."""
    labels = np.arange(256)
    colors = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (((labels >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colors


def css_color(value: int) -> str:
    """A value's color as ``#rrggbb``."""
    red, green, blue = voc_palette()[value].tolist()
    return f"#{red:02x}{green:02x}{blue:02x}"
