"""The ``clipseed`` program: its table of contents."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

import typer

from clipseed.cli._exit import code_of, prepare_streams
from clipseed.cli._groups import Command
from clipseed.cli._options import with_values
from clipseed.cli.cam import cam
from clipseed.cli.crf import crf
from clipseed.cli.demo import demo
from clipseed.cli.doctor import doctor
from clipseed.cli.evaluate import evaluate
from clipseed.cli.export import export
from clipseed.cli.export_model import export_model
from clipseed.cli.inspect import inspect
from clipseed.cli.label import label
from clipseed.cli.merge import merge
from clipseed.cli.models import models
from clipseed.cli.predict import predict
from clipseed.cli.prompts import prompts
from clipseed.cli.refine import caa, js, par
from clipseed.cli.report import report
from clipseed.cli.reproduce import reproduce
from clipseed.cli.sam_masks import sam_masks
from clipseed.cli.sam_seed import sam_seed
from clipseed.cli.threshold import threshold
from clipseed.cli.train_bridge import bridge
from clipseed.cli.train_prompts import prompts as train_prompts
from clipseed.cli.train_weclip import weclip
from clipseed.cli.try_photo import try_photo
from clipseed.runtime.threads import let_waiting_threads_sleep
from clipseed.version import __version__

EXIT_CODES = (
    "Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but some inputs were skipped or not scored; 130 and 143 "
    "interrupted (the same command goes on)."
)

START, STEPS = "From images to labels", "The same, step by step"
LEARN, LOOK = "Segmenters and published systems", "What came of it"


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"clipseed {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="clipseed",
    help="Segmentation pseudo-labels from image-level labels, with frozen CLIP and optionally SAM.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_refine = typer.Typer(help="Refine CAMs: spread them along attention, or along colours.", no_args_is_help=True)
_train = typer.Typer(help="Train a segmenter, or prompts, with the help of a frozen CLIP.", no_args_is_help=True)

app.command("label", cls=Command, rich_help_panel=START)(label)
app.command("try", cls=Command, rich_help_panel=START)(try_photo)
app.command("demo", cls=Command, rich_help_panel=START)(demo)
app.command("doctor", cls=Command, rich_help_panel=START)(doctor)
app.command("models", cls=Command, rich_help_panel=START)(models)
app.command("cam", cls=Command, rich_help_panel=STEPS)(cam)
app.add_typer(_refine, name="refine", rich_help_panel=STEPS)
_refine.command("caa", cls=Command)(caa)
_refine.command("js", cls=Command)(js)
_refine.command("par", cls=Command)(par)
app.command("threshold", cls=Command, rich_help_panel=STEPS)(threshold)
app.command("crf", cls=Command, rich_help_panel=STEPS)(crf)
app.command("sam-masks", cls=Command, rich_help_panel=STEPS)(sam_masks)
app.command("sam-seed", cls=Command, rich_help_panel=STEPS)(sam_seed)
app.command("merge", cls=Command, rich_help_panel=STEPS)(merge)
app.command("prompts", cls=Command, rich_help_panel=STEPS)(prompts)
app.add_typer(_train, name="train", rich_help_panel=LEARN)
_train.command("weclip", cls=Command)(weclip)
_train.command("prompts", cls=Command)(train_prompts)
_train.command("bridge", cls=Command)(bridge)
app.command("predict", cls=Command, rich_help_panel=LEARN)(predict)
app.command("export-model", cls=Command, rich_help_panel=LEARN)(export_model)
app.command("reproduce", cls=Command, rich_help_panel=LEARN)(reproduce)
app.command("evaluate", cls=Command, rich_help_panel=LOOK)(evaluate)
app.command("report", cls=Command, rich_help_panel=LOOK)(report)
app.command("inspect", cls=Command, rich_help_panel=LOOK)(inspect)
app.command("export", cls=Command, rich_help_panel=LOOK)(export)


@app.callback()
def _program(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_show_version, is_eager=True),
) -> None:
    """Segmentation pseudo-labels from image-level labels, with frozen CLIP and optionally SAM."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    try:
        result = app(with_values(words), standalone_mode=False)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return code_of(error, debug="--debug" in words)
    return result if isinstance(result, int) else 0


def run() -> None:
    """Entry point of the installed script."""
    let_waiting_threads_sleep()
    code = main()
    # When it ends, Python searches all that is left for garbage: with torch imported that takes a second, for nothing.
    gc.freeze()
    sys.exit(code)
