"""``clipseed cam``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

from clipseed.cli import _options as shared
from clipseed.cli._console import Console
from clipseed.cli._groups import grouped
from clipseed.cli._run import Running, made, prepare, refuse_restricted, spoken_model, timings, warn_of_toy_weights
from clipseed.data.vocabulary import GENERAL
from clipseed.defaults import CamMethod
from clipseed.errors import UsageError
from clipseed.wording import counted

if TYPE_CHECKING:
    from clipseed.data.types import ImageSet
    from clipseed.jobs.cam import CamReport, TagReport
    from clipseed.jobs.label import LabelReport
    from clipseed.runtime.stream import Advance


@grouped(first=("dataset", "images", "split", "labels", "classes", "out", "weights", "refine", "background", "device"))
def cam(
    *,
    where: shared.DatasetArguments,
    out: Annotated[
        Optional[Path],
        shared.output_option(
            help="NAME.h5 for one file, or a folder for units (default: cams.h5; cams-caa.h5 with --refine caa)."
        ),
    ] = None,
    labels: shared.Labels = None,
    tag_threshold: shared.TagThreshold = None,
    tag_top_k: shared.TagTopK = None,
    classes: shared.Classes = None,
    background: shared.Background = None,
    template: shared.Template = None,
    prompts: shared.Prompts = None,
    reading: shared.ReadingArguments,
    model: shared.ModelArguments,
    permissive: shared.Permissive = False,
    method: Annotated[
        CamMethod, shared.model_option(metavar="METHOD", help=f"{shared.listed(CamMethod)}; the first is CLIP-ES's.")
    ] = "softmax-gradcam",
    refine: Annotated[
        Optional[Literal["caa"]], shared.model_option(help="Refine in the same pass; the output is the refined maps.")
    ] = None,
    box_threshold: Annotated[
        Optional[float], shared.model_option(help="With --refine caa; see clipseed refine caa.")
    ] = None,
    scales: Annotated[str, shared.model_option(help="Image scales whose maps are averaged, e.g. 0.75,1,1.5.")] = "1",
    flip: Annotated[bool, shared.model_option("--flip", help="Average with the mirrored image.")] = False,
    raw: Annotated[
        bool,
        shared.model_option(
            "--raw", help="Keep maps signed and at their own scale, as FMA-WSSS's next steps need them."
        ),
    ] = False,
    softmax_floor: Annotated[float, shared.model_option(help=shared.SOFTMAX_FLOOR, show_default=False)] = 0.0,
    paper: Annotated[bool, shared.model_option("--paper", help="CLIP-ES's released code with all its quirks.")] = False,
    compute: shared.ComputeArguments,
    running: shared.RunArguments,
    output: shared.OutputArguments,
) -> int:
    """Turn images with image-level labels into class activation maps.

    Running the same command again does what is missing. Examples:

      clipseed cam --dataset voc --out cams.h5

      clipseed cam --dataset folder --images photos --labels labels.csv --classes classes.txt

      clipseed cam --dataset folder --images photos --labels auto --classes classes.txt
    """
    from clipseed.data.dataset import DatasetOptions
    from clipseed.jobs.cam import CamOptions, run_cam

    source, tagging = shared.label_source(labels, tag_threshold, tag_top_k)
    data = DatasetOptions(
        **vars(where), **vars(reading), **source, classes=classes, templates=tuple(template or ()),
        background=background,
    )  # fmt: skip
    if box_threshold is not None and not refine:
        raise UsageError("--box-threshold belongs to --refine caa")
    if permissive:
        refuse_restricted(model, where.dataset)
    run = prepare("cam", running, output)
    options = CamOptions(
        data=data, out=out or Path("cams-caa.h5" if refine else "cams.h5"), method=method, refine=refine,
        box_threshold=box_threshold, scales=shared.numbers(scales, "--scales"), flip=flip, paper=paper,
        prompts=prompts, raw=raw, softmax_floor=softmax_floor,
        **tagging, **vars(model), run=run.options(**compute.parsed()),
    )  # fmt: skip
    console = run.console
    with console:
        done = run_cam(
            options,
            lambda image_set: partial(start, run, model.weights, image_set, not data.auto_labels),
            lambda image_set: partial(start_tags, run, model.weights, image_set),
            run.loading,
        )
    if done.tags is not None:
        tell_tags(console, done.tags)
    used = f"({spoken_model(done.model)}, {done.device}, {done.model['precision']})"
    code = run.finish(done, f"{made(done, 'images', 'computed')} {used}", model_facts(done), done.empty)
    if done.empty is None or not done.empty.most or run.launch.source == "torchrun":
        return code
    console.warn("most maps are empty: see whether labels, words and images belong together (docs/choosing-text.md)")
    return code or 3


def start(run: Running, weights: str | None, image_set: ImageSet, first: bool, todo: int, found: int) -> Advance:
    """Say what a data set is, and begin to show progress; ``first``: nothing was said of it before."""
    if first:
        _warn(run.console, weights, image_set)
    return run.start(todo, found, f"{image_set.name} {image_set.split}", len(image_set.samples))


def start_tags(run: Running, weights: str | None, image_set: ImageSet, todo: int, found: int) -> Advance:
    """Tagging comes first, so it is what warnings come before."""
    _warn(run.console, weights, image_set)
    return run.start(todo, found, what="tags")


def _warn(console: Console, weights: str | None, image_set: ImageSet) -> None:
    for note in image_set.notes:
        console.note(note)
    warn_of_toy_weights(console, weights, image_set)
    words = image_set.vocabulary
    if words.background_from == GENERAL:
        console.note(
            f"{words.name}: no background words of its own; {len(words.background)} general ones compete with its "
            "classes (--background)"
        )


def tell_tags(console: Console, tags: TagReport) -> None:
    """Say how many images CLIP tagged, and what to do with the tags."""
    if not tags.tagged:
        console.note("--labels auto: every image that can be read has labels of its own")
        return
    if tags.alike:
        what = (
            f"all classes in {tags.with_all}" if tags.with_all > tags.without_class else f"none in {tags.without_class}"
        )
        console.warn(
            f"the tags do not tell the images apart: CLIP found {what} of {tags.tagged} images; look at the list, try "
            "other words (docs/choosing-text.md) or --tag-threshold, or another model"
        )
    then = "correct it and give it with --labels"
    if tags.open_shards:
        then = f"{tags.open_shards} shards have images to be tagged yet, and the last of them writes the file"
    console.note(
        f"{tags.out}: {counted(tags.tagged, 'image')} tagged by CLIP ({tags.stats.computed} now), "
        f"{tags.without_class} of them without any class (all background); {then}"
    )


def model_facts(report: CamReport | LabelReport) -> dict[str, Any]:
    """What ``--json`` says of the model, and of tags."""
    tags = report.tags
    facts = {"model": report.model, "device": report.device}
    if tags is None:
        return facts
    found = {"tagged": tags.tagged, "empty": tags.without_class, "computed": tags.stats.computed}
    return {"tags": {"file": str(tags.out), **found, **timings(tags)}, **facts}
