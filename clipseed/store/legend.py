"""The legend of label masks: which value is which class, in which color, as a table beside them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from clipseed.formats.palette import css_color
from clipseed.store.files import csv_text, write_text
from clipseed.types import IGNORE

LEGEND = "classes.csv"
_HEAD = ("value", "name", "color")


def legend(names: Iterable[str], background: str = "background") -> str:
    """CSV ``value,name,color``: the background, the classes by mask value, and 255; colors as ``#rrggbb``."""
    rows = [(0, background), *enumerate(names, 1), (IGNORE, "ignore")]
    return csv_text(_HEAD, ((value, name, css_color(value)) for value, name in rows))


def write_legend(folder: Path, names: Iterable[str], background: str = "background") -> None:
    """Put the legend into a folder; a file of its name that is no legend is somebody's own, and stays.

    Raises:
        StoreError: it cannot be written.
    """
    path, wanted = folder / LEGEND, legend(names, background)
    try:
        there: str | None = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = None
    except (OSError, ValueError):
        return
    if there is None or (there != wanted and there.startswith(",".join(_HEAD))):
        write_text(path, wanted)
