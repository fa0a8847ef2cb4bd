"""``clipseed inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from clipseed.cli import options as shared
from clipseed.cli.console import Talker, print_json, print_table
from clipseed.cli.inspect_masks import Look, show
from clipseed.cli.running import empty_reasons
from clipseed.errors import UsageError

if TYPE_CHECKING:
    from clipseed.jobs.inspect import Inspection


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("inspect")(inspect)


def inspect(
    seeds: Annotated[Optional[Path], typer.Argument(help="Seeds or mask cache (default: the newest stage).")] = None,
    preview: Annotated[
        Optional[Path], typer.Option(help="Write an overlay of some maps to this PNG.", rich_help_panel=shared.OUTPUT)
    ] = None,
    count: Annotated[int, typer.Option(help="Images in the preview.", min=1, max=64)] = 4,
    id: Annotated[Optional[list[str]], typer.Option("--id", help="Show this image; repeatable.")] = None,
    images: shared.MovedImages = None,
    root: shared.MovedRoot = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check all checksums, whatever the size.")] = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> int:
    """Show what an output holds: manifest, counts, and a few maps or segments over their images."""
    from clipseed.jobs.inspect import inspect_seeds, is_mask_cache, write_preview
    from clipseed.store.files import refuse_unwritable
    from clipseed.store.stages import newest_output

    for name, value in (("id", id), ("images", images), ("root", root)):
        if value and preview is None:
            raise UsageError(f"--{name} belongs to --preview")
    refuse_unwritable(preview, "--preview")
    look = Look(preview, count, tuple(id or ()), images, root) if preview is not None else None
    chosen = seeds or newest_output(Path())
    if is_mask_cache(chosen):
        return show(chosen, look, verify=verify, json=json, quiet=quiet)
    found = inspect_seeds(chosen, verify=verify)
    if json:
        print_json(found.as_dict())
    else:
        _print(found)
    if look is not None:
        shown = write_preview(chosen, look.out, look.count, look.ids, look.images, look.root)
        Talker(quiet).note(f"{look.out}: {', '.join(shown)}")
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
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")
    typer.echo("")
    print_table(("class", "images"), [(name, str(number)) for name, number in found.per_class.items() if number])


def _pairs(part: object) -> str:
    """A part of the manifest on one line."""
    return ", ".join(f"{key} {value}" for key, value in part.items()) if isinstance(part, dict) else "-"
