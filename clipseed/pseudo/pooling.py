"""Sums of maps over masks, as a matrix product whose result does not depend on the order of its terms."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Maps = npt.NDArray[np.floating]
Masks = npt.NDArray[np.bool_]

_PIXELS = 2048
"""Pixels of one block: the masks' share of it stays in the processor's cache."""


def mask_sums(maps: Maps, masks: Masks) -> npt.NDArray[np.float64]:
    """Sum of each map over each mask: ``(K, H, W)`` and ``(S, H, W)`` to ``(K, S)``.

    Values are first rounded to multiples of a power of two, 2^-(52 - b) of the maps' peak, b the bits of ``H W``: at
    least 28 bits, finer than float32's own 24. All partial sums are then exact in float64, so equal masks have
    equal sums to the last bit, whatever their position, the number of threads or the matrix library. Ties stay ties.

    Memory beyond the arguments: ``K H W`` float64 and one block of masks, never ``K S H W``.

    Args:
        maps: Finite values.
        masks: Masks of the maps' size; S may be 0.
    """
    kinds, count, pixels = len(maps), len(masks), int(np.prod(masks.shape[1:]))
    total = np.zeros((count, kinds))
    peak = float(np.abs(maps).max(initial=0))
    if not count or peak == 0:
        return total.T
    unit = math.frexp(peak)[1] - (52 - pixels.bit_length())
    whole = np.rint(np.ldexp(maps.reshape(kinds, pixels).T.astype(np.float64, order="C"), -unit))
    flat = masks.reshape(count, pixels)
    for start in range(0, pixels, _PIXELS):
        block = slice(start, start + _PIXELS)
        total += flat[:, block].astype(np.float64) @ whole[block]
    sums: npt.NDArray[np.float64] = np.ldexp(total.T, unit)
    return sums
