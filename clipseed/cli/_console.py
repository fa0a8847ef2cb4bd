"""What the commands share in talking to people: stdout is data, stderr is progress and messages."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_WIDE = 100
"""Columns of a terminal that hold a whole line of progress."""


class Console:
    """Messages and progress of one command on stderr; ``quiet`` silences all but errors."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._rich = rich.console.Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, markup=False)
        self._progress: Progress | None = None

    def note(self, text: str) -> None:
        """One line for information."""
        if not self.quiet:
            self._rich.print(text)

    def warn(self, text: str) -> None:
        """One line for something the user should look at."""
        if not self.quiet:
            self._rich.print(f"warning: {text}", style="yellow")

    def track(self, title: str, total: int, detail: Callable[[], str] = lambda: "") -> Callable[[int], None]:
        """Show progress over ``total`` items; returns the function that advances it.

        On a terminal this is a bar, elsewhere a line every ten seconds.
        """
        if self.quiet or total == 0:
            return lambda count: None
        if self._rich.is_terminal and not self._rich.is_dumb_terminal:
            return self._bar(title, total, detail)
        return self._lines(title, total, detail)

    def _bar(self, title: str, total: int, detail: Callable[[], str]) -> Callable[[int], None]:
        # What does not fit would be cut in the middle of a number: the bar goes first, then what the time is spent on.
        narrow = self._rich.width < _WIDE
        columns = (
            TextColumn("{task.description}"),
            *(() if narrow else (BarColumn(),)),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        progress = self._progress = Progress(*columns, console=self._rich, transient=True)
        progress.start()
        task = progress.add_task(title, total=total, rate="")
        began = time.perf_counter()

        def advance(count: int) -> None:
            done = progress.tasks[0].completed + count
            rate = done / max(1e-9, time.perf_counter() - began)
            progress.update(task, advance=count, rate=f"{speed(rate)} {'' if narrow else detail()}".rstrip())
            if done >= total:
                self.close()

        return advance

    def _lines(self, title: str, total: int, detail: Callable[[], str]) -> Callable[[int], None]:
        began = last = time.perf_counter()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.perf_counter()
            if now - last >= 10 or (done >= total and now - began >= 10):
                last = now
                rate = done / (now - began)
                left = (total - done) / rate
                self.note(f"{title} {done}/{total}, {speed(rate)}, {duration(left)} left {detail()}".rstrip())

        return advance

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the progress bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def speed(per_second: float) -> str:
    """``4.5 images/s``, or how long each one takes where that is more than two seconds."""
    return f"{per_second:.1f} images/s" if per_second >= 0.5 else f"{1 / max(1e-9, per_second):.1f} s each"


def duration(seconds: float) -> str:
    """Seconds for people: ``42 s``, ``3 min 5 s``, ``2 h 40 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def print_json(data: Any) -> None:
    """Write one JSON document to stdout."""
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=True, allow_nan=False) + "\n")
    sys.stdout.flush()


class TableRows:
    """Aligned columns on stdout, row by row: the first to the left, the others to the right; plain text, safe to pipe.

    ``widths`` are the least ones; rows of the same table that are known later may be wider and stand out.
    """

    def __init__(self, header: Sequence[str], widths: Sequence[int]) -> None:
        self._widths = [max(len(name), width) for name, width in zip(header, widths, strict=True)]
        self.add(header)
        self.add(["-" * width for width in self._widths])

    def add(self, row: Sequence[str]) -> None:
        """Write one row."""
        first, *others = zip(row, self._widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
        sys.stdout.flush()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table whose rows are all known."""
    table = TableRows(header, [max((len(row[k]) for row in rows), default=0) for k in range(len(header))])
    for row in rows:
        table.add(row)


def percent(fraction: float | None) -> str:
    """``0.4567`` to ``45.67``; no value to ``-``."""
    return "-" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.2f}"
