"""The segments of one image in memory, whether a SAM proposed them or a file held them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from clipseed.errors import ImageError

T = TypeVar("T", bound=np.generic)

MAX_MASK_BYTES = 2**31
"""Masks of one image that are held in memory together, one byte a pixel."""
SUB_PART, PART, WHOLE = 0, 1, 2
"""Levels: which of the three masks of a point a mask is."""


COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "level": ("i1", ()),
    "iou": ("f4", ()),
    "stability": ("f4", ()),
    "box": ("f4", (4,)),
    "point": ("f4", (2,)),
    "crop_box": ("i4", (4,)),
}
"""Type of each of :class:`SegmentColumns`, and shape of what it says of one segment."""


@dataclass(frozen=True, kw_only=True)
class SegmentColumns:
    """What is known of each of S segments besides its pixels.

    Attributes:
        level: ``(S,)`` int8: 0 sub-part, 1 part, 2 whole. Imported masks are wholes.
        iou: ``(S,)`` float32: SAM's predicted IoU (a regression, may exceed 1); 1 for imported masks.
        stability: ``(S,)`` float32: stability score; 1 for imported masks.
        box: ``(S, 4)`` float32: x, y, width, height in pixels, as in SAM's records, without "+1".
        point: ``(S, 2)`` float32: x, y of the prompt; NaN where there was none.
        crop_box: ``(S, 4)`` int32: x, y, width, height of the crop that a mask was found in.
    """

    level: npt.NDArray[np.int8]
    iou: npt.NDArray[np.float32]
    stability: npt.NDArray[np.float32]
    box: npt.NDArray[np.float32]
    point: npt.NDArray[np.float32]
    crop_box: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.level)

    def columns(self, rows: Sequence[int] | npt.NDArray[np.integer] | None = None) -> dict[str, Any]:
        """The columns by name; of these rows alone, in this order, where they are given."""
        whole = {name: getattr(self, name) for name in COLUMNS}
        return whole if rows is None else {name: values[np.asarray(rows, np.int64)] for name, values in whole.items()}


def joined_columns(parts: Sequence[SegmentColumns]) -> dict[str, Any]:
    """The columns of several sets one behind the other; typed even where there is no set."""
    nothing = {name: np.zeros((0, *shape), kind) for name, (kind, shape) in COLUMNS.items()}
    columns = [part.columns() for part in parts]
    return {name: np.concatenate([values, *(part[name] for part in columns)]) for name, values in nothing.items()}


@dataclass(frozen=True, kw_only=True)
class Segments(SegmentColumns):
    """Masks of one image, in output order. They may overlap and leave gaps.

    Attributes:
        masks: ``(S, H, W)`` bool.
    """

    masks: npt.NDArray[np.bool_]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the masks."""
        return (self.masks.shape[1], self.masks.shape[2])

    @property
    def area(self) -> npt.NDArray[np.int64]:
        """``(S,)`` pixels of each mask."""
        area: npt.NDArray[np.int64] = self.masks.sum(axis=(1, 2), dtype=np.int64)
        return area

    def take(self, kept: Sequence[int] | npt.NDArray[np.integer]) -> Segments:
        """The masks with these indices, in this order."""
        return Segments(masks=self.masks[np.asarray(kept, np.int64)], **self.columns(kept))


def from_masks(masks: npt.NDArray[np.bool_]) -> Segments:
    """Segments out of bare masks ``(S, H, W)``, as wholes with perfect scores; empty masks are left out."""
    masks = masks[masks.any(axis=(1, 2))]
    count, height, width = masks.shape
    box = np.array([_bounds(mask) for mask in masks], np.float32).reshape(-1, 4)
    return Segments(
        masks=masks,
        level=np.full(count, WHOLE, np.int8),
        iou=np.ones(count, np.float32),
        stability=np.ones(count, np.float32),
        box=box,
        point=np.full((count, 2), np.nan, np.float32),
        crop_box=np.tile(np.array([0, 0, width, height], np.int32), (count, 1)),
    )


def room_for(count: int, size: tuple[int, int], where: str) -> npt.NDArray[np.bool_]:
    """Empty masks ``(count, H, W)``.

    Raises:
        ImageError: they would take more than ``MAX_MASK_BYTES``.
    """
    height, width = size
    if count * height * width > MAX_MASK_BYTES:
        raise ImageError(f"{where}: {count} masks of {width}x{height} pixels need more than 2 GiB; shrink the image")
    return np.zeros((count, height, width), bool)


def enlarged(values: npt.NDArray[T], size: tuple[int, int]) -> npt.NDArray[T]:
    """Labels or masks ``(…, h, w)`` at another size ``(…, H, W)``: each pixel takes the value of the nearest one."""
    if values.shape[-2:] == size:
        return values
    rows, columns = (  # whole numbers, because pixels between two others must not depend on rounding
        (2 * np.arange(long) + 1) * short // (2 * long) for long, short in zip(size, values.shape[-2:], strict=True)
    )
    return values[..., rows[:, None], columns]


def _bounds(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Box x, y, width, height as SAM writes it: from the first to the last pixel's index, without "+1"."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]), int(rows[-1] - rows[0])
