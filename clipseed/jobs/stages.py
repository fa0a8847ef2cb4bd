"""Default outputs of the stages, and which one a command means when it is not told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipseed.errors import UsageError

CAM_OUTPUT = "cams.h5"
CRF_OUTPUT = "pseudo"
_CAMS = (CAM_OUTPUT,)
_REFINED = ("cams-caa.h5", "cams-js.h5")
_PIXELS = ("cams-par.h5", "cams-*-par.h5")
_BY_REFINEMENT: tuple[tuple[str, ...], ...] = (("seeds",), (CRF_OUTPUT,), _PIXELS, _REFINED, _CAMS)
"""Default outputs, the most refined first; patterns of one group are equally refined."""
READ_BY: dict[str, tuple[tuple[str, ...], ...]] = {
    "caa": (_CAMS,),
    "js": (_CAMS,),
    "par": (_REFINED, _CAMS),
    "crf": (_PIXELS, _REFINED, _CAMS),
    "evaluate": _BY_REFINEMENT,
}
"""What each command reads when it is not told, the most refined first."""


def newest_output(folder: Path, groups: Sequence[Sequence[str]] = _BY_REFINEMENT) -> Path:
    """The most refined default output in a folder.

    Raises:
        UsageError: there is none, or several equally refined ones.
    """
    for patterns in groups:
        found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UsageError(f"several outputs are equally refined ({names}); name the one you mean")
        if found:
            return found[0]
    known = ", ".join(pattern for patterns in groups for pattern in patterns)
    raise UsageError(f"nothing to read in {folder.absolute()} (looked for {known}); name the file or folder")
