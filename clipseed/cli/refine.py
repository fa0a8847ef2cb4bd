"""``clipseed refine``: one command per refinement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._groups import grouped
from clipseed.cli._run import made, prepare
from clipseed.defaults import (
    BOX_THRESHOLD,
    CAA_LAYERS,
    COCO_BOX_THRESHOLD,
    PAR_DILATIONS,
    PAR_ITERATIONS,
    PAR_POSITION_WEIGHT,
    PAR_SHARPNESS,
    PATCH_TEMPERATURE,
    SINKHORN_ROUNDS,
    SPREAD_POWER,
    CaaPreset,
)

if TYPE_CHECKING:
    from clipseed.jobs.refine import Method


@dataclass(frozen=True, kw_only=True)
class SourceArguments:
    """What is refined, into what, and where its images are."""

    source: Annotated[
        Optional[Path],
        typer.Argument(metavar="CAMS", help="CAMs to refine (default: what the stage before left here)."),
    ] = None
    out: Annotated[
        Optional[Path], shared.output_option(help="NAME.h5 or a folder (default: NAME-METHOD.h5 beside the CAMs).")
    ] = None
    images: shared.MovedImages = None
    root: shared.MovedRoot = None


@dataclass(frozen=True, kw_only=True)
class AffinityArguments:
    """How maps are spread along attention."""

    box_threshold: Annotated[
        Optional[float],
        shared.method_option(
            help=f"Share of the peak that boxes enclose (default: {COCO_BOX_THRESHOLD} for COCO, else {BOX_THRESHOLD})."
        ),
    ] = None
    layers: Annotated[
        Optional[int],
        shared.method_option(
            help=f"Blocks from the end whose attention is averaged, at most all (default: {CAA_LAYERS})."
        ),
    ] = None
    rounds: Annotated[Optional[int], shared.method_option(help=f"Sinkhorn rounds (default: {SINKHORN_ROUNDS}).")] = None
    power: Annotated[
        Optional[int], shared.method_option(help=f"How often maps are spread (default: {SPREAD_POWER}).")
    ] = None
    boxes: Annotated[bool, shared.method_option("--boxes/--no-boxes", help="Spread from boxes around peaks only.")] = (
        True
    )
    weights: Annotated[
        Optional[str], shared.model_option(help="Where the same weights are now, if they have moved.")
    ] = None

    def parsed(self, preset: CaaPreset | None = None) -> dict[str, Any]:
        """As the job's options have them."""
        from clipseed.jobs.refine import fma_constants
        from clipseed.refine.caa import CaaOptions

        base = CaaOptions() if preset is None else fma_constants(preset)[0]
        given = shared.given(layers=self.layers, rounds=self.rounds, power=self.power)
        constants = replace(base, **given, boxes=self.boxes)
        return {"box_threshold": self.box_threshold, "weights": self.weights, "caa": constants}


@grouped
def caa(
    *,
    source: SourceArguments,
    preset: Annotated[
        Optional[CaaPreset],
        shared.method_option(
            metavar="PRESET",
            help=f"FMA-WSSS's constants, boxes as released; the result keeps its scale, for sam-seed: "
            f"{shared.listed(CaaPreset)}.",
        ),
    ] = None,
    affinity: AffinityArguments,
    paper: Annotated[
        Optional[bool],
        shared.method_option("--paper/--no-paper", help="The released code with its quirks (default: as the CAMs)."),
    ] = None,
    compute: shared.ComputeArguments,
    running: shared.RunArguments,
    output: shared.OutputArguments,
) -> int:
    """Class-aware attention affinity (CLIP-ES): spread maps along CLIP's attention.

    Without arguments it refines cams.h5 into cams-caa.h5, with the images and the model that cams.h5 was made with.
    """
    constants = affinity.parsed(preset)
    return _run("caa", source, running, output, compute.parsed(), paper=paper, preset=preset, **constants)


@grouped
def js(
    *,
    source: SourceArguments,
    temperature: Annotated[float, shared.method_option(help="Of the softmax over patches.")] = PATCH_TEMPERATURE,
    affinity: AffinityArguments,
    prompts: Annotated[
        Optional[Path], shared.model_option(help="Where the learned prompts of the CAMs are now, if they have moved.")
    ] = None,
    compute: shared.ComputeArguments,
    running: shared.RunArguments,
    output: shared.OutputArguments,
) -> int:
    """Class-distribution affinity (CD-CLIP): attention between patches that resemble all classes alike."""
    return _run(
        "js", source, running, output, compute.parsed(), temperature=temperature, prompts=prompts, **affinity.parsed()
    )


@grouped
def par(
    *,
    source: SourceArguments,
    iterations: Annotated[int, shared.method_option(help="20 in WeCLIP, 10 in AFA.")] = PAR_ITERATIONS,
    dilations: Annotated[str, shared.method_option(help="Distances of the neighbours in pixels.")] = ",".join(
        map(str, PAR_DILATIONS)
    ),
    sharpness: Annotated[float, shared.method_option(help="Smaller follows edges more closely.")] = PAR_SHARPNESS,
    position_weight: Annotated[
        float, shared.method_option(help="Weight of nearness beside likeness.")
    ] = PAR_POSITION_WEIGHT,
    device: shared.Device = "auto",
    batch_size: shared.BatchSize = "auto",
    running: shared.RunArguments,
    output: shared.OutputArguments,
) -> int:
    """Pixel-adaptive refinement (AFA, WeCLIP): maps follow the image's colours, at its full size.

    Needs no model. The result has one value per pixel and class, about 2 bytes each.
    """
    from clipseed.jobs.refine import ParOptions

    constants = ParOptions(iterations, shared.whole_numbers(dilations, "--dilations"), sharpness, position_weight)
    at_once = shared.auto_or_number(batch_size, "--batch-size")
    return _run("par", source, running, output, {"device": device, "batch_size": at_once}, par=constants)


def _run(
    method: Method, given: SourceArguments, running: shared.RunArguments, output: shared.OutputArguments,
    compute: dict[str, Any], **constants: Any,
) -> int:  # fmt: skip
    from clipseed.jobs.refine import RefineOptions, run_refine

    run = prepare(f"refine {method}", running, output)
    source = run.source(given.source, method, "refining")
    chosen = RefineOptions(
        method, source, out=given.out, images=given.images, root=given.root, run=run.options(**compute), **constants
    )
    with run.console:
        report = run_refine(chosen, run.start, run.loading)
    summary = f"{made(report, 'images', 'computed')} ({report.device})"
    return run.finish(report, summary, {"source": str(report.source), "device": report.device}, report.empty)
