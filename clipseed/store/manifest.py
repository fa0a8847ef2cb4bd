"""The manifest: everything that decides what is in an output, so that runs can be resumed, compared and explained."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from clipseed.errors import StoreError
from clipseed.store.differences import differences
from clipseed.version import __version__

Manifest = dict[str, Any]


def package_versions() -> dict[str, str]:
    """Versions of everything that has a part in the numbers."""
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


def label_manifest(
    source: Manifest, path: Path | None, kind: str, method: str, options: dict[str, Any], **beside: Any
) -> Manifest:
    """The manifest of label masks made from CAMs, or from other label masks.

    Args:
        source: The manifest of what they are made from, as far as there is one.
        path: Where that is; ``None``: it was never stored.
        kind: The command.
        method: How it labels.
        options: What decides the labels, besides how images were read.
        beside: What else they are made from.
    """
    before = source.get("options") or {}
    reading = {key: before[key] for key in ("exif", "max_side", "min_side") if key in before}
    origin = {key: source[key] for key in ("kind", "method", "options", "source") if key in source}
    kept: Manifest = {key: source[key] for key in ("model", "weights", "vocabulary", "dataset") if key in source}
    made: Manifest = {
        "kind": kind,
        "method": method,
        "options": {**reading, **options},
        "source": {**origin, **beside},
        **({} if path is None else {"input": str(path.resolve())}),
        "versions": package_versions(),
    }
    return {**made, **kept}


def recorded_prompts(manifest: Manifest) -> str | None:
    """SHA-256 of the learned prompts that an output, or what it was made from, was made with; ``None`` for words."""
    part: Any = manifest
    while isinstance(part, dict):
        options = part.get("options")
        if isinstance(options, dict) and options.get("prompts"):
            return str(options["prompts"])
        part = part.get("source")
    return None


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
