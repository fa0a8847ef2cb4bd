"""CAMs: what one image's class activation maps are in memory, and their place in a file.

With n images and C maps in all a CAM file holds, beside what :mod:`clipseed.store.layout` describes,

===============  ===========  ==========================================================
``size``         (n, 2) i4    height and width of the image in pixels
``grid``         (n, 2) i4    height and width of its maps
``class_offset`` (n+1,) i8    where each image's classes begin in ``class_id``
``class_id``     (C,) i4      class indices (mask value = index + 1)
``cam_offset``   (n+1,) i8    where each image's maps begin in ``cam``
``cam``          (sum K h w)  f2 or f4, values in [0, 1], or of any scale (``raw``), row by row, class by class
===============  ===========  ==========================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from clipseed.data.stamps import UNKNOWN, FileStamp
from clipseed.store.layout import Arrays, RecordFormat, joined, offsets, pack_index
from clipseed.store.record_file import RecordFile
from clipseed.types import LabelMask

_MOST_CLASSES = 254


@dataclass(frozen=True)
class Cam:
    """Class activation maps of one image.

    Attributes:
        id: Sample id.
        classes: ``(K,)`` class indices, in label order; mask value = index + 1.
        maps: ``(K, h, w)`` float32 in [0, 1] on the patch grid; with ``raw`` signed and of any scale.
        size: ``(H, W)`` of the image in pixels.
        stamp: The file of the image as it was.
        raw: The maps are as the gradient gave them (``clipseed cam --raw``), which FMA-WSSS's steps build on.
    """

    id: str
    classes: npt.NDArray[np.int32]
    maps: npt.NDArray[np.float32]
    size: tuple[int, int]
    stamp: FileStamp = UNKNOWN
    raw: bool = False

    def unit(self) -> Cam:
        """The same with maps in [0, 1]: raw ones without their negative values, stretched class by class."""
        from clipseed.pseudo.pixels import unit_range

        return replace(self, maps=unit_range(self.maps), raw=False) if self.raw else self

    def upsampled(self) -> npt.NDArray[np.float32]:
        """Maps at the image's size: ``(K, H, W)`` float32, bilinear with half-pixel centres (as CLIP-ES's code).

        In [0, 1] in any case: raw maps lose their negative values and are stretched at that size.
        """
        import cv2

        height, width = self.size
        out = np.empty((len(self.classes), height, width), np.float32)
        for index, cam in enumerate(self.maps):
            out[index] = cv2.resize(cam, (width, height), interpolation=cv2.INTER_LINEAR)
        if not self.raw:
            return out
        from clipseed.pseudo.pixels import unit_range

        return unit_range(out)

    def label_mask(
        self, *, threshold: float | None = None, alpha: float | None = None, released: bool = False
    ) -> LabelMask:
        """The label mask ``(H, W)``: each pixel's strongest class where it exceeds the background, else 0.

        Give one of ``threshold`` and ``alpha``; see :func:`clipseed.pseudo.thresholding`. With segments, and for other
        rules, see :func:`clipseed.pseudo.label_mask`.

        Raises:
            ValueError: none or both of the two, or outside its range.
        """
        from clipseed.pseudo.rules import label_mask, thresholding

        return label_mask(self, thresholding(threshold=threshold, alpha=alpha, released=released))


def cam_format(cam_dtype: str = "float16") -> RecordFormat[Cam]:
    """The CAM file; ``cam_dtype`` (``float16`` or ``float32``) matters for writing only."""
    return RecordFormat(
        name="clipseed-cams",
        version=1,
        noun="CAM",
        ragged={"class_offset": ("class_id",), "cam_offset": ("cam",)},
        heavy=("cam",),
        pack=partial(_pack, cam_dtype=cam_dtype),
        unpack=_unpack,
        fits=_fits,
    )


def _pack(records: Sequence[Cam], cam_dtype: str) -> Arrays:
    return {
        **pack_index(records, [record.maps.shape[1:] for record in records]),
        "class_offset": offsets([len(record.classes) for record in records]),
        "class_id": joined([record.classes for record in records], "i4"),
        "cam_offset": offsets([record.maps.size for record in records]),
        "cam": joined([record.maps.ravel() for record in records], cam_dtype),
    }


def _unpack(file: RecordFile[Cam], row: int) -> Cam:
    height, width = (int(side) for side in file.grids[row])
    maps = file.heavy("cam", "cam_offset", row).astype(np.float32).reshape(-1, height, width)
    raw = bool((file.manifest.get("options") or {}).get("raw"))
    return Cam(file.ids[row], classes_of(file, row), maps, file.size(row), file.stamp(row), raw)


def classes_of(file: RecordFile[Cam], row: int) -> npt.NDArray[np.int32]:
    """Classes ``(K,)`` of the image in a row, without reading its maps."""
    found: npt.NDArray[np.int32] = file.index["class_id"][file.span("class_offset", row)].copy()
    return found


def _fits(arrays: Arrays) -> bool:
    """Every map covers its grid, and classes are such as masks can hold."""
    counts = np.diff(arrays["class_offset"])
    cells = arrays["grid"].astype(np.int64).prod(axis=1)
    if arrays["class_id"].ndim != 1 or arrays["class_id"].dtype.kind != "i":
        return False
    known = (arrays["class_id"] >= 0) & (arrays["class_id"] < _MOST_CLASSES)
    return bool(known.all() and (np.diff(arrays["cam_offset"]) == counts * cells).all())
