"""``clipseed sam-seed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._groups import grouped
from clipseed.cli._run import made, prepare
from clipseed.defaults import PIXEL_ALPHA, SeedMethod, SeedPreset, SegmentFormat, UncoveredPolicy
from clipseed.wording import counted


@grouped(first=("source", "masks", "method", "preset", "uncovered", "min_confidence", "empty", "out"))
def sam_seed(
    *,
    source: Annotated[
        Optional[Path],
        typer.Argument(
            metavar="CAMS",
            help="CAMs (default: what the stage before left here), or for vote a folder of label masks.",
        ),
    ] = None,
    masks: Annotated[
        Path, shared.data_option(help="What clipseed sam-masks made, or masks in another format (folder, JSON).")
    ] = Path("segments.h5"),
    masks_kind: Annotated[
        SegmentFormat, shared.data_option(metavar="FORMAT", help=f"That format: {shared.listed(SegmentFormat)}.")
    ] = "auto",
    out: Annotated[Path, shared.output_option(help="Folder for the masks.")] = Path("pseudo-sam"),
    method: Annotated[
        Optional[SeedMethod],
        shared.method_option(
            help="fma (FMA-WSSS), prompted (S2C), vote (SEPL) or pixel (no masks). Default: prompted for masks made "
            "with --prompt, vote for a folder of label masks, else fma."
        ),
    ] = None,
    preset: Annotated[
        Optional[SeedPreset],
        shared.method_option(
            metavar="PRESET", help=f"With fma: {shared.listed(SeedPreset)} (default: the vocabulary's coarse one)."
        ),
    ] = None,
    alpha: Annotated[
        Optional[float],
        shared.method_option(
            help="Background score (1 - max) ** alpha of masks (fma: the preset's) or of pixels "
            f"(else: {PIXEL_ALPHA:g})."
        ),
    ] = None,
    uncovered: Annotated[
        Optional[UncoveredPolicy],
        shared.method_option(
            help="Pixels under no mask: background, ignore (255) or cam, their own maps (default: background; with "
            "vote: cam, they stay as they are)."
        ),
    ] = None,
    without_masks: Annotated[
        Optional[UncoveredPolicy], shared.method_option(help="The same for images without any mask.")
    ] = None,
    min_confidence: Annotated[float, shared.method_option(help="Less certain labels become 255 (fma, pixel).")] = 0.0,
    empty: shared.Empty = "background",
    paper: Annotated[bool, shared.method_option("--paper", help="The released programs with their quirks.")] = False,
    running: shared.RunArguments,
    output: shared.OutputArguments,
) -> int:
    """Turn CAMs and SAM's segments into label masks.

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
        rules=RuleOptions(method, preset, alpha, uncovered, without_masks, min_confidence, paper),
        run=run.options(),
    )  # fmt: skip
    with run.console:
        done = run_sam_seed(options, run.start)
    if done.missing_file:
        run.console.warn(
            f"{counted(done.missing, 'image is', 'images are')} not in {masks}: labelled without masks "
            f"(--without-masks), listed in {done.missing_file}"
        )
    without = done.stats.counters["without"]
    summary = f"{made(done, 'masks')} ({done.method})"
    if done.method != "pixel" and without:
        summary += f", {without} of them from no segment"
    facts = {
        "source": str(done.source), "method": done.method, "missing": done.missing, "without_masks": without,
    }  # fmt: skip
    return run.finish(done, summary, facts, done.empty)
