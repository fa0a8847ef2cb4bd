"""``clipseed report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from clipseed.cli import options as shared
from clipseed.cli.console import Talker, percent, print_json, print_table
from clipseed.cli.evaluate import SCORE
from clipseed.cli.running import exit_code

if TYPE_CHECKING:
    from clipseed.jobs.report import ReportResult

PAGE = "Page"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("report")(report)


def report(
    inputs: Annotated[
        Optional[list[Path]],
        typer.Argument(
            metavar="SEEDS_OR_MASKS...",
            help="Seeds (.h5 or folder of units) or folders of PNG masks; several are compared "
            "(default: the newest stage).",
            show_default=False,
        ),
    ] = None,
    gt: Annotated[
        Optional[str],
        typer.Option(
            help="Folder of ground-truth masks, below here or the data set's root (default: the data set's own).",
            rich_help_panel=SCORE,
        ),
    ] = None,
    classes: Annotated[
        Optional[str],
        typer.Option(help="voc, coco, toy or a file; seeds bring their own.", rich_help_panel=SCORE),
    ] = None,
    split: Annotated[
        Optional[str],
        typer.Option(help="Score only this list: a name in the devkit, or a file.", rich_help_panel=SCORE),
    ] = None,
    threshold: Annotated[
        Optional[float],
        typer.Option(help="One background score for seeds instead of the best of a sweep.", rich_help_panel=SCORE),
    ] = None,
    alpha: Annotated[
        Optional[str],
        typer.Option(help="CLIP-ES's background exponents, e.g. 1,2 (the best counts).", rich_help_panel=SCORE),
    ] = None,
    pred_ignore: Annotated[
        str,
        typer.Option(help="What a predicted 255 is: error, background or exclude.", rich_help_panel=SCORE),
    ] = "error",
    resize_pred: Annotated[
        bool,
        typer.Option("--resize-pred", help="Resize predictions of another size.", rich_help_panel=SCORE),
    ] = False,
    images: Annotated[
        Optional[Path],
        typer.Option(help="Folder of the images, where an input does not say it.", rich_help_panel=PAGE),
    ] = None,
    root: Annotated[
        Optional[Path],
        typer.Option(help="Where the data set is now, if it has moved (voc, coco).", rich_help_panel=PAGE),
    ] = None,
    worst: Annotated[int, typer.Option(help="How many of the worst images to show.", rich_help_panel=PAGE)] = 6,
    best: Annotated[int, typer.Option(help="How many of the best images to show.", rich_help_panel=PAGE)] = 6,
    title: Annotated[str, typer.Option(help="Heading of the page.", rich_help_panel=PAGE)] = "clipseed report",
    out: Annotated[Path, typer.Option(help="The HTML file to write.", rich_help_panel=shared.OUTPUT)] = Path(
        "report.html"
    ),
    allow_skipped: shared.AllowSkipped = None,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> int:
    """Write one self-contained HTML page: scores, confusion, and the best and worst images.

    Example:

      clipseed report cams.h5 --gt SegmentationClass
    """
    from clipseed.jobs.evaluate import EvaluateOptions
    from clipseed.jobs.report import ReportOptions, write_report
    from clipseed.store.files import refuse_unwritable
    from clipseed.store.stages import newest_output

    talker, allowed = Talker(quiet), shared.allowed_skips(allow_skipped)
    refuse_unwritable(out, "--out")
    chosen = tuple(inputs) if inputs else (newest_output(Path()),)
    scoring = EvaluateOptions(
        prediction=chosen[0], gt=gt, classes=classes, split=split, threshold=threshold,
        alphas=() if alpha is None else shared.numbers(alpha, "--alpha"), pred_ignore=cast("Any", pred_ignore),
        resize_pred=resize_pred,
    )  # fmt: skip
    options = ReportOptions(chosen, scoring, out, images, worst, best, title, root)
    try:
        result = write_report(options, lambda name: lambda total: talker.track(name, total))
    finally:
        talker.close()
    for name, note in result.notes:
        talker.warn(f"{name}: {note}")
    if json:
        print_json(result.as_dict())
    else:
        _print(result)
    talker.note(f"{out}: the page")
    return exit_code(talker, result.unscored, allowed)


def _print(result: ReportResult) -> None:
    rows = [
        (found.prediction, percent(found.scores.miou), percent(found.scores.miou_foreground),
         percent(found.scores.pixel_accuracy), str(found.images))
        for found in result.reports
    ]  # fmt: skip
    print_table(("input", "mIoU %", "without background %", "pixel accuracy %", "images"), rows)
