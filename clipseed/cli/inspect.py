"""``clipseed inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, print_json, print_table
from clipseed.cli._groups import grouped
from clipseed.cli._run import empty_reasons
from clipseed.errors import UsageError

if TYPE_CHECKING:
    from clipseed.jobs.inspect import Inspection, SegmentInspection


@dataclass(frozen=True)
class Look:
    """A preview as asked for: the PNG, how many images or which, and where they are now."""

    out: Path
    count: int
    ids: tuple[str, ...]
    images: Path | None
    root: Path | None


@grouped
def inspect(
    *,
    cams: Annotated[
        Optional[Path], typer.Argument(help="CAMs, segments or features file (default: the newest stage).")
    ] = None,
    preview: Annotated[Optional[Path], shared.output_option(help="Write an overlay of some maps to this PNG.")] = None,
    count: Annotated[int, typer.Option(help="Images in the preview.", min=1, max=64)] = 4,
    id: Annotated[Optional[list[str]], typer.Option("--id", help="Show this image; repeatable.")] = None,
    images: shared.MovedImages = None,
    root: shared.MovedRoot = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check all checksums, whatever the size.")] = False,
    output: shared.OutputArguments,
) -> int:
    """Show what an output holds: manifest, counts, and a few maps or segments over their images."""
    from clipseed.jobs.inspect import holds_features, holds_segment_records, inspect_cams, write_preview
    from clipseed.store.files import refuse_unwritable
    from clipseed.store.stages import newest_output

    for name, value in (("id", id), ("images", images), ("root", root)):
        if value and preview is None:
            raise UsageError(f"--{name} belongs to --preview")
    refuse_unwritable(preview, "--preview")
    look = Look(preview, count, tuple(id or ()), images, root) if preview is not None else None
    chosen = cams or newest_output(Path())
    if holds_features(chosen):
        if look is not None:
            raise UsageError("--preview: features are nothing to look at")
        return show_features(chosen, verify=verify, output=output)
    if holds_segment_records(chosen):
        return show(chosen, look, verify=verify, output=output)
    found = inspect_cams(chosen, verify=verify)
    if output.json:
        print_json(found.as_dict())
    else:
        _print(found)
    if look is not None:
        shown = write_preview(chosen, look.out, look.count, look.ids, look.images, look.root)
        Console(output.quiet).note(f"{look.out}: {', '.join(shown)}")
    return 0


def _print(found: Inspection) -> None:
    manifest = found.manifest
    model, data, words = manifest.get("model") or {}, manifest["dataset"], manifest["vocabulary"]
    grids = "-"
    if found.grid_range:
        (h0, w0), (h1, w1) = found.grid_range
        grids = f"{h0}x{w0} to {h1}x{w1} patches of {model.get('patch')} px, {found.cam_dtype}"
    rows = [
        ("file", f"{found.path} ({found.files} file(s), {found.bytes:,} bytes)"),
        ("method", str(manifest.get("method"))),
        ("options", _pairs(manifest["options"])),
        ("model", f"{model.get('model')} {model.get('weights')} ({model.get('blocks')} blocks, "
                  f"{model.get('precision')})"),
        ("weights SHA-256", str(model.get("sha256"))),
        ("vocabulary", f"{words.get('name')}, {len(words['classes'])} classes, "
                       f"{len(words.get('background') or ())} background words "
                       f"({words.get('background_from') or '-'})"),
        ("data set", f"{data.get('name')} {data.get('split')} {data.get('root') or ''}".rstrip()),
        ("images", f"{found.images} ({found.without_class} without a class)"),
        ("maps", f"{found.maps}, {len(found.empty.labels)} empty among the first {found.checked} images"),
        *(("", f"{number} {why}") for why, number in empty_reasons(found.empty)),
        ("grids", grids),
        ("versions", _pairs(manifest.get("versions"))),
    ]  # fmt: skip
    _print_facts(rows)
    typer.echo("")
    print_table(("class", "images"), [(name, str(number)) for name, number in found.per_class.items() if number])


def show(path: Path, look: Look | None, *, verify: bool, output: shared.OutputArguments) -> int:
    """Print what a segments file holds, and write a preview where one is asked for; returns the exit code."""
    from clipseed.jobs.inspect import inspect_segments, write_segment_preview

    found = inspect_segments(path, verify=verify)
    if output.json:
        print_json(found.as_dict())
    else:
        _print_segments(found)
    if look is not None:
        shown = write_segment_preview(path, look.out, look.count, look.ids, look.images, look.root)
        Console(output.quiet).note(f"{look.out}: {', '.join(shown)}")
    return 0


def _print_segments(found: SegmentInspection) -> None:
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
    _print_facts(rows)
    if found.per_class:
        typer.echo("")
        print_table(("class", "masks"), [(name, str(number)) for name, number in found.per_class.items()])


def show_features(path: Path, *, verify: bool, output: shared.OutputArguments) -> int:
    """Print what a features file holds; returns the exit code."""
    from clipseed.jobs.inspect import inspect_features

    found = inspect_features(path, verify=verify)
    if output.json:
        print_json(found.as_dict())
        return 0
    model, data = found.manifest["model"], found.manifest["dataset"]
    _print_facts([
        ("file", f"{found.path} ({found.files} file(s), {found.bytes:,} bytes)"),
        ("options", _pairs(found.manifest["options"])),
        ("model", f"{model.get('model')} {model.get('weights')} ({model.get('precision')})"),
        ("weights SHA-256", str(model.get("sha256"))),
        ("data set", f"{data.get('name')} {data.get('split')} {data.get('root') or ''}".rstrip()),
        ("images", str(found.images)),
        ("features", f"{found.length} values each"),
        ("versions", _pairs(found.manifest.get("versions"))),
    ])  # fmt: skip
    return 0


def _print_facts(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


def _pairs(part: object) -> str:
    """A part of the manifest on one line."""
    return ", ".join(f"{key} {value}" for key, value in part.items()) if isinstance(part, dict) and part else "-"
