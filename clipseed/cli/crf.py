"""``clipseed crf``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from clipseed.cli import options as shared
from clipseed.cli.console import Talker, print_json, some

if TYPE_CHECKING:
    from clipseed.jobs.crf import CrfReport
    from clipseed.runtime.stream import StreamStats

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
    engine: Annotated[str, typer.Option(help="torch, or pydensecrf in worker processes.")] = "torch",
    preset: Annotated[str, typer.Option(help="clip-es, irn or weclip: their published kernels.")] = "clip-es",
    confidence: Annotated[
        Optional[float], typer.Option(help="Less certain pixels become 255 (0.95 in the paper).", show_default=False)
    ] = None,
    alpha: Annotated[float, typer.Option(help="Background score (1 - max) ** alpha.")] = 1.0,
    soft: Annotated[
        Optional[Path],
        typer.Option(help="Also keep the posterior as seeds: NAME.h5 or a folder.", rich_help_panel=shared.OUTPUT),
    ] = None,
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
    images: Annotated[
        Optional[Path],
        typer.Option(help="Where the pictures are now, if they have moved.", rich_help_panel=shared.DATA),
    ] = None,
    device: shared.Device = "auto",
    workers: shared.Workers = "auto",
    overwrite: shared.Overwrite = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> int:
    """Turn seeds into label masks with a dense CRF over the classes present.

    Masks are palette PNG of the picture's size: 0 background, class index + 1, and 255 where --confidence asks for it.
    """
    from clipseed.jobs.crf import CrfOptions, run_crf
    from clipseed.jobs.stages import newest_output
    from clipseed.refine.crf import crf_parameters

    talker = Talker(quiet)
    if source is None:
        source = newest_output(Path(), "crf")
        talker.note(f"reading {source}")
    parameters = crf_parameters(
        preset, iterations=iterations, smooth_xy=smooth_xy, smooth_weight=smooth_weight, colour_xy=colour_xy,
        colour_rgb=colour_rgb, colour_weight=colour_weight,
    )  # fmt: skip
    options = CrfOptions(
        source=source, out=out, engine=cast("Any", engine), parameters=parameters, alpha=alpha, confidence=confidence,
        soft=soft, paper=paper, images=images, device=device,
        workers=shared.auto_or_number(workers, "--workers"), overwrite=overwrite,
    )  # fmt: skip
    try:
        report = run_crf(options, lambda todo, done: _start(talker, todo, done))
    finally:
        talker.close()
    _tell(talker, report)
    if json:
        print_json(_as_dict(report))
    return 3 if report.stats.skipped else 0


def _start(talker: Talker, todo: int, done: int) -> Any:
    talker.note(f"crf: {todo} pictures to do" + (f", {done} done already" if done else ""))
    track = talker.track("crf", todo)

    def advance(count: int, stats: StreamStats) -> None:
        track(count)

    return advance


def _tell(talker: Talker, report: CrfReport) -> None:
    for note in report.notes:
        talker.warn(note)
    skipped = report.stats.skipped
    if skipped:
        talker.warn(f"{len(skipped)} pictures skipped: {some([f'{key} ({why})' for key, why in skipped], 3)}")
        talker.warn(f"all of them are listed in {report.skipped_file}")
    computed = report.stats.computed
    rate = f" in {report.seconds:.1f} s, {computed / report.seconds:.1f} images/s" if computed else ""
    unsure = f", {100 * report.unsure:.1f} % of the pixels are 255" if report.unsure else ""
    talker.note(f"{report.out}: {report.found + computed} of {report.total} masks, {computed} made now{rate}{unsure}")


def _as_dict(report: CrfReport) -> dict[str, Any]:
    return {
        "source": str(report.source),
        "out": str(report.out),
        "images": report.total,
        "found": report.found,
        "computed": report.stats.computed,
        "skipped": [{"id": key, "reason": why} for key, why in report.stats.skipped],
        "ignored_share": report.unsure,
        "seconds": round(report.seconds, 3),
        "engine": report.engine,
    }
