"""Keeping finer masks only where no coarser one is (FMA-WSSS, arXiv 2312.03585)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from clipseed.segments import PART, SUB_PART, WHOLE

_CHUNK_FLOATS = 1 << 24
"""Masks are multiplied in slices of the image of this many floats (64 MB), small enough to count exactly."""


def filter_levels(
    masks: npt.NDArray[np.bool_], level: npt.NDArray[np.integer], threshold: float
) -> npt.NDArray[np.int64]:
    """Indices of the masks that stay: all wholes, then parts, then sub-parts, each in their order.

    A part or sub-part m stays if ``|m ∩ k| / |m| < threshold`` for every single mask k kept from the levels above; not
    for their union, and not for masks of its own level. If nothing is kept above, the level is taken whole. An empty
    mask below a kept one goes.

    Args:
        masks: ``(S, H, W)`` bool.
        level: ``(S,)`` 0, 1 or 2.
        threshold: Share of a mask's area.
    """
    flat = masks.reshape(len(masks), masks.shape[1] * masks.shape[2])
    kept = np.flatnonzero(level == WHOLE)
    for current in (PART, SUB_PART):
        finer = np.flatnonzero(level == current)
        if len(kept) and len(finer):
            area = np.array([np.count_nonzero(flat[index]) for index in finer])
            largest = intersections(flat, finer, kept).max(axis=1)
            stays = (area > 0) & (largest / np.maximum(area, 1) < threshold)
            finer = finer[stays]
        kept = np.concatenate([kept, finer])
    return kept


def intersections(
    flat: npt.NDArray[np.bool_], first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Pixels that masks share: ``(A, B)`` for masks ``first`` and ``second`` of ``(S, pixels)``."""
    shared = torch.zeros(len(first), len(second), dtype=torch.int64)
    step = max(1, _CHUNK_FLOATS // (len(first) + len(second)))
    for start in range(0, flat.shape[1], step):
        a, b = (torch.from_numpy(flat[rows, start : start + step]).float() for rows in (first, second))
        shared += (a @ b.T).long()
    counts: npt.NDArray[np.int64] = shared.numpy()
    return counts
