"""Filling polygons."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def filled(corners: npt.NDArray[np.float64], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Pixels ``(H, W)`` whose centers lie inside of a polygon (even-odd rule).

    Args:
        corners: ``(N, 2)`` x and y in pixels, from the outer edge of the first one; anywhere.
        size: Height and width.
    """
    height, width = size
    crossings = np.zeros((height, width + 1), np.int32)
    centers = np.arange(height) + 0.5
    for (x, y), (to_x, to_y) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        rows = np.flatnonzero((centers >= min(y, to_y)) & (centers < max(y, to_y)))
        at = x + (centers[rows] - y) * (to_x - x) / (to_y - y) if len(rows) else np.zeros(0)
        crossings[rows, np.clip(np.ceil(at - 0.5), 0, width).astype(np.int64)] += 1
    inside: npt.NDArray[np.bool_] = np.cumsum(crossings, axis=1)[:, :width] % 2 == 1
    return inside
