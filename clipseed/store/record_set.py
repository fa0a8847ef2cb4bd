"""Reading records: one mapping over a portable file or a folder of units."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from clipseed.data.paths import is_file, is_folder, never_ends
from clipseed.data.stamps import FileStamp
from clipseed.errors import StoreError
from clipseed.store.layout import R
from clipseed.store.manifest import Manifest
from clipseed.store.places import located
from clipseed.store.record_file import RecordFile

UNIT_PATTERN = "unit-*.h5"
_VERIFY_BELOW = 256 << 20
F = TypeVar("F", bound=RecordFile[Any])
S = TypeVar("S", bound="RecordSet[Any, Any]")


class RecordSet(Mapping[str, R], Generic[R, F]):
    """Records of a data set by sample id, in stored order.

    Safe to use after a fork: each process opens the files for itself. Use as a context manager, or :meth:`close` it.

    Args:
        path: A file, or a folder of units.
        verify: Read everything and check the checksum first; by default for outputs below 256 MB. Without it, damage is
            found when the damaged record is read.

    Raises:
        StoreError: missing, unfinished, of another kind, or damaged.
    """

    what: str
    """One of them, for messages: ``a CAM file``."""
    content: str
    """What is in it."""
    maker: str
    """Which command writes it."""
    missing: str
    """What to say where there is none."""

    def __init__(self, path: Path, *, verify: bool | None = None) -> None:
        self.path = path
        self._paths = self._find(path)
        if verify is None:
            verify = sum(map(_bytes, self._paths)) < _VERIFY_BELOW
        self._files = self._open(verify)
        self._process = os.getpid()
        self.manifest: Manifest = located(self._files[0].manifest, path)
        self._rows: dict[str, tuple[int, int]] = {}
        try:
            self._check()
            for number, file in enumerate(self._files):
                for row, identifier in enumerate(file.ids):
                    if self._rows.setdefault(identifier, (number, row)) != (number, row):
                        raise StoreError(f"{path}: the id {identifier!r} is stored twice")
        except StoreError:
            self.close()
            raise

    @abstractmethod
    def _file(self, path: Path, *, verify: bool) -> F:
        """Open one file."""

    @abstractmethod
    def _check(self) -> None:
        """Raise :class:`StoreError` where the manifest is not one of these records."""

    def _find(self, path: Path) -> list[Path]:
        if never_ends(path):
            raise StoreError(f"{path}: a pipe or a device, not {self.what}")
        if is_file(path):
            return [path]
        if is_folder(path):
            if unit_files := sorted(path.glob(UNIT_PATTERN)):
                return unit_files
            raise StoreError(f"{path}: no {self.content} in this folder (looked for {UNIT_PATTERN})")
        if is_folder(path.with_name(path.name + ".parts")):
            raise StoreError(f"{path}: not finished yet; run the {self.maker} that writes it again, it resumes")
        raise StoreError(f"{path}: {self.missing}")

    def _open(self, verify: bool) -> list[F]:
        opened: list[F] = []
        try:
            for path in self._paths:
                opened.append(self._file(path, verify=verify))
        except StoreError:
            for file in opened:
                file.close()
            raise
        return opened

    @property
    def files(self) -> list[F]:
        """The underlying files."""
        if os.getpid() != self._process:
            self._files = self._open(verify=False)
            self._process = os.getpid()
        return self._files

    def stamp(self, identifier: str) -> FileStamp:
        """The file of an image as it was when its record was made, without reading the record."""
        file, row = self.place(identifier)
        return file.stamp(row)

    def place(self, identifier: str) -> tuple[F, int]:
        """The file that holds a record, and its row there."""
        number, row = self._rows[identifier]
        return self.files[number], row

    def __getitem__(self, identifier: str) -> R:
        file, row = self.place(identifier)
        record: R = file.read(row)
        return record

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
