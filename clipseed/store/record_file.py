"""Single record files: writing one atomically, and reading records from one."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import h5py
import numpy as np
import numpy.typing as npt

from clipseed.data.stamps import FileStamp
from clipseed.errors import StoreError
from clipseed.store import layout
from clipseed.store.cam_records import Cam, cam_format, classes_of
from clipseed.store.files import replacing, storage_errors
from clipseed.store.layout import R, RecordFormat

_BLOCK = 4096
_LIBVER = ("v110", "v110")
"""HDF5 1.10 (2016) and later put checksums on their own structures: damage is an error instead of a crash."""


def write_unit(path: Path, manifest: str, records: Sequence[R], form: RecordFormat[R]) -> None:
    """Write a few records as one file, atomically. The same arguments give the same bytes.

    The file is put together in memory: HDF5 does not fail cleanly on a full disk, plain writing does.

    Raises:
        StoreError: it cannot be written there.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=_LIBVER) as file:
        _fill(file, manifest, records, form, _id_bytes(record.id for record in records))
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def write_portable(
    path: Path, manifest: str, records: Iterable[R], form: RecordFormat[R], ids: Iterable[str], size: int
) -> None:
    """Write any number of records as one file, atomically, holding few of them in memory.

    Args:
        path: The file.
        manifest: As stored.
        records: In their final order.
        form: Their format.
        ids: Their ids.
        size: About how many bytes it will take; a disk with less room is refused before anything is written.

    Raises:
        StoreError: it cannot be written there.
    """
    with storage_errors(path):
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with replacing(path) as temporary, h5py.File(temporary, "w", locking=False, libver=_LIBVER) as file:
        _fill(file, manifest, records, form, _id_bytes(ids))


def _id_bytes(ids: Iterable[str]) -> int:
    return max((len(key.encode("utf-8", "surrogateescape")) for key in ids), default=1)


def _fill(file: h5py.File, manifest: str, records: Iterable[R], form: RecordFormat[R], id_bytes: int) -> None:
    stream = iter(records)
    checksum = layout.Checksum(form.datasets)
    count = 0
    ends = dict.fromkeys(form.ragged, 0)
    while (block := list(islice(stream, _BLOCK))) or not count:
        arrays = form.pack(block)
        if not count:
            layout.create_datasets(file, form, arrays, id_bytes)
        for name in form.datasets:
            values = arrays[name]
            if name in ends:
                values = values + ends[name]
                ends[name] = int(values[-1])
                # Offsets count one more than the records; where blocks meet, the last and the first are the same.
                values = values[1 if count else 0 :]
            layout.append(file, name, values, checksum)
        count += len(block)
        if not block:
            break
    layout.seal(file, form, manifest, checksum)


class RecordFile(Generic[R]):
    """One file of records open for reading. Use as a context manager, or :meth:`close` it.

    Raises:
        StoreError: missing, of another format, or damaged.
    """

    def __init__(self, path: Path, form: RecordFormat[R], *, verify: bool) -> None:
        self.path, self._form = path, form
        try:
            # Finished files never change, so they need no lock (and read-only file systems have none).
            self.file = h5py.File(path, "r", locking=False)
        except FileNotFoundError as error:
            raise StoreError(f"{path}: no such file") from error
        except IsADirectoryError as error:
            raise StoreError(f"{path}: a folder, not a {form.noun} file") from error
        except OSError as error:
            raise StoreError(f"{path}: not a readable HDF5 file ({str(error)[:120]})") from error
        try:
            self.manifest_text, self.manifest = layout.read_manifest(self.file, form, str(path))
            layout.check_datasets(self.file, form, str(path))
            if verify:
                layout.verify(self.file, form, str(path))
            self.index = layout.read_index(self.file, form, str(path))
        except StoreError:
            self.file.close()
            raise
        except Exception as error:  # HDF5 raises nearly anything on damaged structures
            self.file.close()
            raise StoreError(f"{path}: damaged, it cannot be read back ({str(error)[:120]})") from error

    @cached_property
    def ids(self) -> list[str]:
        """Sample ids in stored order."""
        return [bytes(value).decode("utf-8", "surrogateescape") for value in self.index["id"]]

    @property
    def grids(self) -> npt.NDArray[np.int32]:
        """``(n, 2)`` height and width of what is stored of each image."""
        return np.asarray(self.index["grid"])

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of the image in a row."""
        height, width = self.index["size"][row]
        return int(height), int(width)

    def stamp(self, row: int) -> FileStamp:
        """What the file of the image in a row was when the record was made."""
        length, time, digest = (self.index[f"file_{part}"][row] for part in ("bytes", "time", "sha256"))
        return FileStamp(int(length), int(time), digest.tobytes())

    def span(self, offset: str, row: int) -> slice:
        """Where a row's part lies in the datasets that an offsets dataset cuts."""
        start, stop = self.index[offset][row : row + 2]
        return slice(int(start), int(stop))

    def heavy(self, name: str, offset: str, row: int) -> npt.NDArray[Any]:
        """A row's part of a dataset that is not held in memory.

        Raises:
            StoreError: it cannot be read back.
        """
        try:
            return np.asarray(self.file[name][self.span(offset, row)])
        except OSError as error:
            raise StoreError(f"{self.path}: damaged, {name} of {self.ids[row]!r} cannot be read back") from error

    def read(self, row: int) -> R:
        """The record in a row.

        Raises:
            StoreError: its data cannot be read back.
        """
        return self._form.unpack(self, row)

    def __len__(self) -> int:
        return len(self.index["id"])

    def __iter__(self) -> Iterator[R]:
        return (self.read(row) for row in range(len(self)))

    def close(self) -> None:
        """Close the file; reading afterwards fails."""
        self.file.close()

    def __enter__(self: F) -> F:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


F = TypeVar("F", bound="RecordFile[Any]")


class CamFile(RecordFile[Cam]):
    """One CAM file open for reading."""

    def __init__(self, path: Path, *, verify: bool) -> None:
        super().__init__(path, cam_format(), verify=verify)

    @property
    def cam_dtype(self) -> str:
        """Stored type of the maps: ``float16`` or ``float32``."""
        return str(self.file["cam"].dtype)

    @property
    def class_offsets(self) -> npt.NDArray[np.int64]:
        """``(n + 1,)`` where each image's classes begin."""
        return np.asarray(self.index["class_offset"])

    @property
    def class_counts(self) -> npt.NDArray[np.int64]:
        """How many images hold each class index, up to the largest one present."""
        return np.bincount(self.index["class_id"])

    def classes(self, row: int) -> npt.NDArray[np.int32]:
        """Classes ``(K,)`` of the record in a row."""
        return classes_of(self, row)
