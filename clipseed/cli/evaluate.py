"""``clipseed evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from clipseed.cli import options as shared
from clipseed.cli.console import Talker, percent, print_json, print_table, some
from clipseed.cli.running import exit_code

if TYPE_CHECKING:
    from clipseed.jobs.evaluate import EvaluateReport

SCORE = "Scoring"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("evaluate")(evaluate)


def evaluate(
    prediction: Annotated[
        Optional[Path],
        typer.Argument(help="Seeds (.h5 or folder of units) or a folder of PNG masks (default: the newest stage)."),
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
        typer.Option(help="One background score instead of the best of a sweep.", rich_help_panel=SCORE),
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
    csv: Annotated[
        Optional[Path], typer.Option(help="Also write the table to this file.", rich_help_panel=shared.OUTPUT)
    ] = None,
    allow_skipped: shared.AllowSkipped = None,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> int:
    """Score seeds or masks against ground truth (mean intersection over union).

    Example:

      clipseed evaluate --gt SegmentationClass
    """
    from clipseed.jobs.evaluate import EvaluateOptions
    from clipseed.jobs.evaluate import evaluate as run_evaluate
    from clipseed.store.files import refuse_unwritable
    from clipseed.store.stages import newest_output

    talker, allowed = Talker(quiet), shared.allowed_skips(allow_skipped)
    refuse_unwritable(csv, "--csv")
    chosen = prediction or newest_output(Path())
    if prediction is None:
        talker.note(f"scoring {chosen}")
    options = EvaluateOptions(
        prediction=chosen, gt=gt, classes=classes, split=split, threshold=threshold,
        alphas=() if alpha is None else shared.numbers(alpha, "--alpha"), pred_ignore=cast("Any", pred_ignore),
        resize_pred=resize_pred,
    )  # fmt: skip
    try:
        report = run_evaluate(options, lambda total: talker.track("evaluate", total))
    finally:
        talker.close()
    _warn(talker, report)
    if csv is not None:
        _write_csv(csv, report)
    if json:
        print_json(report.as_dict())
    else:
        _print(report)
    return exit_code(talker, report.unscored, allowed)


def _warn(talker: Talker, report: EvaluateReport) -> None:
    if report.missing_ground_truth:
        ids = report.missing_ground_truth
        talker.warn(f"{len(ids)} predictions have no ground truth and were not scored: {some(ids)}")
    if report.missing_predictions:
        ids = report.missing_predictions
        where = f"images of split {report.split}" if report.split_given else "ground-truth masks"
        talker.warn(f"{len(ids)} {where} have no prediction and were not scored: {some(ids)}")
    if report.excluded_pixels:
        share = report.excluded_pixels / (report.excluded_pixels + report.scores.pixels)
        talker.warn(f"{percent(share)} % of the pixels were left out because the prediction is 255 there")


def _rows(report: EvaluateReport) -> list[tuple[str, float]]:
    scores = report.scores
    rows = list(zip(report.names, map(float, scores.class_iou), strict=True))
    rows += [("mean IoU", scores.miou), ("mean IoU without background", scores.miou_foreground)]
    if abs(scores.miou_all - scores.miou) > 1e-12:
        rows.append(("mean IoU over all predicted classes", scores.miou_all))
    rows += [("pixel accuracy", scores.pixel_accuracy), ("mean accuracy", scores.mean_accuracy)]
    return rows


def _print(report: EvaluateReport) -> None:
    setting = ""
    if report.alpha is not None:
        setting = f", background (1 - max)^{report.alpha:g}"
    elif report.threshold is not None:
        best = " (best of the sweep)" if len(report.curve) > 1 else ""
        setting = f", threshold {report.threshold:g}{best}"
    rows = [(name, percent(value)) for name, value in _rows(report)]
    print_table((f"{report.prediction} on {report.split}, {report.images} images{setting}", "%"), rows)


def _write_csv(path: Path, report: EvaluateReport) -> None:
    import csv as csv_module
    import io
    import math

    from clipseed.store.files import write_text

    buffer = io.StringIO()
    table = csv_module.writer(buffer, lineterminator="\n")
    table.writerow(["name", "value"])
    table.writerows([name, "" if math.isnan(value) else repr(value)] for name, value in _rows(report))
    write_text(path, buffer.getvalue())
