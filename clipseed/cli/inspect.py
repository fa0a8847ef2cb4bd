"""``clipseed inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from clipseed.cli import options as shared
from clipseed.cli.console import Talker, print_json, print_table

if TYPE_CHECKING:
    from clipseed.jobs.inspect import Inspection


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("inspect")(inspect)


def inspect(
    seeds: Annotated[Optional[Path], typer.Argument(help="Seeds file or folder (default: the newest stage).")] = None,
    preview: Annotated[
        Optional[Path], typer.Option(help="Write an overlay of some maps to this PNG.", rich_help_panel=shared.OUTPUT)
    ] = None,
    count: Annotated[int, typer.Option(help="Pictures in the preview.", min=1, max=64)] = 4,
    id: Annotated[Optional[list[str]], typer.Option("--id", help="Show this picture; repeatable.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check all checksums, whatever the size.")] = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> int:
    """Show what a seeds output holds: manifest, counts, and a few maps over their pictures."""
    from clipseed.jobs.inspect import inspect_seeds, write_preview
    from clipseed.jobs.stages import newest_output

    chosen = seeds or newest_output(Path())
    found = inspect_seeds(chosen, verify=verify)
    if json:
        print_json(found.as_dict())
    else:
        _print(found)
    if preview is not None:
        shown = write_preview(chosen, preview, count, tuple(id or ()))
        Talker(quiet).note(f"{preview}: {', '.join(shown)}")
    return 0


def _print(found: Inspection) -> None:
    manifest = found.manifest
    model, data, options = manifest["model"], manifest["dataset"], manifest["options"]
    grids = "-"
    if found.grid_range:
        (h0, w0), (h1, w1) = found.grid_range
        grids = f"{h0}x{w0} to {h1}x{w1} patches of {model['patch']} px, {found.cam_dtype}"
    rows = [
        ("file", f"{found.path} ({found.files} file(s), {found.bytes:,} bytes)"),
        ("method", manifest["method"]),
        ("options", ", ".join(f"{key} {value}" for key, value in options.items())),
        ("model", f"{model['model']} {model['weights']} ({model['blocks']} blocks, {model['precision']})"),
        ("weights SHA-256", model["sha256"]),
        ("vocabulary", f"{manifest['vocabulary']['name']}, {len(manifest['vocabulary']['classes'])} classes, "
                       f"{len(manifest['vocabulary']['background'])} background words"),
        ("data set", f"{data['name']} {data['split']} {data.get('root') or ''}".rstrip()),
        ("pictures", f"{found.pictures} ({found.without_class} without a class)"),
        ("maps", f"{found.maps}, {found.empty_maps} empty among the first {found.checked} pictures"),
        ("grids", grids),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")
    typer.echo("")
    print_table(("class", "pictures"), [(name, str(number)) for name, number in found.per_class.items() if number])
