"""What ``clipseed inspect`` prints about a mask cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from clipseed.cli.console import Talker, print_json, print_table

if TYPE_CHECKING:
    from clipseed.jobs.inspect import MaskInspection


@dataclass(frozen=True)
class Look:
    """A preview as asked for: the PNG, how many images or which, and where they are now."""

    out: Path
    count: int
    ids: tuple[str, ...]
    images: Path | None
    root: Path | None


def show(path: Path, look: Look | None, *, verify: bool, json: bool, quiet: bool) -> int:
    """Print what a mask cache holds, and write a preview where one is asked for; returns the exit code."""
    from clipseed.jobs.inspect import inspect_masks, write_mask_preview

    found = inspect_masks(path, verify=verify)
    if json:
        print_json(found.as_dict())
    else:
        _print(found)
    if look is not None:
        shown = write_mask_preview(path, look.out, look.count, look.ids, look.images, look.root)
        Talker(quiet).note(f"{look.out}: {', '.join(shown)}")
    return 0


def _print(found: MaskInspection) -> None:
    manifest, data = found.manifest, found.manifest["dataset"]
    fewest, median, most = found.per_image
    rows = [
        ("file", f"{found.path} ({found.files} file(s), {found.bytes:,} bytes)"),
        ("method", str(manifest.get("method"))),
        ("options", _pairs(manifest["options"])),
        ("source", _pairs({key: value for key, value in manifest["source"].items() if isinstance(value, str)})),
        ("model", _pairs(manifest["model"])),
        ("data set", f"{data.get('name')} {data.get('split')} {data.get('root') or ''}".rstrip()),
        ("images", f"{found.images} ({found.without_masks} without masks, {found.shrunk} shrunk)"),
        ("masks", f"{found.masks}; per image {fewest} to {most}, median {median:g}"),
        ("levels", ", ".join(f"{number} {name}" for name, number in found.levels.items())),
        ("bytes", f"{found.bytes_per_image:,.0f} per image; {found.bytes_per_mask:,.0f} per compressed mask"),
        ("versions", _pairs(manifest.get("versions"))),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")
    if found.per_class:
        typer.echo("")
        print_table(("class", "masks"), [(name, str(number)) for name, number in found.per_class.items()])


def _pairs(part: object) -> str:
    """A part of the manifest on one line."""
    return ", ".join(f"{key} {value}" for key, value in part.items()) if isinstance(part, dict) and part else "-"
