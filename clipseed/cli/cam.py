"""``clipseed cam``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Optional

from clipseed.cli import _options as shared
from clipseed.cli._groups import grouped
from clipseed.cli._maps import model_facts, start, start_tags, tell_tags
from clipseed.cli._run import made, prepare, refuse_restricted, spoken_model
from clipseed.defaults import CamMethod
from clipseed.errors import UsageError


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
