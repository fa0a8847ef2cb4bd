"""``clipseed threshold``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._groups import grouped
from clipseed.cli._run import made, prepare


@grouped
def threshold(
    *,
    source: Annotated[
        Optional[Path], typer.Argument(metavar="CAMS", help="CAMs (default: what the stage before left here).")
    ] = None,
    threshold: Annotated[
        Optional[float], shared.method_option(help="Background score everywhere, 0 to below 1 (see clipseed evaluate).")
    ] = None,
    alpha: Annotated[
        Optional[float], shared.method_option(help="Or: background score (1 - max) ** alpha, as in CLIP-ES.")
    ] = None,
    out: Annotated[Path, shared.output_option(help="Folder for the masks.")] = Path("pseudo"),
    empty: shared.Empty = "background",
    images: shared.MovedImages = None,
    root: shared.MovedRoot = None,
    running: shared.RunArguments,
    output: shared.OutputArguments,
) -> int:
    """Turn CAMs into label masks as they are: each pixel gets its strongest class, or background.

    Exactly what clipseed evaluate scores at the same --threshold or --alpha. Masks are palette PNG of the image's size:
    0 background, class index + 1. Example:

      clipseed threshold --threshold 0.4
    """
    from clipseed.jobs.threshold import ThresholdOptions, run_threshold

    run = prepare("threshold", running, output)
    options = ThresholdOptions(
        source=run.source(source, "threshold"), out=out, threshold=threshold, alpha=alpha, empty=empty, images=images,
        root=root, run=run.options(),
    )  # fmt: skip
    with run.console:
        done = run_threshold(options, run.start)
    facts = {"source": str(done.source), "threshold": threshold, "alpha": alpha}
    return run.finish(done, made(done, "masks"), facts, done.empty)
