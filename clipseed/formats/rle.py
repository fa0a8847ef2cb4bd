"""COCO's run-length masks: lengths of runs of 0 and 1 in turn, starting with 0, column by column.

The compressed form is a text: base 32, least digit first, one character (from "0" on) per digit; bit 5 says that more
follow, bit 4 of the last is the sign. From the third on, runs are stored as the difference to the run before the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clipseed.errors import InputError

Mask = npt.NDArray[np.bool_]
Runs = npt.NDArray[np.int64]

_MOST_DIGITS = 7
"""Base-32 digits of a run length; 35 bits are more than any image has pixels."""


def compress(mask: Mask) -> bytes:
    """Mask ``(H, W)`` to COCO's compressed form, the same bytes that pycocotools gives."""
    runs = runs_of(mask)
    values = runs.copy()
    values[3:] -= runs[1:-2]
    # Signed, so the digit that ends a value must leave room for the sign: -16..15 fit one digit, and so on.
    digits = np.ones(len(values), np.int64)
    for length in range(1, _MOST_DIGITS):
        limit = 1 << (5 * length - 1)
        digits += (values < -limit) | (values >= limit)
    position = np.arange(int(digits.sum())) - np.repeat(np.cumsum(digits) - digits, digits)
    codes = (np.repeat(values, digits) >> (5 * position)) & 31
    more = position < np.repeat(digits, digits) - 1
    return (codes + 32 * more + 48).astype(np.uint8).tobytes()


def runs_of(mask: Mask) -> Runs:
    """Run lengths of a mask ``(H, W)``."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0] if flat.size and flat[0] else []
    return np.diff(np.concatenate([np.zeros(1, np.int64), first, changes, [flat.size]])).astype(np.int64)


def expand(code: bytes, size: tuple[int, int], where: str) -> Mask:
    """Mask ``(H, W)`` from COCO's compressed form.

    Raises:
        InputError: not such a text, or its runs do not fill the image.
    """
    return _filled(_parsed(code, where), size, where)


def unpack_counts(text: str, where: str) -> list[int]:
    """Run lengths from COCO's compressed form.

    Raises:
        InputError: not such a text.
    """
    found: list[int] = _parsed(text.encode("utf-8", "surrogatepass"), where).tolist()
    return found


def decode_counts(counts: Sequence[int], size: tuple[int, int], where: str) -> Mask:
    """Mask ``(H, W)`` from run lengths.

    Raises:
        InputError: the runs do not fill the image, or one is negative.
    """
    if any(isinstance(run, bool) or not isinstance(run, int) or run < 0 for run in counts):
        raise InputError(f"{where}: 'counts' must be run lengths from 0")
    pixels = size[0] * size[1]
    if sum(counts) != pixels:
        raise InputError(f"{where}: 'counts' make {sum(counts)} pixels, 'size' {size[0]} x {size[1]}")
    return _filled(np.array(counts, np.int64), size, where)


def _parsed(code: bytes, where: str) -> Runs:
    digits = np.frombuffer(code, np.uint8).astype(np.int64) - 48
    if not len(digits):
        return np.zeros(0, np.int64)
    ends = np.flatnonzero((digits & 32) == 0)
    starts = np.concatenate([[0], ends + 1])
    if digits.min() < 0 or digits.max() > 63 or np.diff([*starts, len(digits)]).max() > _MOST_DIGITS:
        raise InputError(f"{where}: 'counts' is not a compressed run-length code")
    if starts[-1] < len(digits):
        raise InputError(f"{where}: 'counts' is cut off")
    starts, lengths = starts[:-1], np.diff(starts)
    position = np.arange(len(digits)) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 31) << (5 * position), starts)
    values -= np.where(digits[ends] & 16, np.int64(1) << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _filled(runs: Runs, size: tuple[int, int], where: str) -> Mask:
    height, width = size
    if runs.min(initial=0) < 0:
        raise InputError(f"{where}: 'counts' must be run lengths from 0")
    total = sum(runs.tolist())  # a forged code's would not fit into 64 bits
    if total != height * width:
        raise InputError(f"{where}: 'counts' make {total} pixels, 'size' {height} x {width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)
