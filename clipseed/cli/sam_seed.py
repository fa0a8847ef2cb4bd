"""``clipseed sam-seed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._groups import grouped
from clipseed.cli._run import prepare, rate
from clipseed.defaults import SeedMethod, SeedPreset, SegmentFormat, UncoveredPolicy


@grouped
def sam_seed(
    *,
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
    masks_kind: Annotated[SegmentFormat, typer.Option(help="That format.", rich_help_panel=shared.DATA)] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the masks.", rich_help_panel=shared.OUTPUT)] = Path("seeds"),
    method: Annotated[
        Optional[SeedMethod],
        typer.Option(
            help="fma (FMA-WSSS), prompted (S2C), vote (SEPL) or pixel (no masks). Default: prompted for masks made "
            "with --prompt, vote for a folder of label masks, else fma.",
            rich_help_panel=shared.METHOD,
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        Optional[SeedPreset],
        typer.Option(
            help="With fma (default: the vocabulary's coarse one).",
            rich_help_panel=shared.METHOD,
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        Optional[float],
        typer.Option(
            help="Background score (1 - max) ** alpha of masks (fma: the preset's) or of pixels (else: 2).",
            rich_help_panel=shared.METHOD,
            show_default=False,
        ),
    ] = None,
    uncovered: Annotated[
        Optional[UncoveredPolicy],
        typer.Option(
            help="Pixels under no mask: background, ignore (255) or cam, their own maps (default: background; with "
            "vote: cam, they stay as they are).",
            rich_help_panel=shared.METHOD,
            show_default=False,
        ),
    ] = None,
    without_masks: Annotated[
        Optional[UncoveredPolicy],
        typer.Option(help="The same for images without any mask.", rich_help_panel=shared.METHOD, show_default=False),
    ] = None,
    min_confidence: Annotated[
        float, typer.Option(help="Less certain labels become 255 (fma, pixel).", rich_help_panel=shared.METHOD)
    ] = 0.0,
    empty: shared.Empty = "background",
    paper: Annotated[
        bool, typer.Option("--paper", help="The released programs with their quirks.", rich_help_panel=shared.METHOD)
    ] = False,
    running: shared.RunArguments,
    output: shared.OutputArguments,
) -> int:
    """Turn seeds and SAM's segments into label masks.

    Masks are palette PNG of the image's size: 0 background, class index + 1, and 255 where it is asked for. Examples:

      clipseed sam-seed

      clipseed sam-seed pseudo --out pseudo-sam

      clipseed sam-seed cams-caa.h5 --masks annotations/panoptic_val2017.json
    """
    from clipseed.jobs.sam_seed import SamSeedOptions, run_sam_seed
    from clipseed.pseudo.rules import RuleOptions

    run = prepare("sam-seed", running, output)
    options = SamSeedOptions(
        source=run.source(source, "sam-seed"), masks=masks, masks_kind=masks_kind, out=out, empty=empty,
        rules=RuleOptions(method, preset, alpha, uncovered, without_masks, min_confidence, paper), **run.parsed(),
    )  # fmt: skip
    with run.console:
        done = run_sam_seed(options, run.start)
    if done.missing_file:
        run.console.warn(
            f"{done.missing} images are not in {masks} and were labelled without masks (--without-masks); they are "
            f"listed in {done.missing_file}"
        )
    computed, without = done.stats.computed, done.stats.counters["without"]
    summary = (
        f"{done.out}: {done.found + computed} of {done.total} masks, {computed} made now{rate(done)} ({done.method})"
    )
    if done.method != "pixel" and without:
        summary += f", {without} of them from no segment"
    if done.unsure:
        summary += f", {100 * done.unsure:.1f} % of the pixels are 255"
    facts = {
        "source": str(done.source), "method": done.method, "ignored_share": done.unsure, "missing": done.missing,
        "without_masks": without,
    }  # fmt: skip
    return run.finish(done, summary, facts, done.empty)
