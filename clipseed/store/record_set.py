"""Reading records: one mapping over a portable file or a folder of units."""

from __future__ import annotations

import os
import threading
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from clipseed.data.paths import is_file, is_folder, never_ends
from clipseed.data.stamps import FileStamp
from clipseed.errors import StoreError
from clipseed.store.layout import R
from clipseed.store.manifest import Manifest
from clipseed.store.names import UNIT_PATTERN, parts_of, unit_files
from clipseed.store.places import located
from clipseed.store.record_file import RecordFile

_VERIFY_BELOW = 256 << 20
F = TypeVar("F", bound=RecordFile[Any])
S = TypeVar("S", bound="RecordSet[Any, Any]")


@dataclass(frozen=True)
class _Opened(Generic[F]):
    """The files of a set, their manifest, where each id is (file and row), and the process that opened them."""

    files: list[F]
    manifest: Manifest
    rows: dict[str, tuple[int, int]]
    process: int


class RecordSet(Mapping[str, R], Generic[R, F]):
    """Records of a data set by sample id, in stored order.

    Safe to use after a fork, and survives pickling: each process opens the files for itself, when it first reads.
    Use as a context manager, or :meth:`close` it.

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
        self._place = path.absolute()
        self._opening = threading.Lock()
        self._opened: _Opened[F] | None = self._open(path, verify)

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path, "_place": self._place}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__dict__.update(state)
        self._opening = threading.Lock()
        self._opened = None

    @abstractmethod
    def _file(self, path: Path, *, verify: bool) -> F:
        """Open one file."""

    @abstractmethod
    def _check(self, manifest: Manifest, files: Sequence[F]) -> None:
        """Raise :class:`StoreError` where the manifest is not one of these records."""

    def _find(self, path: Path) -> list[Path]:
        if never_ends(path):
            raise StoreError(f"{path}: a pipe or a device, not {self.what}")
        if is_file(path):
            return [path]
        if is_folder(path):
            if units := unit_files(path):
                return units
            raise StoreError(f"{path}: no {self.content} in this folder (looked for {UNIT_PATTERN})")
        if is_folder(parts_of(path)):
            raise StoreError(
                f"{path}: not finished yet; unless it is being written just now, run the {self.maker} that writes it "
                "again: it resumes"
            )
        raise StoreError(f"{path}: {self.missing}")

    def _open(self, path: Path, verify: bool | None) -> _Opened[F]:
        paths = self._find(path)
        if verify is None:
            verify = sum(map(_bytes, paths)) < _VERIFY_BELOW
        files = self._open_files(paths, verify=verify)
        try:
            manifest = located(files[0].manifest, path)
            self._check(manifest, files)
            rows: dict[str, tuple[int, int]] = {}
            for number, file in enumerate(files):
                for row, identifier in enumerate(file.ids):
                    if rows.setdefault(identifier, (number, row)) != (number, row):
                        raise StoreError(f"{path}: the id {identifier!r} is stored twice")
        except StoreError:
            _close(files)
            raise
        return _Opened(files, manifest, rows, os.getpid())

    def _open_files(self, paths: Iterable[Path], *, verify: bool) -> list[F]:
        opened: list[F] = []
        try:
            for path in paths:
                opened.append(self._file(path, verify=verify))
        except StoreError:
            _close(opened)
            raise
        return opened

    @property
    def _here(self) -> _Opened[F]:
        """What this process has opened; a copy that came from another one opens its files now."""
        with self._opening:
            opened = self._opened
            if opened is None:
                opened = self._opened = self._open(self._place, verify=False)
            elif opened.process != os.getpid():
                files = self._open_files([file.path for file in opened.files], verify=False)
                opened = self._opened = replace(opened, files=files, process=os.getpid())
            return opened

    @property
    def manifest(self) -> Manifest:
        """What decided the content, with its places as they are now."""
        return self._here.manifest

    @property
    def files(self) -> list[F]:
        """The underlying files."""
        return self._here.files

    def stamp(self, identifier: str) -> FileStamp:
        """The file of an image as it was when its record was made, without reading the record."""
        file, row = self.place(identifier)
        return file.stamp(row)

    def place(self, identifier: str) -> tuple[F, int]:
        """The file that holds a record, and its row there."""
        here = self._here
        number, row = here.rows[identifier]
        return here.files[number], row

    def __getitem__(self, identifier: str) -> R:
        file, row = self.place(identifier)
        record: R = file.read(row)
        return record

    def __iter__(self) -> Iterator[str]:
        return iter(self._here.rows)

    def __len__(self) -> int:
        return len(self._here.rows)

    def close(self) -> None:
        """Close all files."""
        if self._opened is not None:
            _close(self._opened.files)

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(files: Iterable[RecordFile[Any]]) -> None:
    for file in files:
        file.close()


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
