"""``clipseed report``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, percent, print_json, print_table
from clipseed.cli._groups import grouped
from clipseed.cli._run import exit_code, last_output
from clipseed.defaults import REPORT_SHOWN, REPORT_TITLE
from clipseed.errors import UsageError
from clipseed.wording import counted

if TYPE_CHECKING:
    from clipseed.jobs.report import ReportResult, SurveyResult

_page_option = partial(typer.Option, rich_help_panel="Page")


@grouped
def report(
    *,
    inputs: Annotated[
        Optional[list[Path]],
        typer.Argument(
            metavar="CAMS_OR_MASKS",
            help="CAMs (.h5 or folder of units) or folders of PNG masks; several are compared "
            "(default: the last one made here). Or one segmenter (.safetensors): how it learned.",
        ),
    ] = None,
    scoring: shared.ScoringArguments,
    images: Annotated[
        Optional[Path], _page_option(help="Folder of the images, where an input does not say it.")
    ] = None,
    root: Annotated[
        Optional[Path], _page_option(help="Where the data set is now, if it has moved (voc, coco).")
    ] = None,
    worst: Annotated[int, _page_option(help="How many of the worst images to show.")] = REPORT_SHOWN,
    best: Annotated[int, _page_option(help="How many of the best images to show.")] = REPORT_SHOWN,
    title: Annotated[str, _page_option(help="Heading of the page.")] = REPORT_TITLE,
    out: Annotated[Path, shared.output_option(help="The HTML file to write.")] = Path("report.html"),
    allow_skipped: shared.AllowSkipped = None,
    output: shared.OutputArguments,
) -> int:
    """Write one self-contained HTML page: scores, confusion, and the best and worst images.

    Without ground truth: areas of the classes, and the images most worth a look with their maps and labels. Examples:

      clipseed report cams.h5 --gt SegmentationClass

      clipseed report pseudo
    """
    from clipseed.jobs.report import ReportOptions, SurveyResult, write_report
    from clipseed.store.files import refuse_unwritable

    console, allowed = Console(output.quiet), shared.allowed_skips(allow_skipped)
    refuse_unwritable(out, "--out")
    chosen = tuple(inputs) if inputs else (last_output(console, "report"),)
    if any(path.suffix == ".safetensors" for path in chosen):
        return _training(console, chosen, out, title, output)
    options = ReportOptions(chosen, scoring.of(chosen[0]), out, images, worst, best, title, root)
    with console:
        result = write_report(options, lambda name: lambda total: console.track(name, total))
    for name, note in result.notes:
        console.warn(f"{name}: {note}")
    if output.json:
        print_json(result.as_dict())
    if isinstance(result, SurveyResult):
        if not output.json:
            _print_survey(result)
        console.note(f"{out}: the page; without ground truth (--gt) it has no scores")
        return 0
    if not output.json:
        _print(result)
    console.note(f"{out}: the page")
    return exit_code(console, result.unscored, allowed)


def _print_survey(result: SurveyResult) -> None:
    for one in result.inputs:
        header = (f"{one.name}, {counted(len(one.survey.images), 'image')}", "labelled", "with pixels", "pixels %")
        rows = [(item.name, str(item.labelled), str(item.shown), percent(item.share)) for item in one.survey.classes]
        print_table(header, [*rows, ("all: labelled pixels", "", "", percent(one.survey.coverage))])
    for key, why in result.worth:
        typer.echo(f"look at {key}: {why}")


def _training(console: Console, chosen: tuple[Path, ...], out: Path, title: str, output: shared.OutputArguments) -> int:
    from clipseed.jobs.report import write_training_report

    if len(chosen) > 1:
        raise UsageError("the page about a segmenter is about one: name it alone")
    done = write_training_report(chosen[0], out, title)
    if output.json:
        print_json({"out": str(done.out), "steps": done.steps, "best": done.best})
    console.note(f"{out}: the page")
    return 0


def _print(result: ReportResult) -> None:
    rows = [
        (found.prediction, percent(found.scores.miou), percent(found.scores.miou_foreground),
         percent(found.scores.pixel_accuracy), str(found.images))
        for found in result.reports
    ]  # fmt: skip
    print_table(("input", "mIoU %", "without background %", "pixel accuracy %", "images"), rows)
