"""Segments files: the segments of one image as they are stored, and their place in a file.

With n images and S masks in all a cache holds, beside what :mod:`clipseed.store.layout` describes,

===============  ===========  ==========================================================
``size``         (n, 2) i4    height and width of the image in pixels
``grid``         (n, 2) i4    height and width of its masks, smaller where the image was shrunk
``mask_offset``  (n+1,) i8    where each image's masks begin in the datasets below
``rle_length``   (S,) i4      bytes of each mask's code
``level``        (S,) i1      0 sub-part, 1 part, 2 whole
``iou``          (S,) f4      SAM's predicted IoU (may exceed 1)
``stability``    (S,) f4      stability score
``box``          (S, 4) f4    x, y, width, height in pixels of the masks, without "+1"
``point``        (S, 2) f4    x, y of the prompt; -1, -1 where there was none
``crop_box``     (S, 4) i4    x, y, width, height of the crop that the mask was found in
``class_id``     (S,) i4      class index that the mask was asked for; -1: for none
``rle_offset``   (n+1,) i8    where each image's codes begin in ``rle``
``rle``          (bytes,) u1  COCO's compressed run lengths, mask behind mask
===============  ===========  ==========================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clipseed.data.stamps import UNKNOWN, FileStamp
from clipseed.errors import InputError, StoreError
from clipseed.formats.rle import compress, expand
from clipseed.segments import COLUMNS, SegmentColumns, Segments, room_for
from clipseed.store.layout import Arrays, RecordFormat, joined, offsets, pack_index
from clipseed.store.record_file import RecordFile
from clipseed.types import NO_CLASS

_MOST_CLASSES = 254
_PER_MASK = {**COLUMNS, "class_id": ("i4", ())}
"""Type and shape of what is known of each mask."""


@dataclass(frozen=True, kw_only=True)
class SegmentRecord(SegmentColumns):
    """Masks of one image, compressed; S may be 0. The arrays are those of the file, where no prompt is -1, -1.

    Attributes:
        id: Sample id.
        size: ``(H, W)`` of the image in pixels.
        grid: ``(h, w)`` of the masks.
        rle_length: ``(S,)`` int32.
        rle: ``(sum of rle_length,)`` uint8.
        class_id: ``(S,)`` int32: class that a mask was asked for, -1 for none.
        stamp: The file of the image as it was.
    """

    id: str
    size: tuple[int, int]
    grid: tuple[int, int]
    rle_length: npt.NDArray[np.int32]
    rle: npt.NDArray[np.uint8]
    class_id: npt.NDArray[np.int32]
    stamp: FileStamp = UNKNOWN

    @property
    def codes(self) -> list[bytes]:
        """Compressed run lengths of each mask, as pycocotools takes them with ``{"size": grid, "counts": code}``."""
        ends = np.cumsum(self.rle_length, dtype=np.int64).tolist()
        text = self.rle.tobytes()
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def masks(self) -> npt.NDArray[np.bool_]:
        """``(S, h, w)`` bool.

        Raises:
            StoreError: a code is damaged.
        """
        found = np.zeros((len(self), *self.grid), bool)
        for number, code in enumerate(self.codes):
            try:
                found[number] = expand(code, self.grid, f"mask {number} of {self.id!r}")
            except InputError as error:
                raise StoreError(f"damaged segments file: {error}") from error
        return found


def pack_segments(
    identifier: str, size: tuple[int, int], proposals: Segments, classes: Sequence[int] | None = None
) -> SegmentRecord:
    """Masks of an image as they are stored.

    Args:
        identifier: Sample id.
        size: The image's height and width; the masks may be smaller.
        proposals: Its masks.
        classes: Class index that each mask was asked for.
    """
    codes = [compress(mask) for mask in proposals.masks]
    point = np.where(np.isnan(proposals.point), np.float32(-1), proposals.point)  # NaN is not equal to itself
    return SegmentRecord(
        id=identifier,
        size=size,
        grid=proposals.size,
        rle_length=np.array([len(code) for code in codes], np.int32),
        rle=np.frombuffer(b"".join(codes), np.uint8),
        **{**proposals.columns(), "point": point},
        class_id=np.full(len(codes), NO_CLASS, np.int32) if classes is None else np.array(classes, np.int32),
    )


def unpack_segments(record: SegmentRecord) -> Segments:
    """Masks of a stored record.

    Raises:
        ImageError: there are more than fit into memory.
        StoreError: a code is damaged.
    """
    room_for(len(record), record.grid, record.id)
    point = np.where(record.point < 0, np.float32(np.nan), record.point)
    return Segments(masks=record.masks(), **{**record.columns(), "point": point})


def segment_format() -> RecordFormat[SegmentRecord]:
    """The segments file."""
    return RecordFormat(
        name="clipseed-segments",
        version=1,
        noun="segments",
        ragged={"mask_offset": ("rle_length", *_PER_MASK), "rle_offset": ("rle",)},
        heavy=(*_PER_MASK, "rle"),
        pack=_pack,
        unpack=_unpack,
        fits=_fits,
    )


def _pack(records: Sequence[SegmentRecord]) -> Arrays:
    per_mask = {
        name: joined([getattr(record, name).reshape(-1) for record in records], kind).reshape(-1, *shape)
        for name, (kind, shape) in _PER_MASK.items()
    }
    return {
        **pack_index(records, [record.grid for record in records]),
        "mask_offset": offsets([len(record) for record in records]),
        "rle_length": joined([record.rle_length for record in records], "i4"),
        **per_mask,
        "rle_offset": offsets([len(record.rle) for record in records]),
        "rle": joined([record.rle for record in records], "u1"),
    }


def _unpack(file: RecordFile[SegmentRecord], row: int) -> SegmentRecord:
    known: dict[str, Any] = {}
    for name, (kind, shape) in _PER_MASK.items():
        values = file.heavy(name, "mask_offset", row)
        if values.shape[1:] != shape:
            raise StoreError(f"{file.path}: damaged, {name!r} has rows of shape {values.shape[1:]}")
        known[name] = values.astype(kind)
    level, class_id = known["level"], known["class_id"]
    if not ((level >= 0) & (level <= 2)).all() or not ((class_id >= NO_CLASS) & (class_id < _MOST_CLASSES)).all():
        raise StoreError(f"{file.path}: damaged, a mask of {file.ids[row]!r} has an impossible level or class")
    return SegmentRecord(
        id=file.ids[row],
        size=file.size(row),
        grid=(int(file.grids[row][0]), int(file.grids[row][1])),
        rle_length=file.index["rle_length"][file.span("mask_offset", row)].copy(),
        rle=file.heavy("rle", "rle_offset", row).astype(np.uint8),
        **known,
        stamp=file.stamp(row),
    )


def _fits(arrays: Arrays) -> bool:
    """Codes fill their images' part of ``rle``; none is empty."""
    lengths = arrays["rle_length"].astype(np.int64)
    if lengths.ndim != 1 or lengths.min(initial=1) < 1:
        return False
    return bool((offsets(lengths.tolist())[arrays["mask_offset"]] == arrays["rle_offset"]).all())
