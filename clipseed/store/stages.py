"""Default outputs of the stages, and which output of a folder a command means when it is not told."""

from __future__ import annotations

from pathlib import Path

from clipseed.errors import UsageError
from clipseed.store.label_mask_folder import MANIFEST, read_label_mask_manifest
from clipseed.store.writer import recorded_manifest

CAM_OUTPUT = "cams.h5"
CRF_OUTPUT = "pseudo"
SEGMENTS_OUTPUT = "segments.h5"
SEED_OUTPUT = "pseudo-sam"
PREDICT_OUTPUT = "predictions"
_PLAIN = frozenset({"cam"})
_CAMS = frozenset({"cam", "refine"})
_RECORDS = _CAMS | {"sam-masks"}
_MASKS = frozenset({"label", "crf", "threshold", "sam-seed", "predict"})
_READ_BY: dict[str, frozenset[str]] = {
    "evaluate": _CAMS | _MASKS,
    "report": _CAMS | _MASKS,
    "export": _MASKS,
    "irn": _CAMS,
    "inspect": _RECORDS,
    "crf": _CAMS,
    "threshold": _CAMS,
    "sam-seed": _CAMS,
    "sam-masks": _CAMS,
    "par": _CAMS,
    "caa": _PLAIN,
    "js": _PLAIN,
}
"""Outputs of which commands each command reads; scores that were kept beside label masks are never meant."""
_DOES = {
    "evaluate": "score", "report": "report on", "inspect": "show", "export": "export", "irn": "export", "crf": "label",
    "threshold": "label", "sam-seed": "label", "sam-masks": "segment",
}  # fmt: skip


def newest_output(folder: Path, command: str = "evaluate") -> Path:
    """The output that was written last, of those in a folder that a command can read; their manifests tell.

    Raises:
        UsageError: there is none.
    """
    kinds = _READ_BY[command]
    found = [item for item in _outputs(folder) if item[1] in kinds]
    if found:
        return max(found)[2]
    does = _DOES.get(command, "refine")
    made_by = ", ".join(f"clipseed {kind}" for kind in sorted(kinds))
    raise UsageError(
        f"nothing to {does} in {folder.absolute()} (looked for outputs of {made_by}); name the file or folder"
    )


def _outputs(folder: Path) -> list[tuple[tuple[int, int], str, Path]]:
    """When each output was written (of equal times the longer name, which is the more refined), by what, and where."""
    found = []
    for path in folder.glob("*.h5"):
        manifest = (recorded_manifest(path) if path.is_file() else None) or {}
        kind = manifest.get("kind") or ("cam" if manifest.get("vocabulary") else None)
        if kind in _RECORDS:
            found.append(((path.stat().st_mtime_ns, len(path.name)), str(kind), path))
    for plan in folder.glob(f"*/{MANIFEST}"):
        place = plan.parent
        kind = (read_label_mask_manifest(place) or {}).get("kind")
        if kind is None:
            kind = (recorded_manifest(place) or {}).get("kind")
        if place.name.endswith(".parts") or kind not in _RECORDS | _MASKS:
            continue
        when = max(plan.stat().st_mtime_ns, place.stat().st_mtime_ns)  # the manifest comes first, the masks one by one
        found.append(((when, len(place.name)), str(kind), place))
    return found
