"""The manifest: everything that decides what is in an output, so that runs can be resumed, compared and explained."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Any

from clipseed.errors import StoreError

Manifest = dict[str, Any]

_COMPARED = ("kind", "method", "options", "source", "model", "vocabulary", "dataset")
"""Parts in which a resumed run must agree with what is there; versions, the weights' path and pixel limits need not."""
_NOTES = ("vocabulary.background_from",)
"""Entries of these parts that are for people: what they are about is compared itself."""


def package_versions() -> dict[str, str]:
    """Versions of everything that has a part in the numbers."""
    from clipseed import __version__

    names = ("torch", "open_clip_torch", "numpy", "pillow", "h5py", "opencv-python-headless", "segment-anything")
    versions = {"clipseed": __version__, "python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def dumps(manifest: Manifest) -> str:
    """Canonical JSON: the same manifest gives the same text."""
    return json.dumps(manifest, sort_keys=True, ensure_ascii=True, indent=1)


def differences(stored: Manifest, wanted: Manifest) -> list[str]:
    """Human-readable differences that forbid adding to an output, e.g. ``model.sha256: ab12… there, cd34… now``."""
    found: list[str] = []
    for part in _COMPARED:
        _compare(part, stored.get(part), wanted.get(part), found)
    return found


class OtherSettings(StoreError):
    """An output exists with another manifest."""


def refuse_differences(stored: Manifest, wanted: Manifest, where: str) -> None:
    """Refuse to add to an output that was made with other settings.

    Raises:
        OtherSettings: naming what differs.
    """
    changed = differences(stored, wanted)
    if changed:
        shown = "\n  ".join(changed[:12])
        more = f"\n  and {len(changed) - 12} more" if len(changed) > 12 else ""
        raise OtherSettings(
            f"{where} was made with other settings; choose another --out, or start again with --overwrite:"
            f"\n  {shown}{more}"
        )


def _compare(path: str, there: Any, now: Any, found: list[str]) -> None:
    if path in _NOTES:
        return
    if isinstance(there, dict) and isinstance(now, dict):
        for key in sorted(there.keys() | now.keys()):
            _compare(f"{path}.{key}", there.get(key), now.get(key), found)
    elif json.dumps(there, sort_keys=True) != json.dumps(now, sort_keys=True):
        found.append(f"{path}: {_short(there)} there, {_short(now)} now")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else f"{text[:57]}…"
