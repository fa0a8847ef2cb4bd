"""``metrics.jsonl``: one row of numbers for each step, none missing and none twice, whenever a run was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipseed.store.files import replacing, storage_errors

METRICS = "metrics.jsonl"
Row = Mapping[str, Any]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows, in the order of their steps; a last line that a kill cut off is left out. Empty without a file."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def cut_metrics(path: Path, step: int) -> None:
    """Keep the rows up to ``step``: those behind it are of steps that a checkpoint does not hold and that run again."""
    kept = [_line(row) for row in read_metrics(path) if row["step"] <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def append_metrics(path: Path, rows: Sequence[Row]) -> None:
    """Add rows, and wait until they are on the disk: a checkpoint never knows steps that the rows do not.

    Raises:
        StoreError: the disk is full, or the like.
    """
    with storage_errors(path), path.open("a", encoding="utf-8") as stream:
        stream.write("".join(_line(row) for row in rows))
        stream.flush()
        os.fsync(stream.fileno())


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
