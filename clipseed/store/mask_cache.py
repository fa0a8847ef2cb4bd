"""Reading mask caches: one mapping over a portable file or a folder of shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from clipseed.data.paths import is_file, is_folder, never_ends
from clipseed.errors import StoreError
from clipseed.store.manifest import Manifest
from clipseed.store.mask_records import MaskRecord, mask_format
from clipseed.store.reader import SHARD_PATTERN
from clipseed.store.shard import RecordFile

_VERIFY_BELOW = 256 << 20
_PARTS = ("options", "model", "dataset", "vocabulary", "source")


class MaskCache(Mapping[str, MaskRecord]):
    """Masks of a data set: sample id to :class:`~clipseed.store.mask_records.MaskRecord`, in stored order.

    Safe to use after a fork: each process opens the files for itself. Use as a context manager, or :meth:`close` it.

    Args:
        path: A cache file, or a folder of shards.
        verify: Read everything and check the checksum first; by default for outputs below 256 MB. Without it, damage is
            found when the damaged record is read.

    Raises:
        StoreError: missing, unfinished, not a mask cache, or damaged.
    """

    def __init__(self, path: Path, *, verify: bool | None = None) -> None:
        self.path = path
        self._paths = _cache_files(path)
        if verify is None:
            verify = sum(file.stat().st_size for file in self._paths) < _VERIFY_BELOW
        self._files = self._open(verify)
        self._process = os.getpid()
        self.manifest: Manifest = self._files[0].manifest
        self._rows: dict[str, tuple[int, int]] = {}
        try:
            self._check()
        except StoreError:
            self.close()
            raise

    def _open(self, verify: bool) -> list[RecordFile[MaskRecord]]:
        opened: list[RecordFile[MaskRecord]] = []
        try:
            for path in self._paths:
                opened.append(RecordFile(path, mask_format(), verify=verify))
        except StoreError:
            for file in opened:
                file.close()
            raise
        return opened

    def _check(self) -> None:
        odd = [part for part in _PARTS if not isinstance(self.manifest.get(part), dict)]
        if odd:
            raise StoreError(f"{self.path}: damaged, its manifest has no {odd[0]!r}")
        for number, file in enumerate(self._files):
            for row, identifier in enumerate(file.ids):
                if self._rows.setdefault(identifier, (number, row)) != (number, row):
                    raise StoreError(f"{self.path}: the id {identifier!r} is stored twice")

    def __getitem__(self, identifier: str) -> MaskRecord:
        number, row = self._rows[identifier]
        return self.files[number].read(row)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def files(self) -> list[RecordFile[MaskRecord]]:
        """The underlying files."""
        if os.getpid() != self._process:
            self._files = self._open(verify=False)
            self._process = os.getpid()
        return self._files

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> MaskCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def holds_cache(path: Path) -> bool:
    """Whether a path is, or is going to be, a mask cache rather than masks in a foreign format."""
    if is_folder(path):
        return any(path.glob(SHARD_PATTERN))
    return path.suffix.lower() in {".h5", ".hdf5"}


def _cache_files(path: Path) -> list[Path]:
    if never_ends(path):
        raise StoreError(f"{path}: a pipe or a device, not a mask cache")
    if is_file(path):
        return [path]
    shards = sorted(path.glob(SHARD_PATTERN)) if is_folder(path) else []
    if shards:
        return shards
    if is_folder(path):
        raise StoreError(f"{path}: no masks in this folder (looked for {SHARD_PATTERN})")
    if is_folder(path.with_name(path.name + ".parts")):
        raise StoreError(f"{path}: not finished yet; run the clipseed sam-masks that writes it again, it resumes")
    raise StoreError(f"{path}: no such mask cache; clipseed sam-masks makes one")
