"""``clipseed label``."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

from clipseed.cli import _options as shared
from clipseed.cli._groups import grouped
from clipseed.cli._maps import model_facts, start, start_tags, tell_tags
from clipseed.cli._run import made, prepare, refuse_restricted
from clipseed.defaults import LabelRecipe
from clipseed.wording import counted

if TYPE_CHECKING:
    from clipseed.jobs.label import LabelReport


@grouped(
    first=("images", "labels", "classes", "dataset", "recipe", "checkpoint", "confidence", "out", "keep", "weights")
)
def label(
    *,
    where: shared.DatasetArguments,
    labels: shared.Labels = None,
    classes: shared.Classes = None,
    out: Annotated[Path, shared.output_option(help="Folder for the label masks.")] = Path("pseudo"),
    recipe: Annotated[
        Optional[LabelRecipe],
        shared.method_option(
            metavar="RECIPE",
            help="clip-es: gradients, CLIP's attention, dense CRF; svc: no gradients, maps follow colours (PAR); "
            "segments: SAM's outlines (default: clip-es, or segments where they are given).",
        ),
    ] = None,
    segments: Annotated[
        Optional[Path], shared.method_option(help="What clipseed sam-masks made (recipe segments).")
    ] = None,
    checkpoint: Annotated[
        Optional[str], shared.method_option(help="Instead: SAM's weights, to find the segments on the way.")
    ] = None,
    confidence: Annotated[
        Optional[float], shared.method_option(help="Less certain pixels become 255 (0.95 in the paper; not svc).")
    ] = None,
    keep: Annotated[Optional[Path], shared.output_option(help="Also keep the CAMs: NAME.h5 or a folder.")] = None,
    empty: shared.Empty = "background",
    background: shared.Background = None,
    template: shared.Template = None,
    prompts: shared.Prompts = None,
    tag_threshold: shared.TagThreshold = None,
    tag_top_k: shared.TagTopK = None,
    reading: shared.ReadingArguments,
    model: shared.ModelArguments,
    permissive: shared.Permissive = False,
    compute: shared.ComputeArguments,
    running: shared.RunArguments,
    output: shared.OutputArguments,
) -> int:
    """Turn images and the names of what they show into label masks, in one pass over the images.

    Masks are palette PNG of the image's size: 0 background, class index + 1, and 255 where --confidence asks for it.
    Running the same command again does what is missing. Examples:

      clipseed label --images photos --labels labels.csv --classes classes.txt

      clipseed label --images photos --labels folders

      clipseed label --dataset voc --checkpoint sam_vit_h_4b8939.pth
    """
    from clipseed.data.dataset import DatasetOptions
    from clipseed.jobs.label import LabelOptions, run_label

    source, tagging = shared.label_source(labels, tag_threshold, tag_top_k)
    data = DatasetOptions(
        **vars(where), **vars(reading), **source, classes=classes, templates=tuple(template or ()),
        background=background,
    )  # fmt: skip
    if permissive:
        refuse_restricted(model, where.dataset)
    run = prepare("label", running, output)
    options = LabelOptions(
        data=data, out=out, recipe=recipe, keep=keep, segments=segments, checkpoint=checkpoint, confidence=confidence,
        empty=empty, prompts=prompts, **tagging, **vars(model), run=run.options(**compute.parsed()),
    )  # fmt: skip
    with run.console:
        done = run_label(
            options,
            lambda image_set: partial(start, run, model.weights, image_set, not data.auto_labels),
            lambda image_set: partial(start_tags, run, model.weights, image_set),
            run.loading,
        )
    if done.tags is not None:
        tell_tags(run.console, done.tags)
    if done.missing_file:
        run.console.warn(
            f"{counted(done.missing, 'image is', 'images are')} not in {segments}: labelled without segments, "
            f"listed in {done.missing_file}"
        )
    facts = {
        "recipe": done.recipe, "coverage": done.coverage, "foreground": done.foreground,
        "kept": None if done.kept is None else str(done.kept), "missing": done.missing, **model_facts(done),
    }  # fmt: skip
    code = run.finish(done, _summary(done), facts, done.empty)
    run.console.note("\n".join(["", "Try next:", *(f"  {line}" for line in _next_commands(done))]))
    return code


def _summary(done: LabelReport) -> str:
    summary = f"{made(done, 'label masks')} ({done.recipe})"
    if done.coverage is not None:
        summary += (
            f"; {100 * done.coverage:.1f} % of their pixels are labelled, {100 * done.foreground:.1f} % show a class"
        )
    return summary + (f"; CAMs in {done.kept}" if done.kept else "")


def _next_commands(done: LabelReport) -> list[str]:
    folder = shlex.quote(str(done.out))
    score = [f"clipseed evaluate {folder}"] if done.ground_truth else []
    shown = folder if done.kept is None else f"{shlex.quote(str(done.kept))} {folder}"
    return [f"clipseed report {shown}", *score, f"clipseed export {folder} --format voc --out labels-voc"]
