"""``clipseed export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, print_json
from clipseed.cli._groups import grouped
from clipseed.cli._run import exit_code, last_output, tell_skipped
from clipseed.defaults import ExportFormat, IgnoreExport, ImagePlacement, Orientation
from clipseed.wording import counted


@grouped
def export(
    *,
    source: Annotated[
        Optional[Path],
        typer.Argument(
            metavar="[MASKS_OR_CAMS]",
            help="Folder of label masks, CAMs, or corrected masks (default: the newest stage's).",
        ),
    ] = None,
    format: Annotated[
        ExportFormat,
        shared.output_option("--format", metavar="FORMAT", help=f"What to write: {shared.listed(ExportFormat)}."),
    ],
    out: Annotated[Path, shared.output_option(help="Folder to write.")] = Path("export"),
    images: Annotated[
        Optional[ImagePlacement],
        shared.output_option("--images", help="Copy the images, link them, or only name them (default: by format)."),
    ] = None,
    orient: Annotated[
        Optional[Orientation],
        shared.output_option(
            "--orient",
            help="Masks on the pixels as stored, or turned as EXIF says (default: what readers compare with).",
        ),
    ] = None,
    ignore: Annotated[
        Optional[IgnoreExport],
        shared.output_option(
            "--ignore",
            help="255: keep it as the format says it, make it background, or drop it from what is annotated "
            "(default: keep where it can be said).",
        ),
    ] = None,
    background_class: Annotated[
        Optional[str],
        shared.output_option(help="Name of the background; formats of regions then annotate it as well."),
    ] = None,
    parquet: Annotated[bool, shared.output_option("--parquet", help="hf: Parquet files as well.")] = False,
    image_url: Annotated[
        Optional[str], shared.output_option(help="labelstudio: what stands before an image's path.")
    ] = None,
    classes: shared.Classes = None,
    image_folder: Annotated[
        Optional[Path], shared.data_option(help="Folder of the images, where the masks do not say it.")
    ] = None,
    root: shared.MovedRoot = None,
    threshold: Annotated[
        Optional[float], shared.method_option(help="CAMs: background score everywhere, 0 to below 1.")
    ] = None,
    alpha: Annotated[Optional[float], shared.method_option(help="CAMs: background score (1 - max) ** alpha.")] = None,
    overwrite: Annotated[
        bool, shared.output_option("--overwrite", help="Start again, deleting what an export left there.")
    ] = False,
    allow_skipped: shared.AllowSkipped = None,
    output: shared.OutputArguments,
) -> int:
    """Write label masks with their images in a format that another tool reads (docs/export.md says which tool).

    Running it again completes the folder, or brings it up to date. Examples:

      clipseed export --format ultralytics --out for-yolo

      clipseed export pseudo --format labelstudio --out to-correct
    """
    from clipseed.jobs.export import ExportOptions, run_export

    console, allowed = Console(output.quiet), shared.allowed_skips(allow_skipped)
    chosen = source or last_output(console, "irn" if format == "irn" else "export", "exporting")
    options = ExportOptions(
        chosen, out, format, images, image_folder, root, orient, ignore, background_class, classes, threshold, alpha,
        parquet, overwrite=overwrite, **shared.given(image_url=image_url),
    )  # fmt: skip
    with console:
        done = run_export(options, lambda total: console.track("export", total))
    for note in done.notes:
        console.warn(note)
    tell_skipped(console, done.skipped, done.skipped_file)
    exported = done.images - len(done.skipped)
    console.note(
        f"{out}: {exported} of {counted(done.images, 'image')} as {format}, {counted(done.written, 'file')} written now"
    )
    if output.json:
        print_json(done.as_dict())
    return exit_code(console, len(done.skipped), allowed)
