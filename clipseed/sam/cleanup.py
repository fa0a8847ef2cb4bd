"""Removing small holes and islands of masks."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


def remove_small_regions(mask: Mask, least: int) -> tuple[Mask, bool]:
    """Fill holes, then drop islands, of fewer than ``least`` pixels; pixels touching at a corner belong together.

    Background at the image's edge counts as a hole, too. If all islands are small, the largest one stays.

    Args:
        mask: ``(H, W)`` bool.
        least: Pixels.

    Returns:
        The mask, and whether there was anything small: true even where the only island is small and stays.
    """
    filled, had_holes = _fill_holes(mask, least)
    kept, had_islands = _drop_islands(filled, least)
    return kept, had_holes or had_islands


def _fill_holes(mask: Mask, least: int) -> tuple[Mask, bool]:
    regions, areas = _regions(~mask)
    small = areas < least
    small[0] = False
    if not small.any():
        return mask, False
    return mask | small[regions], True


def _drop_islands(mask: Mask, least: int) -> tuple[Mask, bool]:
    regions, areas = _regions(mask)
    large = areas >= least
    large[0] = False
    if large.sum() == len(areas) - 1:
        return mask, False
    if not large.any():
        large[1 + int(areas[1:].argmax())] = True
    kept: Mask = large[regions]
    return kept, True


def _regions(mask: Mask) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Region number of each pixel, 0 outside the mask, and the area of each region."""
    _, regions, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return np.asarray(regions, np.int32), statistics[:, cv2.CC_STAT_AREA].astype(np.int64)
