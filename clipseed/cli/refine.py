"""``clipseed refine``: one command per refinement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from clipseed.cli import options as shared
from clipseed.cli.console import Talker, print_json, some

if TYPE_CHECKING:
    from clipseed.jobs.refine_options import RefineOptions, RefineReport
    from clipseed.runtime.stream import StreamStats

METHOD = "Method"

Source = Annotated[
    Optional[Path],
    typer.Argument(help="Seeds to refine (default: what the stage before left here).", show_default=False),
]
Out = Annotated[
    Optional[Path],
    typer.Option(help="NAME.h5 or a folder (default: NAME-METHOD.h5 beside the seeds).", rich_help_panel=shared.OUTPUT),
]
Images = Annotated[
    Optional[Path], typer.Option(help="Where the pictures are now, if they have moved.", rich_help_panel=shared.DATA)
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
    images: Images = None,
    weights: Weights = None,
    device: shared.Device = "auto",
    precision: shared.Precision = "auto",
    batch_size: shared.BatchSize = "auto",
    workers: shared.Workers = "auto",
    overwrite: shared.Overwrite = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> int:
    """Class-aware attention affinity (CLIP-ES): spread maps along CLIP's attention.

    Without arguments it refines cams.h5 into cams-caa.h5, with the pictures and the model that cams.h5 was made with.
    """
    from clipseed.refine.caa import CaaOptions

    constants = CaaOptions(layers=layers, rounds=rounds, power=power, boxes=boxes)
    return _run(
        "caa", source, quiet, json, out=out, box_threshold=box_threshold, caa=constants, paper=paper, images=images,
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
    images: Images = None,
    weights: Weights = None,
    device: shared.Device = "auto",
    precision: shared.Precision = "auto",
    batch_size: shared.BatchSize = "auto",
    workers: shared.Workers = "auto",
    overwrite: shared.Overwrite = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> int:
    """Class-distribution affinity (CD-CLIP): attention between patches that resemble all classes alike."""
    from clipseed.refine.caa import CaaOptions

    constants = CaaOptions(layers=layers, rounds=rounds, power=power, boxes=boxes)
    return _run(
        "js", source, quiet, json, out=out, box_threshold=box_threshold, caa=constants, temperature=temperature,
        images=images, weights=weights, device=device, precision=precision, batch_size=batch_size, workers=workers,
        overwrite=overwrite,
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
    images: Images = None,
    device: shared.Device = "auto",
    batch_size: shared.BatchSize = "auto",
    workers: shared.Workers = "auto",
    overwrite: shared.Overwrite = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> int:
    """Pixel-adaptive refinement (AFA, WeCLIP): maps follow the picture's colours, at its full size.

    Needs no model. The result has one value per pixel and class, about 2 bytes each.
    """
    from clipseed.jobs.refine_options import ParOptions

    steps = tuple(int(step) for step in shared.numbers(dilations, "--dilations"))
    constants = ParOptions(iterations, steps, sharpness, position_weight)
    return _run(
        "par", source, quiet, json, out=out, par=constants, images=images, device=device, batch_size=batch_size,
        workers=workers, overwrite=overwrite,
    )  # fmt: skip


def _run(method: str, source: Path | None, quiet: bool, json: bool, **given: Any) -> int:
    from clipseed.jobs.refine import run_refine
    from clipseed.jobs.refine_options import RefineOptions
    from clipseed.jobs.stages import newest_output

    talker = Talker(quiet)
    if source is None:
        source = newest_output(Path(), method)
        talker.note(f"refining {source}")
    given["batch_size"] = shared.auto_or_number(given["batch_size"], "--batch-size")
    given["workers"] = shared.auto_or_number(given["workers"], "--workers")
    options = RefineOptions(cast("Any", method), source, **given)
    try:
        report = run_refine(options, lambda todo, done: _start(talker, options, todo, done))
    finally:
        talker.close()
    _tell(talker, report)
    if json:
        print_json(_as_dict(report))
    return 3 if report.stats.skipped else 0


def _start(talker: Talker, options: RefineOptions, todo: int, done: int) -> Any:
    talker.note(f"{options.method}: {todo} pictures to do" + (f", {done} done already" if done else ""))
    current: list[StreamStats] = []
    track = talker.track(options.method, todo, lambda: f"(limited by {current[0].bottleneck})" if current else "")

    def advance(count: int, stats: StreamStats) -> None:
        current[:] = [stats]
        track(count)

    return advance


def _tell(talker: Talker, report: RefineReport) -> None:
    for note in report.notes:
        talker.warn(note)
    if report.stats.out_of_memory:
        before, after = report.stats.out_of_memory
        talker.warn(f"out of memory with {before} pictures at once; went on with {after} (--batch-size {after})")
    if report.recomputed:
        talker.warn(f"{report.recomputed} pictures gave NaN or infinity in half precision and were computed in fp32")
    skipped = report.stats.skipped
    if skipped:
        talker.warn(f"{len(skipped)} pictures skipped: {some([f'{key} ({why})' for key, why in skipped], 3)}")
        talker.warn(f"all of them are listed in {report.skipped_file}")
    computed = report.stats.computed
    rate = f" in {report.seconds:.1f} s, {computed / report.seconds:.1f} images/s" if computed else ""
    talker.note(
        f"{report.out}: {report.found + computed} of {report.total} pictures, {computed} computed now{rate} "
        f"({report.device})"
    )


def _as_dict(report: RefineReport) -> dict[str, Any]:
    return {
        "source": str(report.source),
        "out": str(report.out),
        "images": report.total,
        "found": report.found,
        "computed": report.stats.computed,
        "skipped": [{"id": key, "reason": why} for key, why in report.stats.skipped],
        "recomputed_in_fp32": report.recomputed,
        "seconds": round(report.seconds, 3),
        "device": report.device,
    }
