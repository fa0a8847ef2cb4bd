"""``clipseed prompts``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, percent, print_json, print_table, some
from clipseed.cli._groups import grouped
from clipseed.cli._run import exit_code, warn_of_toy_weights

if TYPE_CHECKING:
    from clipseed.data.types import ImageSet
    from clipseed.jobs.prompts import Candidate, PromptReport


@grouped
def prompts(
    *,
    where: shared.DatasetArguments,
    templates: Annotated[
        Optional[Path],
        shared.data_option(
            help="Candidates: a YAML list, or one per line (default: about 30 that come with clipseed)."
        ),
    ] = None,
    synonyms: Annotated[
        bool, shared.data_option("--synonyms", help="Also rank the words of classes that have synonyms.")
    ] = False,
    labels: Annotated[
        Optional[Path], shared.data_option(help="Image-level labels: CSV, one-hot CSV, JSON or text.")
    ] = None,
    classes: shared.Classes = None,
    template: Annotated[
        Optional[list[str]],
        shared.data_option(help="Template for --synonyms; several are averaged (default: the class list's)."),
    ] = None,
    reading: shared.ReadingArguments,
    model: shared.ModelArguments,
    compute: shared.ComputeArguments,
    workers: shared.Workers = "auto",
    csv: Annotated[Optional[Path], shared.output_option(help="Write all numbers to this CSV file.")] = None,
    allow_skipped: shared.AllowSkipped = None,
    output: shared.OutputArguments,
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
        **vars(where), **vars(reading), labels=labels, classes=classes, templates=tuple(template or ())
    )
    options = PromptOptions(
        data=data, templates=templates, synonyms=synonyms, csv=csv, workers=shared.workers_of(workers), **vars(model),
        **compute.parsed(),
    )  # fmt: skip
    console = Console(output.quiet)
    with console:
        report = run_prompts(options, lambda image_set: lambda todo, _: _start(console, model.weights, image_set, todo))
    if output.json:
        print_json(report.as_dict())
    else:
        _print(report)
    _tell(console, report, csv, synonyms)
    return exit_code(console, len(report.skipped), allowed)


def _start(console: Console, weights: str | None, image_set: ImageSet, todo: int) -> Any:
    console.note(
        f"{image_set.name} {image_set.split}: {todo} of {len(image_set.samples)} images show two classes or more"
    )
    warn_of_toy_weights(console, weights, image_set)
    track = console.track("prompts", todo)
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


def _tell(console: Console, report: PromptReport, csv: Path | None, synonyms: bool) -> None:
    if report.skipped:
        reasons = some([f"{key} ({why})" for key, why in report.skipped], 3)
        console.warn(f"{len(report.skipped)} images skipped: {reasons}")
    if synonyms and not report.classes:
        console.note("no class of this vocabulary has synonyms; give some with --classes FILE (docs/formats.md)")
    if csv is not None:
        console.note(f"{csv}: {len(report.templates) + len(report.classes)} rows")
