"""Single seeds files: writing one atomically, and reading records from one."""

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
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from clipseed.errors import StoreError
from clipseed.store import layout
from clipseed.store.files import replacing, storage_errors
from clipseed.store.records import SeedMap, pack

_BLOCK = 4096


def write_shard(path: Path, manifest: str, records: Sequence[SeedMap], cam_dtype: str) -> None:
    """Write a few records as one seeds file, atomically. The same arguments give the same bytes.

    The file is put together in memory: HDF5 does not fail cleanly on a full disk, plain writing does.

    Raises:
        StoreError: it cannot be written there.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        _fill(file, manifest, records, cam_dtype, _id_bytes(record.id for record in records))
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def write_portable(
    path: Path, manifest: str, records: Iterable[SeedMap], cam_dtype: str, ids: Iterable[str], size: int
) -> None:
    """Write any number of records as one seeds file, atomically, holding few of them in memory.

    Args:
        path: The file.
        manifest: As stored.
        records: In their final order.
        cam_dtype: ``float16`` or ``float32``.
        ids: Their ids.
        size: About how many bytes it will take; a disk with less room is refused before anything is written.

    Raises:
        StoreError: it cannot be written there.
    """
    with storage_errors(path):
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with replacing(path) as temporary, h5py.File(temporary, "w", locking=False) as file:
        _fill(file, manifest, records, cam_dtype, _id_bytes(ids))


def _id_bytes(ids: Iterable[str]) -> int:
    return max((len(key.encode("utf-8", "surrogateescape")) for key in ids), default=1)


def _fill(file: h5py.File, manifest: str, records: Iterable[SeedMap], cam_dtype: str, id_bytes: int) -> None:
    stream = iter(records)
    checksum = layout.Checksum()
    count = classes = values = 0
    while (block := list(islice(stream, _BLOCK))) or not count:
        arrays = pack(block, cam_dtype)
        if not count:
            layout.create_datasets(file, arrays, id_bytes)
        arrays["class_offset"] += classes
        arrays["cam_offset"] += values
        for name in layout.DATASETS:
            # Offsets count one more than the records; where blocks meet, the last and the first are the same.
            layout.append(file, name, arrays[name][1 if count and name.endswith("offset") else 0 :], checksum)
        count += len(block)
        classes, values = int(arrays["class_offset"][-1]), int(arrays["cam_offset"][-1])
        if not block:
            break
    layout.seal(file, manifest, checksum)


class SeedFile:
    """One seeds file open for reading. Use as a context manager, or :meth:`close` it.

    Raises:
        StoreError: missing, not a seeds file, or damaged.
    """

    def __init__(self, path: Path, *, verify: bool) -> None:
        self.path = path
        try:
            # Finished files never change, so they need no lock (and read-only file systems have none).
            self.file = h5py.File(path, "r", locking=False)
        except FileNotFoundError as error:
            raise StoreError(f"{path}: no such file") from error
        except IsADirectoryError as error:
            raise StoreError(f"{path}: a folder, not a seeds file") from error
        except OSError as error:
            raise StoreError(f"{path}: not a readable HDF5 file ({str(error)[:120]})") from error
        try:
            self.manifest_text, self.manifest = layout.read_manifest(self.file, str(path))
            layout.check_datasets(self.file, str(path))
            if verify:
                layout.verify(self.file, str(path))
            self._index = self._read_index()
        except StoreError:
            self.file.close()
            raise
        except Exception as error:  # HDF5 raises nearly anything on damaged structures
            self.file.close()
            raise StoreError(f"{path}: damaged, it cannot be read back ({str(error)[:120]})") from error

    def _read_index(self) -> layout.Arrays:
        arrays = {name: self.file[name][...] for name in layout.DATASETS if name != "cam"}
        layout.check_offsets(arrays, len(arrays["class_id"]), self.file["cam"].shape[0], str(self.path))
        return arrays

    @cached_property
    def ids(self) -> list[str]:
        """Sample ids in stored order."""
        return [bytes(value).decode("utf-8", "surrogateescape") for value in self._index["id"]]

    @property
    def cam_dtype(self) -> str:
        """Stored type of the maps: ``float16`` or ``float32``."""
        return str(self.file["cam"].dtype)

    @property
    def grids(self) -> npt.NDArray[np.int32]:
        """``(n, 2)`` patch grids."""
        return np.asarray(self._index["grid"])

    @property
    def class_offsets(self) -> npt.NDArray[np.int64]:
        """``(n + 1,)`` where each picture's classes begin."""
        return np.asarray(self._index["class_offset"])

    @property
    def class_counts(self) -> npt.NDArray[np.int64]:
        """How many pictures hold each class index, up to the largest one present."""
        return np.bincount(self._index["class_id"])

    def read(self, row: int) -> SeedMap:
        """The record in a row.

        Raises:
            StoreError: its data cannot be read back.
        """
        index = self._index
        height, width = (int(side) for side in index["grid"][row])
        first, last = index["class_offset"][row : row + 2]
        start, stop = index["cam_offset"][row : row + 2]
        try:
            cam: npt.NDArray[Any] = self.file["cam"][start:stop]
        except OSError as error:
            raise StoreError(f"{self.path}: damaged, the maps of {self.ids[row]!r} cannot be read back") from error
        size = (int(index["size"][row][0]), int(index["size"][row][1]))
        maps = cam.astype(np.float32).reshape(-1, height, width)
        return SeedMap(self.ids[row], index["class_id"][first:last].copy(), maps, size)

    def classes(self, row: int) -> npt.NDArray[np.int32]:
        """Classes ``(K,)`` of the record in a row."""
        first, last = self._index["class_offset"][row : row + 2]
        found: npt.NDArray[np.int32] = self._index["class_id"][first:last].copy()
        return found

    def __len__(self) -> int:
        return len(self._index["id"])

    def __iter__(self) -> Iterator[SeedMap]:
        return (self.read(row) for row in range(len(self)))

    def close(self) -> None:
        """Close the file; reading afterwards fails."""
        self.file.close()

    def __enter__(self) -> SeedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
