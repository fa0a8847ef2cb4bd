"""Image features: what CLIP says of an image as a whole, and its place in a file.

With n images a features file holds, beside what :mod:`clipseed.store.layout` describes,

==================  ===========  ===============================================================
``size``            (n, 2) i4    height and width of the image in pixels
``grid``            (n, 2) i4    height and width in patches at which the model saw it
``feature_offset``  (n+1,) i8    where each image's feature begins in ``feature``: every E values
``feature``         (n E,) f4    features of length 1, image by image
==================  ===========  ===============================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clipseed.data.stamps import UNKNOWN, FileStamp
from clipseed.store.layout import Arrays, RecordFormat, joined, offsets, pack_index

if TYPE_CHECKING:
    from clipseed.store.record_file import RecordFile


@dataclass(frozen=True)
class Feature:
    """The feature of one image.

    Attributes:
        id: Sample id.
        values: ``(E,)`` float32 of length 1.
        size: ``(H, W)`` of the image in pixels.
        grid: ``(h, w)`` in patches at which the model saw it.
        stamp: The file of the image as it was.
    """

    id: str
    values: npt.NDArray[np.float32]
    size: tuple[int, int]
    grid: tuple[int, int]
    stamp: FileStamp = UNKNOWN


def feature_format() -> RecordFormat[Feature]:
    """The features file."""
    return RecordFormat(
        name="clipseed-features",
        version=1,
        noun="features",
        ragged={"feature_offset": ("feature",)},
        heavy=(),
        pack=_pack,
        unpack=_unpack,
        fits=_fits,
    )


def _pack(records: Sequence[Feature]) -> Arrays:
    return {
        **pack_index(records, [record.grid for record in records]),
        "feature_offset": offsets([len(record.values) for record in records]),
        "feature": joined([record.values for record in records], "f4"),
    }


def _unpack(file: RecordFile[Feature], row: int) -> Feature:
    height, width = (int(side) for side in file.grids[row])
    values = file.index["feature"][file.span("feature_offset", row)]
    return Feature(file.ids[row], values, file.size(row), (height, width), file.stamp(row))


def _fits(arrays: Arrays) -> bool:
    """All features are of one length."""
    lengths = np.diff(arrays["feature_offset"])
    if arrays["feature"].ndim != 1 or arrays["feature"].dtype != np.float32:
        return False
    return bool((lengths > 0).all() and (lengths == lengths[:1]).all())
