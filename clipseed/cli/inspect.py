"""``clipseed inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, print_json, print_table
from clipseed.cli._groups import grouped
from clipseed.cli._run import empty_reasons, last_output, spoken_model
from clipseed.errors import UsageError
from clipseed.wording import counted

if TYPE_CHECKING:
    from clipseed.jobs.inspect import AnyInspection, CamInspection, FeatureInspection, SegmentInspection


@grouped
def inspect(
    *,
    cams: Annotated[
        Optional[Path],
        typer.Argument(metavar="OUTPUT", help="CAMs, segments or features file (default: the last one made here)."),
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
    from clipseed.jobs.inspect import inspect_output, write_preview
    from clipseed.store.files import refuse_unwritable

    for name, value in (("id", id), ("images", images), ("root", root)):
        if value and preview is None:
            raise UsageError(f"--{name} belongs to --preview")
    refuse_unwritable(preview, "--preview")
    shared.refuse_no_png(preview, "--preview")
    chosen = cams or last_output(Console(output.quiet), "inspect")
    inspection = inspect_output(chosen, verify=verify)
    if output.json:
        print_json(inspection.as_dict())
    else:
        _print(inspection)
    if preview is not None:
        shown = write_preview(chosen, preview, count, tuple(id or ()), images, root)
        Console(output.quiet).note(f"{preview}: {', '.join(shown)}")
    return 0


def _print(inspection: AnyInspection) -> None:
    from clipseed.jobs.inspect import CamInspection, SegmentInspection

    manifest, data = inspection.manifest, inspection.manifest["dataset"]
    per_class: dict[str, int] = {}
    if isinstance(inspection, CamInspection):
        per_class = inspection.per_class
        unit, origin, content = "images", _cam_origin(manifest), _cam_content(inspection)
    elif isinstance(inspection, SegmentInspection):
        per_class = inspection.per_class
        unit, origin, content = "masks", _segment_origin(manifest), _segment_content(inspection)
    else:
        unit, origin, content = "images", _feature_origin(manifest), _feature_content(inspection)
    rows = [
        ("file", f"{inspection.path} ({counted(inspection.files, 'file')}, {inspection.bytes:,} bytes)"),
        *([("method", str(manifest["method"]))] if "method" in manifest else []),
        ("options", _pairs(manifest["options"])),
        *origin,
        ("data set", f"{data.get('name')} {data.get('split')} {data.get('root') or ''}".rstrip()),
        *content,
        ("versions", _pairs(manifest.get("versions"))),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")
    present = [(name, str(number)) for name, number in per_class.items() if number]
    if present:
        typer.echo("")
        print_table(("class", unit), present)


Rows = list[tuple[str, str]]


def _cam_origin(manifest: dict[str, Any]) -> Rows:
    model, words = manifest.get("model") or {}, manifest["vocabulary"]
    return [
        ("model", f"{spoken_model(model)} ({model.get('blocks')} blocks, "
                  f"{model.get('precision')})"),
        ("weights SHA-256", str(model.get("sha256"))),
        ("vocabulary", f"{words.get('name')}, {len(words['classes'])} classes, "
                       f"{len(words.get('background') or ())} background words "
                       f"({words.get('background_from') or '-'})"),
    ]  # fmt: skip


def _cam_content(cams: CamInspection) -> Rows:
    grids = "-"
    if cams.grid_range:
        (h0, w0), (h1, w1) = cams.grid_range
        patch = (cams.manifest.get("model") or {}).get("patch")
        grids = f"{h0}x{w0} to {h1}x{w1} patches of {patch} px, {cams.cam_dtype}"
    return [
        ("images", f"{cams.images} ({cams.without_class} without a class)"),
        ("maps", f"{cams.maps}, {len(cams.empty.labels)} empty among the first {cams.checked} images"),
        *(("", f"{number} {why}") for why, number in empty_reasons(cams.empty)),
        ("grids", grids),
    ]


def _segment_origin(manifest: dict[str, Any]) -> Rows:
    source = {key: value for key, value in manifest["source"].items() if isinstance(value, str)}
    return [("source", _pairs(source)), ("model", _pairs(manifest["model"]))]


def _segment_content(segments: SegmentInspection) -> Rows:
    fewest, median, most = segments.per_image
    return [
        ("images", f"{segments.images} ({segments.without_masks} without masks, {segments.shrunk} shrunk)"),
        ("masks", f"{segments.masks}; per image {fewest} to {most}, median {median:g}"),
        ("levels", ", ".join(f"{number} {name}" for name, number in segments.levels.items())),
        ("bytes", f"{segments.bytes_per_image:,.0f} per image; {segments.bytes_per_mask:,.0f} per compressed mask"),
    ]


def _feature_origin(manifest: dict[str, Any]) -> Rows:
    model = manifest["model"]
    return [
        ("model", f"{spoken_model(model)} ({model.get('precision')})"),
        ("weights SHA-256", str(model.get("sha256"))),
    ]


def _feature_content(features: FeatureInspection) -> Rows:
    return [("images", str(features.images)), ("features", f"{features.length} values each")]


def _pairs(part: object) -> str:
    """A part of the manifest on one line."""
    return ", ".join(f"{key} {value}" for key, value in part.items()) if isinstance(part, dict) and part else "-"
