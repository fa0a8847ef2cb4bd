"""``clipseed crf``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional, cast

import typer

from clipseed.cli import options as shared
from clipseed.cli.running import RunOptions, prepare, rate

KERNELS = "Kernels (default: the preset's)"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("crf")(crf)


def crf(
    source: Annotated[
        Optional[Path],
        typer.Argument(help="Seeds (default: what the stage before left here).", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the masks.", rich_help_panel=shared.OUTPUT)] = Path("pseudo"),
    engine: Annotated[
        str, typer.Option(help="torch; pydensecrf in worker processes; ray: torch in the workers of a Ray cluster.")
    ] = "torch",
    preset: Annotated[str, typer.Option(help="clip-es, irn or weclip: their published kernels.")] = "clip-es",
    confidence: Annotated[
        Optional[float], typer.Option(help="Less certain pixels become 255 (0.95 in the paper).", show_default=False)
    ] = None,
    alpha: Annotated[float, typer.Option(help="Background score (1 - max) ** alpha.")] = 1.0,
    soft: Annotated[
        Optional[Path],
        typer.Option(help="Also keep the posterior as seeds: NAME.h5 or a folder.", rich_help_panel=shared.OUTPUT),
    ] = None,
    empty: shared.Empty = "background",
    iterations: Annotated[
        Optional[int], typer.Option(help="Mean-field steps.", rich_help_panel=KERNELS, show_default=False)
    ] = None,
    smooth_xy: Annotated[
        Optional[float], typer.Option(help="Position kernel: pixels.", rich_help_panel=KERNELS, show_default=False)
    ] = None,
    smooth_weight: Annotated[
        Optional[float], typer.Option(help="Its weight.", rich_help_panel=KERNELS, show_default=False)
    ] = None,
    colour_xy: Annotated[
        Optional[float], typer.Option(help="Colour kernel: pixels.", rich_help_panel=KERNELS, show_default=False)
    ] = None,
    colour_rgb: Annotated[
        Optional[float], typer.Option(help="Colour kernel: levels.", rich_help_panel=KERNELS, show_default=False)
    ] = None,
    colour_weight: Annotated[
        Optional[float], typer.Option(help="Its weight.", rich_help_panel=KERNELS, show_default=False)
    ] = None,
    paper: Annotated[
        Optional[bool],
        typer.Option("--paper/--no-paper", help="The released code with its quirks (default: as the seeds)."),
    ] = None,
    images: shared.MovedImages = None,
    root: shared.MovedRoot = None,
    device: shared.Device = "auto",
    workers: shared.Workers = "auto",
    shard: shared.Shard = None,
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
    """Turn seeds into label masks with a dense CRF over the classes present.

    Masks are palette PNG of the image's size: 0 background, class index + 1, and 255 where --confidence asks for it.
    """
    from clipseed.jobs.crf import CrfOptions, run_crf
    from clipseed.refine.crf import crf_parameters
    from clipseed.store.stages import newest_output

    engines = ("torch", "pydensecrf")
    chosen = RunOptions(shard, engine, ray_address, ray_workers, ray_cpus, report, json, quiet, allow_skipped, engines)
    run = prepare("crf", chosen)
    if source is None:
        source = newest_output(Path(), "crf")
        run.talker.note(f"reading {source}")
    parameters = crf_parameters(
        preset, iterations=iterations, smooth_xy=smooth_xy, smooth_weight=smooth_weight, colour_xy=colour_xy,
        colour_rgb=colour_rgb, colour_weight=colour_weight,
    )  # fmt: skip
    options = CrfOptions(
        source=source, out=out, engine=cast("Any", "torch" if run.cluster else engine), parameters=parameters,
        alpha=alpha, confidence=confidence,
        soft=soft, empty=cast("Any", empty), paper=paper, images=images, root=root,
        run=run.how(device=device, workers=shared.workers_of(workers), overwrite=overwrite),
    )  # fmt: skip
    try:
        done = run_crf(options, run.start)
    finally:
        run.talker.close()
    computed = done.stats.computed
    unsure = f", {100 * done.unsure:.1f} % of the pixels are 255" if done.unsure else ""
    summary = (
        f"{done.out}: {done.done_before + computed} of {done.total} masks, {computed} made now{rate(done)}{unsure}"
    )
    facts = {"source": str(done.source), "ignored_share": done.unsure, "engine": done.engine}
    return run.finish(done, summary, facts, done.empty)
