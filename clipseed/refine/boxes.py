"""The box mask of CAA: from where in the grid a class may spread (CLIP-ES, section 3.3, Eq. 7)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Box = tuple[int, int, int, int]
"""``(left, top, right, bottom)`` in grid cells, upper ends exclusive."""


def boxes_of(cam: npt.NDArray[np.floating], threshold: float, *, released: bool = False) -> list[Box]:
    """Bounding boxes of the connected (8 neighbours) regions of one map that are above a share of its peak.

    The map is compared in 8 bits, ``floor(255 x) > floor(threshold * peak)``, as the released code does.

    Args:
        cam: ``(h, w)`` in [0, 1].
        threshold: Share of the peak, 0 to 1; CLIP-ES uses 0.4 on VOC and 0.7 on COCO.
        released: Cut boxes off before the grid's last row and column, as the released code does (upper ends are
            exclusive there *and* clipped to the last index). A spot on the last row then has no box at all.

    Returns:
        Boxes in no particular order; none for a map without a positive value.
    """
    import cv2

    levels = np.floor(255 * np.asarray(cam, np.float32)).astype(np.uint8)
    above = (levels > int(threshold * int(levels.max()))).astype(np.uint8)
    count, _, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    height, width = above.shape
    last_column, last_row = (width - 1, height - 1) if released else (width, height)
    found = []
    for left, top, across, down in stats[1:count, :4].tolist():
        found.append((left, top, min(left + across, last_column), min(top + down, last_row)))
    return found


def box_masks(cams: npt.NDArray[np.floating], threshold: float, *, released: bool = False) -> npt.NDArray[np.bool_]:
    """Union of the boxes of each map: ``(K, h, w)`` maps to ``(K, h, w)`` booleans; see :func:`boxes_of`."""
    masks: npt.NDArray[np.bool_] = np.zeros(cams.shape, bool)
    for mask, cam in zip(masks, cams, strict=True):
        for left, top, right, bottom in boxes_of(cam, threshold, released=released):
            mask[top:bottom, left:right] = True
    return masks
