"""What the outputs that are made of units have in common: one writer at a time, and which units are this run's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from filelock import FileLock

from clipseed.errors import StoreError
from clipseed.store.files import storage_errors
from clipseed.store.shards import Shard, ShardReports, lock_output
from clipseed.store.units import own_items

T = TypeVar("T")


class SharedOutput:
    """An output that several runs may share by shards; leaving its context lets go of the lock.

    Args:
        out: As it was given.
        folder: Where units are kept, and where the lock lies.
        unit_size: Samples per unit.
        shard: Which units are this run's.
    """

    def __init__(self, out: Path, folder: Path, unit_size: int, shard: Shard) -> None:
        self.out, self.folder = out, folder
        self._unit_size, self._shard = unit_size, shard
        self._reports = ShardReports(folder, shard)
        self._lock: FileLock | None = None
        self.notes: list[str] = []

    def own(self, items: Sequence[T]) -> list[T]:
        """Those of the data set's samples, or of their ids, that are this run's to do."""
        return own_items(items, self._unit_size, self._shard)

    def _acquire(self, option: str = "--out") -> None:
        """Make the folder, and lock it for this run's shard.

        Raises:
            StoreError: in use by another process, or not writable; ``option`` is what messages call the way out.
        """
        with storage_errors(self.folder, option):
            if not self.out.parent.is_dir():
                raise StoreError(f"{self.out}: the folder {self.out.parent} does not exist")
            self.folder.mkdir(exist_ok=True)
            self._lock = lock_output(self.folder, self.out, self._shard)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()
