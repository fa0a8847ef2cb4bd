"""``clipseed evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, percent, print_json, print_table
from clipseed.cli._groups import grouped
from clipseed.cli._run import exit_code, last_output
from clipseed.wording import counted

if TYPE_CHECKING:
    from clipseed.evaluate.per_image import ImageScore
    from clipseed.jobs.evaluate import EvaluateReport


@grouped
def evaluate(
    *,
    prediction: Annotated[
        Optional[Path],
        typer.Argument(
            metavar="CAMS_OR_MASKS",
            help="CAMs (.h5 or folder of units) or a folder of PNG masks (default: the last one made here).",
        ),
    ] = None,
    scoring: shared.ScoringArguments,
    csv: Annotated[Optional[Path], shared.output_option(help="Also write the table to this file.")] = None,
    per_image: Annotated[
        Optional[Path],
        shared.output_option(help="CSV of every image: mIoU, coverage, classes missed and invented, the worst first."),
    ] = None,
    worst: Annotated[int, shared.output_option(help="List so many of the worst images.", min=0)] = 0,
    allow_skipped: shared.AllowSkipped = None,
    output: shared.OutputArguments,
) -> int:
    """Score CAMs or masks against ground truth (mean intersection over union).

    Example:

      clipseed evaluate --gt SegmentationClass
    """
    from clipseed.evaluate.per_image import ImageScores
    from clipseed.jobs.evaluate import evaluate as run_evaluate
    from clipseed.store.files import refuse_unwritable, write_text

    console, allowed = Console(output.quiet), shared.allowed_skips(allow_skipped)
    refuse_unwritable(csv, "--csv")
    refuse_unwritable(per_image, "--per-image")
    images = ImageScores()
    chosen = prediction or last_output(console, "evaluate", "scoring")
    with console:
        report = run_evaluate(
            scoring.of(chosen), lambda total: console.track("evaluate", total),
            images=images if per_image is not None or worst else None,
        )  # fmt: skip
    for line in report.left_out:
        console.warn(line)
    if csv is not None:
        _write_csv(csv, report)
    if per_image is not None:
        write_text(per_image, images.csv())
    if output.json:
        print_json({**report.as_dict(), **({"worst": [asdict(item) for item in images.worst(worst)]} if worst else {})})
    else:
        _print(report)
        if worst:
            _print_worst(images.worst(worst))
    return exit_code(console, report.unscored, allowed)


def _print_worst(found: Sequence[ImageScore]) -> None:
    rows = [(item.id, percent(item.miou), percent(item.coverage), ", ".join(item.missed), ", ".join(item.invented))
            for item in found]  # fmt: skip
    print_table((f"the {len(found)} worst images", "mIoU %", "coverage %", "missed", "invented"), rows)


def _rows(report: EvaluateReport) -> list[tuple[str, float]]:
    scores = report.scores
    rows = list(zip(report.names, map(float, scores.class_iou), strict=True))
    rows += [("mean IoU", scores.miou), ("mean IoU without background", scores.miou_foreground)]
    if abs(scores.miou_all - scores.miou) > 1e-12:
        rows.append(("mean IoU over all predicted classes", scores.miou_all))
    if report.coverage < 1 and report.labelled is not None:
        rows += [("coverage", report.coverage), ("mean IoU where it is labelled", report.labelled.miou)]
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
    typer.echo(f"{report.prediction} on {report.split}, {counted(report.images, 'image')}{setting}")
    print_table(("class", "%"), rows)


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
