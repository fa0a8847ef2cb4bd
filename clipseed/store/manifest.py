"""The manifest: everything that decides what is in an output, so that runs can be resumed, compared and explained."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Any

from clipseed.errors import StoreError
from clipseed.store.differences import differences

Manifest = dict[str, Any]


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


class OtherSettings(StoreError):
    """An output exists with another manifest."""


def refuse_differences(stored: Manifest, wanted: Manifest, where: str, option: str = "--out") -> None:
    """Refuse to add to an output that was made with other settings; ``option`` names another one.

    Raises:
        OtherSettings: naming what differs.
    """
    changed = differences(stored, wanted)
    if changed:
        shown = "\n  ".join(changed[:12])
        more = f"\n  and {len(changed) - 12} more" if len(changed) > 12 else ""
        raise OtherSettings(
            f"{where} was made with other settings; choose another {option}, or start again with --overwrite:"
            f"\n  {shown}{more}"
        )
