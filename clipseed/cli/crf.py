"""``clipseed crf``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._groups import grouped
from clipseed.cli._run import made, prepare
from clipseed.defaults import CRF_ALPHA, CrfPreset, CrfSolver

_kernel_option = partial(typer.Option, rich_help_panel="Kernels (default: the preset's)")


@grouped(first=("source", "confidence", "alpha", "preset", "solver", "soft", "empty", "out", "device"))
def crf(
    *,
    source: Annotated[
        Optional[Path], typer.Argument(metavar="CAMS", help="CAMs (default: what the stage before left here).")
    ] = None,
    out: Annotated[Path, shared.output_option(help="Folder for the masks.")] = Path("pseudo"),
    solver: Annotated[CrfSolver, typer.Option(help="pydensecrf runs in worker processes, on CPUs.")] = "torch",
    preset: Annotated[CrfPreset, typer.Option(help="Whose published kernels.")] = "clip-es",
    confidence: Annotated[
        Optional[float], typer.Option(help="Less certain pixels become 255 (0.95 in the paper).")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Background score (1 - max) ** alpha.")] = CRF_ALPHA,
    soft: Annotated[
        Optional[Path], shared.output_option(help="Also keep the posterior as CAMs: NAME.h5 or a folder.")
    ] = None,
    empty: shared.Empty = "background",
    iterations: Annotated[Optional[int], _kernel_option(help="Mean-field steps.")] = None,
    smooth_xy: Annotated[Optional[float], _kernel_option(help="Position kernel: pixels.")] = None,
    smooth_weight: Annotated[Optional[float], _kernel_option(help="Its weight.")] = None,
    colour_xy: Annotated[Optional[float], _kernel_option(help="Colour kernel: pixels.")] = None,
    colour_rgb: Annotated[Optional[float], _kernel_option(help="Colour kernel: levels.")] = None,
    colour_weight: Annotated[Optional[float], _kernel_option(help="Its weight.")] = None,
    paper: Annotated[
        Optional[bool],
        typer.Option("--paper/--no-paper", help="The released code with its quirks (default: as the CAMs)."),
    ] = None,
    images: shared.MovedImages = None,
    root: shared.MovedRoot = None,
    device: shared.Device = "auto",
    running: shared.RunArguments,
    output: shared.OutputArguments,
) -> int:
    """Turn CAMs into label masks with a dense CRF over the classes present.

    Masks are palette PNG of the image's size: 0 background, class index + 1, and 255 where --confidence asks for it.
    """
    from clipseed.jobs.crf import CrfOptions, run_crf
    from clipseed.refine.crf import crf_parameters

    run = prepare("crf", running, output)
    parameters = crf_parameters(
        preset, iterations=iterations, smooth_xy=smooth_xy, smooth_weight=smooth_weight, colour_xy=colour_xy,
        colour_rgb=colour_rgb, colour_weight=colour_weight,
    )  # fmt: skip
    options = CrfOptions(
        source=run.source(source, "crf"), out=out, solver=solver, parameters=parameters, alpha=alpha,
        confidence=confidence, soft=soft, empty=empty, paper=paper, images=images, root=root,
        run=run.options(device=device),
    )  # fmt: skip
    with run.console:
        done = run_crf(options, run.start)
    facts = {"source": str(done.source), "solver": done.solver}
    return run.finish(done, made(done, "masks"), facts, done.empty)
