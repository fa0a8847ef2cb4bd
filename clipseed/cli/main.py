"""The ``clipseed`` program: its table of contents, and the way from exceptions to exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from clipseed import __version__
from clipseed.cli._options import with_values
from clipseed.cli.cam import cam
from clipseed.cli.crf import crf
from clipseed.cli.demo import demo
from clipseed.cli.doctor import doctor
from clipseed.cli.evaluate import evaluate
from clipseed.cli.inspect import inspect
from clipseed.cli.merge import merge
from clipseed.cli.prompts import prompts
from clipseed.cli.refine import caa, js, par
from clipseed.cli.report import report
from clipseed.cli.sam_masks import sam_masks
from clipseed.cli.sam_seed import sam_seed
from clipseed.errors import ClipseedError
from clipseed.runtime.threads import let_waiting_threads_sleep

EXIT_CODES = """Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but some inputs were skipped or not scored;
130 and 143 interrupted (the same command goes on)."""


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
_refine = typer.Typer(help="Refine seeds: spread them along attention, or along colours.", no_args_is_help=True)

app.command("cam")(cam)
app.add_typer(_refine, name="refine")
_refine.command("caa")(caa)
_refine.command("js")(js)
_refine.command("par")(par)
app.command("crf")(crf)
app.command("sam-masks")(sam_masks)
app.command("sam-seed")(sam_seed)
app.command("merge")(merge)
app.command("evaluate")(evaluate)
app.command("report")(report)
app.command("inspect")(inspect)
app.command("prompts")(prompts)
app.command("demo")(demo)
app.command("doctor")(doctor)


@app.callback()
def _program(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_show_version, is_eager=True),
) -> None:
    """Segmentation pseudo-labels from image-level labels, with frozen CLIP and optionally SAM."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    _prepare_streams()
    try:
        result = app(with_values(words), standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except ClipseedError as error:
        return _fail(str(error), error.exit_code, debug)
    except BrokenPipeError:
        return _reader_left()
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            _reader_left()
            return _fail("the disk that the output goes to is full; free some space", 1, debug)
        if error.filename is None:
            return _fault(error, debug)
        # The system's own words about a file, for those that no command expects.
        return _fail(f"{error.filename}: {error.strerror}", 1, debug)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, debug)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # Typer catches it first
            return _reader_left()
        return error.code if isinstance(error.code, int) else 1
    except Exception as error:
        if _is_usage_error(error):
            error.show()  # type: ignore[attr-defined]
            return 2
        if type(error).__name__ == "Abort":
            return _fail("interrupted", 130, debug)
        return _fault(error, debug)


def _prepare_streams() -> None:
    """Let every message be written, whatever the terminal's encoding, and somewhere, whatever the shell closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fault(error: Exception, debug: bool) -> int:
    return _fail(
        f"{type(error).__name__}: {error}. This is a fault in clipseed; please report it with what "
        "the same command prints with --debug",
        1,
        debug,
    )


def _reader_left() -> int:
    """The reader of our output went away (``| head``). Nothing is wrong; keep Python from complaining at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    return 0


def _is_usage_error(error: Exception) -> bool:
    """Typer's own complaints about options, whichever Click they come from."""
    return any(kind.__name__ == "ClickException" for kind in type(error).__mro__)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    sys.stderr.write(f"error: {message}\n")
    return code


def run() -> None:
    """Entry point of the installed script."""
    let_waiting_threads_sleep()
    sys.exit(main())
