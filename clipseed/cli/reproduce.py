"""``clipseed reproduce``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, TableRows, print_json
from clipseed.cli._groups import grouped
from clipseed.defaults import ReproduceDataset, ReproducedSystem
from clipseed.wording import counted

if TYPE_CHECKING:
    from clipseed.jobs.reproduce import Scored, Step


@grouped
def reproduce(
    *,
    system: Annotated[ReproducedSystem, typer.Argument(metavar="SYSTEM", help="clip-es, weclip or fma-wsss.")],
    dataset: Annotated[
        ReproduceDataset, shared.data_option(help="voc, coco, or toy, whose numbers nobody has published.")
    ] = "voc",
    root: Annotated[Optional[Path], shared.data_option(help="Folder of the data set.")] = None,
    limit: Annotated[
        Optional[int], shared.data_option(help="A rehearsal: only the first N images of each split.", min=1)
    ] = None,
    steps: Annotated[Optional[int], shared.train_option(help="A rehearsal: train so many steps only.", min=1)] = None,
    weights: Annotated[
        Optional[str], shared.model_option(help="CLIP's weights (default: openai, as published; toy for toy).")
    ] = None,
    checkpoint: Annotated[Optional[str], shared.model_option(help="SAM's weights (fma-wsss).")] = None,
    device: shared.Device = "auto",
    out: Annotated[
        Optional[Path], shared.output_option(help="Folder for all outputs (default: reproduce-SYSTEM-DATASET).")
    ] = None,
    output: shared.OutputArguments,
) -> int:
    """Run a system's published protocol with its published settings, each number beside the paper's.

    Interrupt it and run it again: it goes on where it stopped. The exit code is 3 where a number is not within what the
    paper and independent users of the authors' code report. Example:

      clipseed reproduce clip-es --dataset voc --root VOCdevkit/VOC2012
    """
    from clipseed.jobs.reproduce import ReproduceOptions, run_reproduce

    console = Console(output.quiet)
    place = out or Path(f"reproduce-{system}-{dataset}")
    options = ReproduceOptions(system, dataset, place, root, weights, checkpoint, device, limit, steps)
    columns = ("step", "split", "images", "mIoU %", "paper", "within", "")
    table = None if output.json else TableRows(columns, (26, 9, 6, 6, 5, 11, 9))
    quiet = ["--quiet"] if output.quiet else []

    def begin(number: int, of: int, step: Step) -> None:
        console.note(f"{number}/{of} {step.title}: clipseed {' '.join(step.words)}".replace("{out}", str(place)))

    def tell(score: Scored) -> None:
        if table is not None:
            table.add(_row(score))

    done = run_reproduce(options, lambda words: _run([*words, *quiet]), begin, tell)
    if output.json:
        print_json(
            {
                "file": str(done.file), "steps_with_skipped_images": list(done.skipped),
                "scores": [{**vars(score), "published": score.published and vars(score.published)}
                           for score in done.scores],
            }
        )  # fmt: skip
    for title in done.skipped:
        console.warn(f"{title}: images were left out, so its number is not that of the whole split")
    hashes = sorted({score.weights[:16] for score in done.scores if score.weights})
    console.note(f"{done.file}: the numbers; weights {', '.join(f'{digest}…' for digest in hashes) or 'unknown'}")
    if options.rehearsal:
        console.note("a rehearsal, not the published protocol: no number was judged")
    if done.outside:
        names = ", ".join(score.step for score in done.outside)
        console.warn(f"{counted(len(done.outside), 'number')} outside of what is published: {names}")
    return 3 if done.outside or done.skipped else 0


def _run(words: Sequence[str]) -> int:
    """One command in a process of its own, so that its memory is free for the next; all it says goes to stderr."""
    done = subprocess.run([sys.executable, "-m", "clipseed", *words], stdout=sys.stderr, check=False)  # noqa: S603
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


def _row(score: Scored) -> tuple[str, ...]:
    paper, band = "-", "-"
    if score.published is not None:
        low, high = score.published.band
        paper, band = f"{score.published.miou:.1f}", f"{low:.1f}-{high:.1f}"
    verdict = {None: "", True: "inside", False: "OUTSIDE"}[score.inside]
    return (score.step, score.split, str(score.images), f"{score.miou:.2f}", paper, band, verdict)
