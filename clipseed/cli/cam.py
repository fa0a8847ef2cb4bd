"""``clipseed cam``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from clipseed.cli import options as shared
from clipseed.cli.console import Talker
from clipseed.cli.running import Running, RunOptions, prepare, rate, warn_of_toy_weights
from clipseed.data.background import GENERAL
from clipseed.errors import UsageError

if TYPE_CHECKING:
    from clipseed.data.types import ImageSet
    from clipseed.jobs.cam import CamReport, TagReport
    from clipseed.runtime.stream import Advance


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("cam")(cam)


def cam(
    dataset: shared.Dataset,
    out: Annotated[
        Optional[Path],
        typer.Option(
            help="NAME.h5 for one file, or a folder for units (default: cams.h5; cams-caa.h5 with --refine caa).",
            rich_help_panel=shared.OUTPUT,
        ),
    ] = None,
    root: shared.Root = None,
    images: shared.Images = None,
    split: shared.Split = None,
    labels: shared.LabelsOrAuto = None,
    tag_threshold: shared.TagThreshold = None,
    tag_top_k: shared.TagTopK = None,
    classes: shared.Classes = None,
    background: shared.Background = None,
    template: shared.Templates = None,
    limit: shared.Limit = None,
    exif: shared.Exif = False,
    max_pixels: shared.MaxPixels = 80_000_000,
    model: shared.Model = None,
    weights: shared.Weights = None,
    method: Annotated[
        str,
        typer.Option(help="softmax-gradcam (CLIP-ES), gradcam, maskclip, svc or naclip.", rich_help_panel=shared.MODEL),
    ] = "softmax-gradcam",
    refine: Annotated[
        Optional[str],
        typer.Option(
            help="caa: refine in the same pass; the output is the refined maps.", rich_help_panel=shared.MODEL
        ),
    ] = None,
    box_threshold: Annotated[
        Optional[float],
        typer.Option(help="With --refine caa; see clipseed refine caa.", rich_help_panel=shared.MODEL),
    ] = None,
    scales: Annotated[
        str, typer.Option(help="Image scales whose maps are averaged, e.g. 0.75,1,1.5.", rich_help_panel=shared.MODEL)
    ] = "1",
    flip: Annotated[
        bool, typer.Option("--flip", help="Average with the mirrored image.", rich_help_panel=shared.MODEL)
    ] = False,
    max_side: Annotated[
        int, typer.Option(help="Shrink longer images to this side; 0: never.", rich_help_panel=shared.MODEL, min=0)
    ] = 640,
    min_side: Annotated[
        int, typer.Option(help="Enlarge shorter images to this side; 0: never.", rich_help_panel=shared.MODEL, min=0)
    ] = 0,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="CLIP-ES's released code with all its quirks.", rich_help_panel=shared.MODEL),
    ] = False,
    device: shared.Device = "auto",
    precision: shared.Precision = "auto",
    batch_size: shared.BatchSize = "auto",
    workers: shared.Workers = "auto",
    shard: shared.Shard = None,
    engine: shared.Engine = "local",
    ray_address: shared.RayAddress = None,
    ray_workers: shared.RayWorkers = "auto",
    ray_cpus: shared.RayCpus = "auto",
    overwrite: shared.Overwrite = False,
    allow_skipped: shared.AllowSkipped = None,
    report: shared.RunReport = None,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> int:
    """Turn images with image-level labels into class activation maps.

    Running the same command again does what is missing. Examples:

      clipseed cam --dataset voc --out cams.h5

      clipseed cam --dataset folder --images photos --labels labels.csv --classes classes.txt

      clipseed cam --dataset folder --images photos --labels auto --classes classes.txt
    """
    from clipseed.data.dataset import DatasetOptions
    from clipseed.jobs.cam import CamOptions, run_cam

    auto = labels == "auto"
    tagging = shared.given(tag_threshold=tag_threshold, tag_top_k=tag_top_k)
    if tagging and not auto:
        raise UsageError("--tag-threshold and --tag-top-k belong to --labels auto")
    data = DatasetOptions(
        dataset=dataset, root=root, images=images, split=split, auto_labels=auto, classes=classes,
        labels=Path(labels) if labels is not None and not auto else None,
        templates=tuple(template or ()), background=background, exif=exif, max_pixels=max_pixels, limit=limit,
    )  # fmt: skip
    if box_threshold is not None and not refine:
        raise UsageError("--box-threshold belongs to --refine caa")
    chosen = RunOptions(shard, engine, ray_address, ray_workers, ray_cpus, report, json, quiet, allow_skipped)
    run = prepare("cam", chosen)
    options = CamOptions(
        data=data, out=out or Path("cams-caa.h5" if refine else "cams.h5"), refine=cast("Any", refine),
        box_threshold=box_threshold, model=model, weights=weights,
        method=cast("Any", method), scales=shared.numbers(scales, "--scales"), flip=flip, max_side=max_side,
        min_side=min_side, paper=paper, **tagging,
        run=run.how(
            device=device, precision=precision, batch_size=shared.auto_or_number(batch_size, "--batch-size"),
            workers=shared.workers_of(workers), overwrite=overwrite,
        ),
    )  # fmt: skip
    if auto and not run.launch.shard.whole:
        raise UsageError("--labels auto tags all images at once: run it first without --shard, then use its labels")
    talker = run.talker
    try:
        done = run_cam(
            options,
            lambda image_set: partial(_start, run, weights, image_set),
            lambda todo, _: _start_tags(talker, todo),
            run.loading,
        )
    finally:
        talker.close()
    if done.tags is not None:
        _tell_tags(talker, done.tags)
    computed, used = done.stats.computed, done.model
    summary = (
        f"{done.out}: {done.done_before + computed} of {done.total} images, {computed} computed now{rate(done)} "
        f"({used['model']} {used['weights']}, {done.device}, {used['precision']})"
    )
    code = run.finish(done, summary, _facts(done), done.empty)
    if done.empty is None or not done.empty.most or run.launch.source == "torchrun":
        return code
    talker.warn("most maps are empty: see whether labels, words and images belong together (docs/choosing-text.md)")
    return code or 3


def _start(run: Running, weights: str | None, image_set: ImageSet, todo: int, found: int) -> Advance:
    warn_of_toy_weights(run.talker, weights, image_set)
    words = image_set.vocabulary
    if words.background_from == GENERAL:
        run.talker.note(
            f"{words.name}: no background words of its own; {len(words.background)} general ones compete with its "
            "classes (--background)"
        )
    return run.start(todo, found, f"{image_set.name} {image_set.split}", len(image_set.samples))


def _start_tags(talker: Talker, todo: int) -> Any:
    track = talker.track("tags", todo)
    return lambda count, _: track(count)


def _tell_tags(talker: Talker, tags: TagReport) -> None:
    if not tags.tagged:
        talker.note("--labels auto: every image that can be read has labels of its own")
        return
    talker.note(
        f"{tags.path}: {tags.tagged} images tagged by CLIP ({tags.computed} now), {tags.empty} of them without any "
        "class (all background); correct it and give it with --labels"
    )


def _facts(report: CamReport) -> dict[str, Any]:
    tags = report.tags
    return {
        **({"tags": {"file": str(tags.path), "tagged": tags.tagged, "empty": tags.empty}} if tags else {}),
        "model": report.model,
        "device": report.device,
    }
