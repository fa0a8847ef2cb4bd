"""Default outputs of the stages, and which one a command means when it is not told."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from clipseed.errors import UsageError

CAM_OUTPUT = "cams.h5"
CRF_OUTPUT = "pseudo"
SEGMENTS_OUTPUT = "segments.h5"
SEED_OUTPUT = "pseudo-sam"
PREDICT_OUTPUT = "predictions"
_REFINED = "cams-*.h5"
_READ_BY: dict[str, tuple[str, ...]] = {
    "evaluate": (PREDICT_OUTPUT, SEED_OUTPUT, CRF_OUTPUT, _REFINED, CAM_OUTPUT),
    "export": (PREDICT_OUTPUT, SEED_OUTPUT, CRF_OUTPUT),
    "irn": (_REFINED, CAM_OUTPUT),
    "crf": (_REFINED, CAM_OUTPUT),
    "threshold": (_REFINED, CAM_OUTPUT),
    "sam-seed": (_REFINED, CAM_OUTPUT),
    "sam-masks": (CAM_OUTPUT, _REFINED),
    "par": (_REFINED, CAM_OUTPUT),
    "caa": (CAM_OUTPUT,),
    "js": (CAM_OUTPUT,),
}
"""What each command reads when it is not told, the most refined first."""
_DOES = {
    "evaluate": "score",
    "export": "export",
    "irn": "export",
    "crf": "label",
    "threshold": "label",
    "sam-seed": "label",
    "sam-masks": "segment",
}


def newest_output(folder: Path, command: str = "evaluate") -> Path:
    """The most refined default output in a folder that a command can read.

    ``cams-caa-par.h5`` was made from ``cams-caa.h5`` and is more refined; ``cams-par.h5`` and ``cams-caa.h5`` were both
    made from ``cams.h5``, and which of them is meant cannot be known.

    Raises:
        UsageError: there is none, or several equally refined ones.
    """
    patterns = _READ_BY[command]
    for pattern in patterns:
        found = sorted(folder.glob(pattern), key=lambda path: (len(path.stem), path.name))
        if not found:
            continue
        if all(after.stem.startswith(f"{before.stem}-") for before, after in pairwise(found)):
            return found[-1]
        names = ", ".join(path.name for path in found)
        raise UsageError(f"several outputs are equally refined ({names}); name the one you mean")
    does = _DOES.get(command, "refine")
    known = ", ".join(patterns)
    raise UsageError(f"nothing to {does} in {folder.absolute()} (looked for {known}); name the file or folder")
