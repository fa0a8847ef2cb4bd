"""What a path holds, and opening it: the only place that asks.

CAMs, segments and features are records, in one file or in a folder of units; label masks are a folder of PNG files;
segments may also come from another program, in any format of :mod:`clipseed.formats.open`. Records are told apart by
what is in the files, never by their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import h5py

from clipseed.data.paths import is_file, is_folder, never_ends
from clipseed.defaults import SegmentFormat
from clipseed.errors import InputError, StoreError, UsageError
from clipseed.formats.open import ForeignSegments, open_segments
from clipseed.store.cam_records import cam_format
from clipseed.store.cams import CamFile, CamSet
from clipseed.store.feature_records import feature_format
from clipseed.store.features import FeatureSet
from clipseed.store.label_mask_folder import LabelMaskFolder
from clipseed.store.layout import RecordFormat
from clipseed.store.names import is_portable, parts_of, unit_files
from clipseed.store.segment_records import segment_format
from clipseed.store.segments import SegmentSet

Content = Literal["CAMs", "segments", "features", "label masks"]
Records = CamSet | SegmentSet | FeatureSet
Prediction = CamSet | LabelMaskFolder
SegmentsOfAnyKind = SegmentSet | ForeignSegments


def content_of(path: Path) -> Content:
    """What an output holds.

    A folder without units holds label masks, if it holds anything. What is not there, or cannot be read, is taken for
    CAMs, whose reader says what is wrong.
    """
    if is_folder(path) and not unit_files(path):
        return "label masks"
    files = record_files(path)
    if not files:
        return "CAMs"
    try:
        name = _format_name(files[0])
    except StoreError:
        return "CAMs"
    contents: dict[str, Content] = {segment_format().name: "segments", feature_format().name: "features"}
    return contents.get(name, "CAMs")


def open_records(path: Path, *, verify: bool | None = None) -> Records:
    """Open CAMs, segments or features.

    Raises:
        StoreError: missing, unfinished, none of them, or damaged.
    """
    readers: dict[Content, type[Records]] = {"segments": SegmentSet, "features": FeatureSet}
    return readers.get(content_of(path), CamSet)(path, verify=verify)


def open_prediction(path: Path, *, verify: bool | None = None) -> Prediction:
    """Open CAMs or a folder of label masks.

    Raises:
        InputError: there is nothing of this name.
        StoreError: unfinished, other records than CAMs, or damaged.
    """
    if content_of(path) == "label masks":
        return LabelMaskFolder(path)
    there = is_folder(path) or is_file(path) or never_ends(path) or is_folder(parts_of(path))
    if not there:
        raise InputError(f"{path}: no such CAM file or mask folder")
    return CamSet(path, verify=verify)


def open_segments_of_any_kind(path: Path, kind: SegmentFormat = "auto") -> SegmentsOfAnyKind:
    """Open segments: those of ``clipseed sam-masks``, or existing ones in a format of another program.

    Args:
        path: Where they are. What is called ``NAME.h5`` is, or is going to be, a segments file of ours.
        kind: The other program's format; ``auto`` looks.

    Raises:
        InputError, StoreError: nothing there, nothing that is known, or damaged.
        UsageError: a format is named for segments of ours.
    """
    if not (bool(unit_files(path)) or is_portable(path) or _is_hdf5(path)):
        return open_segments(path, kind)
    if kind != "auto":
        raise UsageError(f"--masks-kind {kind}: {path} is a segments file")
    return SegmentSet(path)


def record_files(path: Path) -> list[Path]:
    """The files that make up records, finished or not: newer units before the finished file that they add to."""
    if is_folder(path):
        return unit_files(path)
    return [*unit_files(parts_of(path)), *([path] if is_file(path) else [])]


def known_formats() -> dict[str, RecordFormat[Any]]:
    """All formats of records by their name in the file."""
    forms: tuple[RecordFormat[Any], ...] = (cam_format(), segment_format(), feature_format())
    return {form.name: form for form in forms}


def format_of(path: Path) -> RecordFormat[Any]:
    """The format of a file of records; CAMs keep the type of their maps when they are written again.

    Raises:
        StoreError: not a file of ours.
    """
    name, known = _format_name(path), known_formats()
    if name == cam_format().name:
        with CamFile(path, verify=False) as file:
            return cam_format(file.cam_dtype)
    if name not in known:
        raise StoreError(f"{path}: an HDF5 file, but not one of clipseed's")
    return known[name]


def _format_name(path: Path) -> str:
    try:
        with h5py.File(path, "r", locking=False) as file:
            return str(file.attrs.get("format"))
    except Exception as error:  # HDF5 raises nearly anything on damaged structures
        raise StoreError(f"{path}: not a readable HDF5 file ({str(error)[:120]})") from error


def _is_hdf5(path: Path) -> bool:
    return is_file(path) and bool(h5py.is_hdf5(path))
