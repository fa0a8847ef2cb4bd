"""``clipseed prompts``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, percent, print_table
from clipseed.cli._groups import grouped
from clipseed.cli._run import Running, prepare, rate, refuse_restricted, warn_of_toy_weights

if TYPE_CHECKING:
    from clipseed.data.types import ImageSet
    from clipseed.jobs.prompts import Candidate, PromptReport
    from clipseed.runtime.stream import Advance


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
    permissive: shared.Permissive = False,
    compute: shared.ComputeArguments,
    csv: Annotated[Optional[Path], shared.output_option(help="Write all numbers to this CSV file.")] = None,
    features: Annotated[
        Optional[Path],
        shared.output_option(
            help="Keep image features there, NAME.h5 or a folder, for going on, for shards, and to rank other texts "
            "without the images; --shard needs it."
        ),
    ] = None,
    running: shared.RunArguments,
    output: shared.OutputArguments,
) -> int:
    """Rank prompt templates by sharpness (CLIP-ES, Eq. 9; lower is better) on images with two labels or more.

    Use the best with clipseed cam --template. "present" is the score of an image's classes together, in percent: a
    template with a low one is not understood, whatever its sharpness. Examples:

      clipseed prompts --dataset voc --limit 500

      clipseed prompts --dataset folder --images photos --labels labels.csv --classes classes.txt --synonyms

      clipseed prompts --dataset voc --features features.h5 --shard 1/4
    """
    from clipseed.data.dataset import DatasetOptions
    from clipseed.jobs.prompts import PromptOptions, run_prompts
    from clipseed.store.files import refuse_unwritable

    refuse_unwritable(csv, "--csv")
    data = DatasetOptions(
        **vars(where), **vars(reading), labels=labels, classes=classes, templates=tuple(template or ())
    )
    if permissive:
        refuse_restricted(model, where.dataset)
    run = prepare("prompts", running, output)
    options = PromptOptions(
        data=data, templates=templates, synonyms=synonyms, csv=csv, features=features, **vars(model),
        run=run.options(**compute.parsed()),
    )  # fmt: skip
    with run.console:
        report = run_prompts(options, lambda image_set: partial(_start, run, model.weights, image_set), run.loading)
    ranked = report.templates is not None
    if ranked and not output.json:
        _print(report)
    _tell(run.console, report, csv, synonyms)
    computed = report.stats.computed
    kept = "" if features is None else f" in {features}"
    summary = f"features of {report.done_before + computed} of {report.total} images{kept}, {computed} computed now"
    return run.finish(report, f"{summary}{rate(report)}{'' if ranked else '; nothing is ranked yet'}", report.as_dict())


def _start(run: Running, weights: str | None, image_set: ImageSet, todo: int, found: int) -> Advance:
    several = sum(len(sample.labels or ()) > 1 for sample in image_set.samples)
    run.console.note(
        f"{image_set.name} {image_set.split}: {several} of {len(image_set.samples)} images show two classes or more"
    )
    warn_of_toy_weights(run.console, weights, image_set)
    return run.start(todo, found)


def _print(report: PromptReport) -> None:
    print_table(
        ("template", "rank", "sharpness", "present", "images"),
        [(item.words, *_numbers(item)) for item in report.templates or ()],
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
    if report.templates is None:
        return
    if synonyms and not report.classes:
        console.note("no class of this vocabulary has synonyms; give some with --classes FILE (docs/formats.md)")
    if csv is not None:
        console.note(f"{csv}: {len(report.templates) + len(report.classes)} rows")
