"""``clipseed sam-seed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional, cast

import typer

from clipseed.cli import options as shared
from clipseed.cli.running import RunOptions, prepare, rate

METHOD = "Method"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("sam-seed")(sam_seed)


def sam_seed(
    source: Annotated[
        Optional[Path],
        typer.Argument(
            metavar="[SEEDS]",
            help="Seeds (default: what the stage before left here), or for vote a folder of label masks.",
            show_default=False,
        ),
    ] = None,
    masks: Annotated[
        Path,
        typer.Option(
            help="What clipseed sam-masks made, or masks in another format (folder, JSON).", rich_help_panel=shared.DATA
        ),
    ] = Path("masks.h5"),
    masks_kind: Annotated[
        str,
        typer.Option(
            help="That format: auto, coco-panoptic, coco-instances, instance-maps, mask-folders or sa-1b.",
            rich_help_panel=shared.DATA,
        ),
    ] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the masks.", rich_help_panel=shared.OUTPUT)] = Path("seeds"),
    method: Annotated[
        Optional[str],
        typer.Option(
            help="fma (FMA-WSSS), prompted (S2C), vote (SEPL) or pixel (no masks). Default: prompted for masks made "
            "with --prompt, vote for a folder of label masks, else fma.",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        Optional[str],
        typer.Option(
            help="With fma: voc-coarse, voc-fine, coco-coarse or coco-fine (default: the vocabulary's coarse one).",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        Optional[float],
        typer.Option(
            help="Background score (1 - max) ** alpha of masks (fma: the preset's) or of pixels (else: 2).",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    uncovered: Annotated[
        Optional[str],
        typer.Option(
            help="Pixels under no mask: background, ignore (255) or cam, their own maps (default: background; with "
            "vote: cam, they stay as they are).",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    without_masks: Annotated[
        Optional[str],
        typer.Option(help="The same for images without any mask.", rich_help_panel=METHOD, show_default=False),
    ] = None,
    min_confidence: Annotated[
        float, typer.Option(help="Less certain labels become 255 (fma, pixel).", rich_help_panel=METHOD)
    ] = 0.0,
    empty: shared.Empty = "background",
    paper: Annotated[
        bool, typer.Option("--paper", help="The released programs with their quirks.", rich_help_panel=METHOD)
    ] = False,
    workers: Annotated[
        str, typer.Option(help="auto, or processes (0: a thread of this one).", rich_help_panel=shared.RUN)
    ] = "auto",
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
    """Turn seeds and SAM's segments into label masks.

    Masks are palette PNG of the image's size: 0 background, class index + 1, and 255 where it is asked for. Examples:

      clipseed sam-seed

      clipseed sam-seed pseudo --out pseudo-sam

      clipseed sam-seed cams-caa.h5 --masks annotations/panoptic_val2017.json
    """
    from clipseed.jobs.sam_seed import SamSeedOptions, run_sam_seed
    from clipseed.pseudo.rules import RuleOptions
    from clipseed.store.stages import newest_output

    chosen = RunOptions(shard, engine, ray_address, ray_workers, ray_cpus, report, json, quiet, allow_skipped)
    run = prepare("sam-seed", chosen)
    if source is None:
        source = newest_output(Path(), "sam-seed")
        run.talker.note(f"reading {source}")
    rules = RuleOptions(
        cast("Any", method), preset, alpha, cast("Any", uncovered), cast("Any", without_masks), min_confidence, paper
    )
    options = SamSeedOptions(
        source=source, masks=masks, masks_kind=cast("Any", masks_kind), out=out, rules=rules, empty=cast("Any", empty),
        run=run.how(workers=shared.workers_of(workers), overwrite=overwrite),
    )  # fmt: skip
    try:
        done = run_sam_seed(options, run.start)
    finally:
        run.talker.close()
    if done.missing_file:
        run.talker.warn(
            f"{done.missing} images are not in {masks} and were labelled without masks (--without-masks); they are "
            f"listed in {done.missing_file}"
        )
    computed, without = done.stats.computed, done.stats.counters["without"]
    there = f"{done.done_before + computed} of {done.total} masks"
    summary = f"{done.out}: {there}, {computed} made now{rate(done)} ({done.method})"
    if done.method != "pixel" and without:
        summary += f", {without} of them from no segment"
    if done.unsure:
        summary += f", {100 * done.unsure:.1f} % of the pixels are 255"
    facts = {
        "source": str(done.source), "method": done.method, "ignored_share": done.unsure, "missing": done.missing,
        "without_masks": without,
    }  # fmt: skip
    return run.finish(done, summary, facts, done.empty)
