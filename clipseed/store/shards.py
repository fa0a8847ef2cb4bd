"""Several runs on one output: each does its shard of the units, the last to finish puts everything together.

A shard is every n-th unit, so shards of ordered data (long videos, sorted sizes) take about equally long. Each run
locks its shard; a run of the whole, or one that counts other shards, is refused meanwhile. A run that is through leaves
a *report* (``shard-3-of-8.json``) in the output's folder; whoever finds the reports of all ends the work.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from clipseed.errors import StoreError
from clipseed.store.files import write_text

Skipped = list[tuple[str, str]]
"""Sample ids with the reason why each was left out."""
Empty = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Classes by sample id, and those of them that got no pixel."""
_PATIENCE = 3.0
"""Seconds: other runs of the same start may be looking at a lock at the same moment."""


@dataclass(frozen=True)
class Shard:
    """Shard ``index`` of ``count``, counted from 0."""

    index: int = 0
    count: int = 1

    @property
    def whole(self) -> bool:
        """Whether this is all there is to do."""
        return self.count == 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    @property
    def tag(self) -> str:
        """For file names: ``3-of-8``."""
        return f"{self.index + 1}-of-{self.count}"

    def takes(self, unit: int) -> bool:
        """Whether the unit with this number belongs to the shard."""
        return unit % self.count == self.index


WHOLE = Shard()


def lock_output(folder: Path, out: Path, shard: Shard) -> FileLock:
    """Lock an output, or a shard of it; the system releases the lock when the process ends, however it ends.

    Raises:
        StoreError: another run holds it, or a part of it that this run would touch too.
    """
    own = folder / ("lock" if shard.whole else f"lock-{shard.tag}")
    lock = FileLock(own)
    what = str(out) if shard.whole else f"{out}, shard {shard}"
    try:
        # Another run of the same start may be looking whether this lock is held; it lets go at once.
        lock.acquire(timeout=0 if shard.whole else _PATIENCE)
    except Timeout as error:
        raise StoreError(f"{what}: another run is writing it ({own} is locked); wait for it or stop it") from error
    for other in sorted(folder.glob("lock*")):
        same_start = not shard.whole and other.name.endswith(f"-of-{shard.count}")
        if other == own or same_start:
            continue
        try:
            with FileLock(other).acquire(timeout=_PATIENCE):
                pass
        except Timeout as error:
            lock.release()
            raise StoreError(
                f"{what}: another run is writing it ({other} is locked); wait for it or stop it"
            ) from error
    return lock


class ShardReports:
    """Which runs are through with their shards of an output."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._folder, self._shard = folder, shard

    def take_back(self) -> None:
        """Take back what an earlier run of this shard reported: it is being worked on again."""
        self._path(self._shard.index).unlink(missing_ok=True)

    def report(self, skipped: Sequence[tuple[str, str]], empty: Empty | None = None) -> Path:
        """Say that this shard is done, what it left out, and the labels of images that have no mask for being empty."""
        path = self._path(self._shard.index)
        rows = [[key, list(classes), list(gone)] for key, (classes, gone) in (empty or {}).items()]
        write_text(path, json.dumps({"skipped": list(skipped), "empty": rows}, indent=1))
        return path

    def reported(self) -> int:
        """How many shards are done."""
        return sum(self._path(index).is_file() for index in range(self._shard.count))

    def skipped(self) -> Skipped:
        """What all shards left out."""
        found: Skipped = []
        for index in range(self._shard.count):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                rows = json.loads(self._path(index).read_text(encoding="utf-8"))["skipped"]
                found += [(str(key), str(reason)) for key, reason in rows]
        return found

    def empty(self) -> Empty:
        """Images of all shards that have no mask because a label got no pixel."""
        return left_without_mask(self._folder)

    def remove(self) -> None:
        """Delete all reports and locks of shards: the work is put together."""
        for path in (*self._folder.glob("shard-*-of-*.json"), *self._folder.glob("lock-*-of-*")):
            path.unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self._folder / f"shard-{Shard(index, self._shard.count).tag}.json"


def left_without_mask(folder: Path) -> Empty:
    """Images that the shards at work in a folder left without a mask, because a label got no pixel."""
    found: Empty = {}
    for path in sorted(folder.glob("shard-*-of-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            rows = json.loads(path.read_text(encoding="utf-8"))["empty"]
            found |= {str(key): (tuple(classes), tuple(gone)) for key, classes, gone in rows}
    return found


def unit_number(path: Path) -> int:
    """Number of the unit that a file belongs to, finished or temporary; -1 where it is none."""
    found = re.search(r"unit-(\d+)(?:-\d+)?\.h5$", path.name)
    return int(found[1]) if found else -1
