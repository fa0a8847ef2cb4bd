"""What the training commands share: how crops are drawn, progress, and how it went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Optional

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, percent, print_json
from clipseed.cli._run import exit_code, tell_skipped
from clipseed.wording import counted

if TYPE_CHECKING:
    from clipseed.train.loop import Status
    from clipseed.train.running import TrainReport


@dataclass(frozen=True, kw_only=True)
class CropArguments:
    """How segmenters' crops are drawn; a method's own constants come on top."""

    scales: Annotated[
        Optional[str],
        shared.method_option(help="Range of the random factor on an image's sides (default: 0.5,2)."),
    ] = None
    mirror: Annotated[Optional[float], shared.method_option(help="Probability of the mirror image (default: 0.5).")] = (
        None
    )

    def chosen(self) -> dict[str, Any]:
        """The constants that were given."""
        given = shared.given(**vars(self))
        if self.scales is not None:
            given["scales"] = shared.numbers(self.scales, "--scales")
        return given


def run_training(
    run: Callable[[Callable[[Status], None], Callable[[str], None]], TrainReport], allow_skipped: str | None,
    output: shared.OutputArguments,
) -> int:  # fmt: skip
    """Train, tell how it went, and give the exit code; one process of torchrun's talks."""
    from clipseed.train.running import first_process

    allowed = shared.allowed_skips(allow_skipped)
    console = Console(output.quiet or not first_process())
    with console:
        done = run(lambda status: console.note(str(status)), console.note)
    return _finish(console, done, allowed, output) if first_process() else 0


def _finish(console: Console, done: TrainReport, allowed: float, output: shared.OutputArguments) -> int:
    """Tell how it went, and give the exit code."""
    tell_skipped(console, list(done.skipped.items()), done.skipped_file)
    best = ""
    if done.best is not None and done.best_out is not None:
        best = f"; {done.best_out}: step {done.best['step']} with mIoU {percent(done.best['score'])}"
    console.note(
        f"{done.out}: {counted(done.steps, 'step')} on {counted(done.images, 'image')} "
        f"({done.model['weights']}, {done.device}){best}"
    )
    if output.json:
        print_json(
            {
                "out": str(done.out), "training": str(done.folder), "steps": done.steps, "images": done.images,
                "best": None if done.best is None else {**done.best, "file": str(done.best_out)},
                "model": dict(done.model), "device": done.device, "left_out": list(done.unlabelled),
                "skipped": [{"id": key, "reason": why} for key, why in done.skipped.items()],
            }
        )  # fmt: skip
    return exit_code(console, len(done.skipped), allowed)
