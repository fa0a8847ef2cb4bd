"""``clipseed refine``: one command per refinement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional, cast

import typer

from clipseed.cli import options as shared
from clipseed.cli.running import RunOptions, prepare, rate

METHOD = "Method"

Source = Annotated[
    Optional[Path],
    typer.Argument(help="Seeds to refine (default: what the stage before left here).", show_default=False),
]
Out = Annotated[
    Optional[Path],
    typer.Option(help="NAME.h5 or a folder (default: NAME-METHOD.h5 beside the seeds).", rich_help_panel=shared.OUTPUT),
]
Weights = Annotated[
    Optional[str],
    typer.Option(help="Where the same weights are now, if they have moved.", rich_help_panel=shared.MODEL),
]
BoxThreshold = Annotated[
    Optional[float],
    typer.Option(
        help="Share of the peak that boxes enclose (default: 0.7 for COCO, else 0.4).", rich_help_panel=METHOD
    ),
]
Layers = Annotated[int, typer.Option(help="Blocks from the end whose attention is averaged.", rich_help_panel=METHOD)]
Rounds = Annotated[int, typer.Option(help="Sinkhorn rounds.", rich_help_panel=METHOD)]
Power = Annotated[int, typer.Option(help="How often maps are spread.", rich_help_panel=METHOD)]
Boxes = Annotated[
    bool, typer.Option("--boxes/--no-boxes", help="Spread from boxes around peaks only.", rich_help_panel=METHOD)
]
Paper = Annotated[
    Optional[bool],
    typer.Option(
        "--paper/--no-paper", help="The released code with its quirks (default: as the seeds).", rich_help_panel=METHOD
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    group = typer.Typer(help="Refine seeds: spread them along attention, or along colours.", no_args_is_help=True)
    group.command("caa")(caa)
    group.command("js")(js)
    group.command("par")(par)
    app.add_typer(group, name="refine")


def caa(
    source: Source = None,
    out: Out = None,
    box_threshold: BoxThreshold = None,
    layers: Layers = 8,
    rounds: Rounds = 3,
    power: Power = 2,
    boxes: Boxes = True,
    paper: Paper = None,
    images: shared.MovedImages = None,
    root: shared.MovedRoot = None,
    weights: Weights = None,
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
    """Class-aware attention affinity (CLIP-ES): spread maps along CLIP's attention.

    Without arguments it refines cams.h5 into cams-caa.h5, with the images and the model that cams.h5 was made with.
    """
    from clipseed.refine.caa import CaaOptions

    constants = CaaOptions(layers=layers, rounds=rounds, power=power, boxes=boxes)
    chosen = RunOptions(shard, engine, ray_address, ray_workers, ray_cpus, report, json, quiet, allow_skipped)
    return _run(
        "caa", source, chosen,
        out=out, box_threshold=box_threshold, caa=constants, paper=paper, images=images, root=root,
        weights=weights, device=device, precision=precision, batch_size=batch_size, workers=workers,
        overwrite=overwrite,
    )  # fmt: skip


def js(
    source: Source = None,
    out: Out = None,
    temperature: Annotated[float, typer.Option(help="Of the softmax over patches.", rich_help_panel=METHOD)] = 0.01,
    box_threshold: BoxThreshold = None,
    layers: Layers = 8,
    rounds: Rounds = 3,
    power: Power = 2,
    boxes: Boxes = True,
    images: shared.MovedImages = None,
    root: shared.MovedRoot = None,
    weights: Weights = None,
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
    """Class-distribution affinity (CD-CLIP): attention between patches that resemble all classes alike."""
    from clipseed.refine.caa import CaaOptions

    constants = CaaOptions(layers=layers, rounds=rounds, power=power, boxes=boxes)
    chosen = RunOptions(shard, engine, ray_address, ray_workers, ray_cpus, report, json, quiet, allow_skipped)
    return _run(
        "js", source, chosen,
        out=out, box_threshold=box_threshold, caa=constants, temperature=temperature,
        images=images, root=root, weights=weights, device=device, precision=precision, batch_size=batch_size,
        workers=workers, overwrite=overwrite,
    )  # fmt: skip


def par(
    source: Source = None,
    out: Out = None,
    iterations: Annotated[int, typer.Option(help="20 in WeCLIP, 10 in AFA.", rich_help_panel=METHOD)] = 20,
    dilations: Annotated[
        str, typer.Option(help="Distances of the neighbours in pixels.", rich_help_panel=METHOD)
    ] = "1,2,4,8,12,24",
    sharpness: Annotated[float, typer.Option(help="Smaller follows edges more closely.", rich_help_panel=METHOD)] = 0.3,
    position_weight: Annotated[
        float, typer.Option(help="Weight of nearness beside likeness.", rich_help_panel=METHOD)
    ] = 0.01,
    images: shared.MovedImages = None,
    root: shared.MovedRoot = None,
    device: shared.Device = "auto",
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
    """Pixel-adaptive refinement (AFA, WeCLIP): maps follow the image's colours, at its full size.

    Needs no model. The result has one value per pixel and class, about 2 bytes each.
    """
    from clipseed.jobs.refine import ParOptions

    steps = shared.whole_numbers(dilations, "--dilations")
    constants = ParOptions(iterations, steps, sharpness, position_weight)
    chosen = RunOptions(shard, engine, ray_address, ray_workers, ray_cpus, report, json, quiet, allow_skipped)
    return _run(
        "par", source, chosen,
        out=out, par=constants, images=images, root=root, device=device, batch_size=batch_size,
        workers=workers, overwrite=overwrite,
    )  # fmt: skip


_HOW = ("device", "precision", "batch_size", "workers", "overwrite")


def _run(method: str, source: Path | None, chosen: RunOptions, **given: Any) -> int:
    from clipseed.jobs.refine import RefineOptions, run_refine
    from clipseed.store.stages import newest_output

    run = prepare(f"refine {method}", chosen)
    if source is None:
        source = newest_output(Path(), method)
        run.talker.note(f"refining {source}")
    given["batch_size"] = shared.auto_or_number(given["batch_size"], "--batch-size")
    given["workers"] = shared.workers_of(given["workers"])
    how = {name: given.pop(name) for name in _HOW if name in given}
    options = RefineOptions(cast("Any", method), source, run=run.how(**how), **given)
    try:
        report = run_refine(options, run.start, run.loading)
    finally:
        run.talker.close()
    computed = report.stats.computed
    summary = (
        f"{report.out}: {report.done_before + computed} of {report.total} images, {computed} computed now"
        f"{rate(report)} ({report.device})"
    )
    return run.finish(report, summary, {"source": str(report.source), "device": report.device}, report.empty)
