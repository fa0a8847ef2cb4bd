"""What the files of an output of records are called: ``NAME.h5``, its unfinished ``NAME.h5.parts/``, ``unit-*.h5``."""

from __future__ import annotations

from pathlib import Path

from clipseed.data.paths import is_folder

UNIT_PATTERN = "unit-*.h5"
_H5_SUFFIXES = {".h5", ".hdf5"}
_PARTS = ".parts"


def is_portable(out: Path) -> bool:
    """Whether a name means one portable file rather than a folder."""
    return out.suffix.lower() in _H5_SUFFIXES


def parts_of(out: Path) -> Path:
    """Where a portable file's units are until it is finished."""
    return out.with_name(out.name + _PARTS)


def list_beside(out: Path, what: str) -> Path:
    """Where an output lists what was ``skipped`` or is ``empty``: ``NAME.what.csv`` beside ``NAME.h5``, or in it."""
    return out.with_name(f"{out.stem}.{what}.csv") if is_portable(out) else out / f"{what}.csv"


def is_in_parts(path: Path) -> bool:
    """Whether a unit file belongs to a portable file that is not finished."""
    return path.parent.name.endswith(_PARTS)


def unit_files(folder: Path) -> list[Path]:
    """The units in a folder, in their order; none where there is no such folder."""
    return sorted(folder.glob(UNIT_PATTERN)) if is_folder(folder) else []
