"""``clipseed prompts``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from clipseed.cli import options as shared
from clipseed.cli.console import Talker, percent, print_json, print_table, some
from clipseed.cli.running import exit_code, warn_of_toy_weights

if TYPE_CHECKING:
    from clipseed.data.types import ImageSet
    from clipseed.jobs.prompts import Candidate, PromptReport


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("prompts")(prompts)


def prompts(
    dataset: shared.Dataset,
    templates: Annotated[
        Optional[Path],
        typer.Option(
            help="Candidates: a YAML list, or one per line (default: about 30 that come with clipseed).",
            rich_help_panel=shared.DATA,
        ),
    ] = None,
    synonyms: Annotated[
        bool,
        typer.Option(
            "--synonyms", help="Also rank the words of classes that have synonyms.", rich_help_panel=shared.DATA
        ),
    ] = False,
    root: shared.Root = None,
    images: shared.Images = None,
    split: shared.Split = None,
    labels: shared.LabelsFile = None,
    classes: shared.Classes = None,
    template: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Template for --synonyms; several are averaged (default: the class list's).",
            rich_help_panel=shared.DATA,
        ),
    ] = None,
    limit: shared.Limit = None,
    exif: shared.Exif = False,
    max_pixels: shared.MaxPixels = 80_000_000,
    model: shared.Model = None,
    weights: shared.Weights = None,
    max_side: Annotated[
        int, typer.Option(help="Shrink longer images to this side; 0: never.", rich_help_panel=shared.MODEL, min=0)
    ] = 640,
    min_side: Annotated[
        int, typer.Option(help="Enlarge shorter images to this side; 0: never.", rich_help_panel=shared.MODEL, min=0)
    ] = 0,
    device: shared.Device = "auto",
    precision: shared.Precision = "auto",
    batch_size: shared.BatchSize = "auto",
    workers: shared.Workers = "auto",
    csv: Annotated[
        Optional[Path], typer.Option(help="Write all numbers to this CSV file.", rich_help_panel=shared.OUTPUT)
    ] = None,
    allow_skipped: shared.AllowSkipped = None,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> int:
    """Rank prompt templates by sharpness (CLIP-ES, Eq. 9; lower is better) on images with two labels or more.

    Use the best with clipseed cam --template. "present" is the score of an image's classes together, in percent: a
    template with a low one is not understood, whatever its sharpness. Examples:

      clipseed prompts --dataset voc --limit 500

      clipseed prompts --dataset folder --images photos --labels labels.csv --classes classes.txt --synonyms
    """
    from clipseed.data.dataset import DatasetOptions
    from clipseed.jobs.prompts import PromptOptions, run_prompts
    from clipseed.store.files import refuse_unwritable

    allowed = shared.allowed_skips(allow_skipped)
    refuse_unwritable(csv, "--csv")
    data = DatasetOptions(
        dataset=dataset, root=root, images=images, split=split, labels=labels, classes=classes,
        templates=tuple(template or ()), exif=exif, max_pixels=max_pixels, limit=limit,
    )  # fmt: skip
    options = PromptOptions(
        data=data, templates=templates, synonyms=synonyms, csv=csv, model=model, weights=weights, device=device,
        precision=cast("Any", precision), max_side=max_side, min_side=min_side,
        batch_size=shared.auto_or_number(batch_size, "--batch-size"),
        workers=shared.workers_of(workers),
    )  # fmt: skip
    talker = Talker(quiet)
    try:
        report = run_prompts(options, lambda image_set: lambda todo, _: _start(talker, weights, image_set, todo))
    finally:
        talker.close()
    if json:
        print_json(report.as_dict())
    else:
        _print(report)
    _tell(talker, report, csv, synonyms)
    return exit_code(talker, len(report.skipped), allowed)


def _start(talker: Talker, weights: str | None, image_set: ImageSet, todo: int) -> Any:
    talker.note(
        f"{image_set.name} {image_set.split}: {todo} of {len(image_set.samples)} images show two classes or more"
    )
    warn_of_toy_weights(talker, weights, image_set)
    track = talker.track("prompts", todo)
    return lambda count, _: track(count)


def _print(report: PromptReport) -> None:
    print_table(
        ("template", "rank", "sharpness", "present", "images"),
        [(item.words, *_numbers(item)) for item in report.templates],
    )
    if report.classes:
        typer.echo("")
        print_table(
            ("class and words", "kind", "rank", "sharpness", "present", "images"),
            [(f"{item.class_name}: {item.words}", item.kind, *_numbers(item)) for item in report.classes],
        )


def _numbers(item: Candidate) -> tuple[str, str, str, str]:
    if item.rank is None or item.sharpness is None:
        return "-", "-", "-", "0"
    return str(item.rank), f"{item.sharpness:.4g}", percent(item.present), str(item.images)


def _tell(talker: Talker, report: PromptReport, csv: Path | None, synonyms: bool) -> None:
    if report.skipped:
        reasons = some([f"{key} ({why})" for key, why in report.skipped], 3)
        talker.warn(f"{len(report.skipped)} images skipped: {reasons}")
    if synonyms and not report.classes:
        talker.note("no class of this vocabulary has synonyms; give some with --classes FILE (docs/formats.md)")
    if csv is not None:
        talker.note(f"{csv}: {len(report.templates) + len(report.classes)} rows")
