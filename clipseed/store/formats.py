"""Which kind of records a file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py

from clipseed.errors import StoreError
from clipseed.store.cam_records import cam_format
from clipseed.store.feature_records import feature_format
from clipseed.store.layout import RecordFormat
from clipseed.store.segment_records import segment_format


def known_formats() -> dict[str, RecordFormat[Any]]:
    """All formats by their name in the file."""
    forms: tuple[RecordFormat[Any], ...] = (cam_format(), segment_format(), feature_format())
    return {form.name: form for form in forms}


def format_of(path: Path) -> RecordFormat[Any]:
    """The format of a file; CAMs keep the type of their maps when they are written again.

    Raises:
        StoreError: not a file of ours.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            name = str(file.attrs.get("format"))
            dtype = str(file["cam"].dtype) if "cam" in file else ""
    except (OSError, RuntimeError, KeyError) as error:
        raise StoreError(f"{path}: not a readable HDF5 file ({str(error)[:120]})") from error
    if name == cam_format().name:
        return cam_format("float32" if dtype == "float32" else "float16")
    known = known_formats()
    if name not in known:
        raise StoreError(f"{path}: an HDF5 file, but not one of clipseed's")
    return known[name]
