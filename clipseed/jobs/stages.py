"""Default outputs of the stages, and which one a command means when it is not told."""

from __future__ import annotations

from pathlib import Path

from clipseed.errors import UsageError

CAM_OUTPUT = "cams.h5"
_BY_REFINEMENT: tuple[tuple[str, ...], ...] = (("seeds",), ("pseudo",), ("cams-*.h5",), (CAM_OUTPUT,))
"""Default outputs, the most refined first; patterns of one group are equally refined."""


def newest_output(folder: Path) -> Path:
    """The most refined default output in a folder.

    Raises:
        UsageError: there is none, or several equally refined ones.
    """
    for patterns in _BY_REFINEMENT:
        found = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UsageError(f"several outputs are equally refined ({names}); name the one you mean")
        if found:
            return found[0]
    known = ", ".join(pattern for patterns in _BY_REFINEMENT for pattern in patterns)
    raise UsageError(f"nothing to score in {folder.absolute()} (looked for {known}); name the file or folder")
