"""The way from exceptions to messages and exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from pathlib import Path

from clipseed.errors import ClipseedError


def code_of(error: BaseException, *, debug: bool) -> int:
    """Say what went wrong, in one line, and give the exit code; ``debug`` shows the traceback of the error at hand."""
    if isinstance(error, ClipseedError):
        return _fail(str(error), error.exit_code, debug)
    # Typer catches a broken pipe first, and exits.
    if isinstance(error, BrokenPipeError) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
    ):
        return _reader_left()
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, OSError) and error.filename is not None:
        # The system's own words about a file, for those that no command expects.
        return _fail(f"{error.filename}: {error.strerror}", 1, debug)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _reader_left()
        return _fail("the disk that the output goes to is full; free some space", 1, debug)
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return _fail("interrupted", 130, debug)
    if _is_usage_error(error):
        error.show()  # type: ignore[attr-defined]
        return 2
    fault = "This is a fault in clipseed; please report it with what the same command prints with --debug"
    return _fail(f"{type(error).__name__}: {error}. {fault}", 1, debug)


def prepare_streams() -> None:
    """Let every message be written, whatever the terminal's encoding, and somewhere, whatever the shell closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _reader_left() -> int:
    """The reader of our output went away (``| head``). Nothing is wrong; keep Python from complaining at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    return 0


def _is_usage_error(error: BaseException) -> bool:
    """Typer's own complaints about options, whichever Click they come from."""
    return any(kind.__name__ == "ClickException" for kind in type(error).__mro__)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"error: {message}\n")
    return code
