"""``clipseed refine``: one command per refinement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._groups import grouped
from clipseed.cli._run import prepare, rate
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
    layers: Annotated[int, shared.method_option(help="Blocks from the end whose attention is averaged.")] = CAA_LAYERS
    rounds: Annotated[int, shared.method_option(help="Sinkhorn rounds.")] = SINKHORN_ROUNDS
    power: Annotated[int, shared.method_option(help="How often maps are spread.")] = SPREAD_POWER
    boxes: Annotated[bool, shared.method_option("--boxes/--no-boxes", help="Spread from boxes around peaks only.")] = (
        True
    )
    weights: Annotated[
        Optional[str], shared.model_option(help="Where the same weights are now, if they have moved.")
    ] = None

    def parsed(self) -> dict[str, Any]:
        """As the job's options have them."""
        from clipseed.refine.caa import CaaOptions

        constants = CaaOptions(layers=self.layers, rounds=self.rounds, power=self.power, boxes=self.boxes)
        return {"box_threshold": self.box_threshold, "weights": self.weights, "caa": constants}


@grouped
def caa(
    *,
    source: SourceArguments,
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
    return _run("caa", source, running, output, compute.parsed(), paper=paper, **affinity.parsed())


@grouped
def js(
    *,
    source: SourceArguments,
    temperature: Annotated[float, shared.method_option(help="Of the softmax over patches.")] = PATCH_TEMPERATURE,
    affinity: AffinityArguments,
    compute: shared.ComputeArguments,
    running: shared.RunArguments,
    output: shared.OutputArguments,
) -> int:
    """Class-distribution affinity (CD-CLIP): attention between patches that resemble all classes alike."""
    return _run("js", source, running, output, compute.parsed(), temperature=temperature, **affinity.parsed())


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
    computed = report.stats.computed
    summary = (
        f"{report.out}: {report.done_before + computed} of {report.total} images, {computed} computed now"
        f"{rate(report)} ({report.device})"
    )
    return run.finish(report, summary, {"source": str(report.source), "device": report.device}, report.empty)
