"""Record files: what all of clipseed's HDF5 files have in common.

A file is flat and ragged. ``id (n,)``, ``size (n, 2)`` and ``grid (n, 2)`` have one row per image; so have
``file_bytes (n,)``, ``file_time (n,)`` and ``file_sha256 (n, 16)``, the stamp of the image file that the record was
made from (:mod:`clipseed.data.stamps`), which files of older versions lack. The other datasets lie one image behind
the other, cut by offsets ``(n + 1,)``. Which they are is a :class:`RecordFormat`'s matter. The attributes ``format``,
``version``, ``manifest`` (JSON) and ``checksum`` make it one of ours.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import h5py
import numpy as np
import numpy.typing as npt

from clipseed.data.stamps import DIGEST_BYTES, FileStamp
from clipseed.errors import StoreError

Arrays = dict[str, npt.NDArray[Any]]
_CHUNK_BYTES = 1 << 18
_LONGEST_SIDE = 1 << 20
"""Products of sides stay within 64 bits."""
_STAMP = ("file_bytes", "file_time", "file_sha256")


class Record(Protocol):
    """Anything that is stored by sample id."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def stamp(self) -> FileStamp: ...  # noqa: D102


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class RecordFormat(Generic[R]):
    """How records of one kind are laid out.

    Attributes:
        name: The ``format`` attribute.
        version: Its version.
        noun: For messages.
        ragged: Offsets dataset to the datasets that it cuts.
        heavy: Datasets that are read record by record instead of on opening.
        pack: Flattens records into arrays by dataset name, offsets beginning at 0.
        unpack: The record in a row of an opened :class:`~clipseed.store.record_file.RecordFile`.
        fits: Whether the index agrees with itself; gets the datasets read on opening.
    """

    name: str
    version: int
    noun: str
    ragged: Mapping[str, tuple[str, ...]]
    heavy: tuple[str, ...]
    pack: Callable[[Sequence[R]], Arrays]
    unpack: Callable[[Any, int], R]
    fits: Callable[[Arrays], bool]

    @property
    def datasets(self) -> tuple[str, ...]:
        """All datasets, in the order of the checksum."""
        cut = (name for offset, names in self.ragged.items() for name in (offset, *names))
        return ("id", "size", "grid", *cut, *_STAMP)

    def stored_in(self, file: h5py.File) -> tuple[str, ...]:
        """Those datasets that a file must have: one of an older version has no stamps."""
        return self.datasets if _STAMP[0] in file else tuple(name for name in self.datasets if name not in _STAMP)


class Checksum:
    """SHA-256 over the datasets' bytes and the manifest, fed piece by piece."""

    def __init__(self, datasets: Iterable[str]) -> None:
        self._digests = {name: hashlib.sha256() for name in datasets}

    def add(self, name: str, values: npt.NDArray[Any]) -> None:
        """Feed the next piece of a dataset."""
        if name == "id":  # NumPy pads ids to a common width, which depends on what else is in the array
            self._digests[name].update(b"".join(bytes(value) + b"\n" for value in values))
        else:
            self._digests[name].update(np.ascontiguousarray(values).data)

    def hexdigest(self, manifest: str) -> str:
        """Digest of everything fed so far."""
        parts = [manifest] + [digest.hexdigest() for digest in self._digests.values()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def create_datasets(file: h5py.File, form: RecordFormat[Any], first: Arrays, id_bytes: int) -> None:
    """Make the empty, growable datasets of a file, with the types of its first block.

    Chunks are no larger than that block, so that small files stay small; each carries HDF5's own checksum too.
    """
    for name in form.datasets:
        values = first[name]
        dtype = np.dtype(f"S{max(1, id_bytes)}") if name == "id" else values.dtype
        tail = values.shape[1:]
        most = _CHUNK_BYTES // (dtype.itemsize * int(np.prod(tail, dtype=int)))
        rows = max(1, min(most, len(values)))
        file.create_dataset(
            name, shape=(0, *tail), maxshape=(None, *tail), dtype=dtype, chunks=(rows, *tail), fletcher32=True
        )


def append(file: h5py.File, name: str, values: npt.NDArray[Any], checksum: Checksum) -> None:
    """Write ``values`` behind what a dataset holds."""
    dataset = file[name]
    start = dataset.shape[0]
    dataset.resize(start + len(values), axis=0)
    if len(values):
        dataset[start:] = values
    checksum.add(name, values)


def seal(file: h5py.File, form: RecordFormat[Any], manifest: str, checksum: Checksum) -> None:
    """Write the attributes that make the file one of ours."""
    file.attrs["format"] = form.name
    file.attrs["version"] = form.version
    file.attrs["manifest"] = manifest
    file.attrs["checksum"] = checksum.hexdigest(manifest)


def read_manifest(file: h5py.File, form: RecordFormat[Any], where: str) -> tuple[str, dict[str, Any]]:
    """The manifest as stored and parsed.

    Raises:
        StoreError: not a file of this format, or one of a newer version.
    """
    kind = file.attrs.get("format")
    if kind != form.name:
        what = f"a {kind} file" if str(kind).startswith("clipseed-") else "an HDF5 file"
        raise StoreError(f"{where}: {what}, but not a clipseed {form.noun} file")
    version = int(file.attrs.get("version", 0))
    if version != form.version:
        raise StoreError(f"{where}: {form.noun} format version {version}; this clipseed reads version {form.version}")
    text = str(file.attrs.get("manifest", ""))
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise StoreError(f"{where}: its manifest is damaged ({error})") from error
    if not isinstance(manifest, dict):
        raise StoreError(f"{where}: its manifest is damaged")
    return text, manifest


def _is_own_dataset(file: h5py.File, name: str) -> bool:
    """Whether a dataset is stored in this file itself, not linked from another one."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file.get(name), h5py.Dataset):
        return False
    return not file[name].is_virtual and not file[name].external


def _check_dataset(dataset: h5py.Dataset, name: str, form: RecordFormat[Any], file_bytes: int, where: str) -> None:
    """Raise :class:`StoreError` unless one dataset has a type of ours and the file holds what it promises.

    Packed data, missing chunks and large ones could make a small file take any amount of memory.
    """
    kinds = {"id": "S", "size": "i", "grid": "i"} | dict.fromkeys(form.ragged, "i")
    kinds |= {"file_bytes": "i", "file_time": "i", "file_sha256": "u"}
    if dataset.dtype.kind not in kinds.get(name, "iufb"):
        raise StoreError(f"{where}: damaged, {name!r} has the type {dataset.dtype}")
    if dataset.ndim < 1 or (name == "id" and dataset.ndim > 1):
        raise StoreError(f"{where}: damaged, {name!r} has the shape {dataset.shape}")
    row = dataset.dtype.itemsize * math.prod(dataset.shape[1:])
    chunk = dataset.dtype.itemsize * math.prod(dataset.chunks or (0,))
    if dataset.nbytes > file_bytes or chunk > max(_CHUNK_BYTES, row):
        raise StoreError(f"{where}: damaged, {name!r} promises more data than the file holds")


def check_datasets(file: h5py.File, form: RecordFormat[Any], where: str) -> None:
    """Raise :class:`StoreError` unless all datasets are there with fitting types, shapes and amounts of data."""
    names = form.stored_in(file)
    missing = [name for name in names if not _is_own_dataset(file, name)]
    if missing:
        raise StoreError(f"{where}: damaged, dataset {missing[0]!r} is missing")
    file_bytes = file.id.get_filesize()
    for name in names:
        _check_dataset(file[name], name, form, file_bytes, where)
    count = file["id"].shape[0]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("size", "grid"), (count, 2))
    shapes |= dict.fromkeys(form.ragged, (count + 1,))
    stamp = {"file_bytes": (count,), "file_time": (count,), "file_sha256": (count, DIGEST_BYTES)}
    shapes |= {name: shape for name, shape in stamp.items() if name in names}
    for name, shape in shapes.items():
        if file[name].shape != shape:
            raise StoreError(f"{where}: damaged, {name!r} has shape {file[name].shape} instead of {shape}")


def read_index(file: h5py.File, form: RecordFormat[Any], where: str) -> Arrays:
    """Everything but the heavy datasets, checked.

    Raises:
        StoreError: offsets, sizes and grids do not agree with each other or with the data's length.
    """
    arrays: Arrays = {name: file[name][...] for name in form.stored_in(file) if name not in form.heavy}
    if _STAMP[0] not in arrays:
        arrays |= _stamps([FileStamp()] * len(arrays["id"]))
    for offset, names in form.ragged.items():
        cuts = arrays[offset]
        sound = cuts[0] == 0 and (np.diff(cuts) >= 0).all()
        if not sound or any(file[name].shape[:1] != (cuts[-1],) for name in names):
            raise StoreError(f"{where}: damaged, its offsets do not fit its data")
    sides = np.concatenate([arrays["size"], arrays["grid"]])
    if not ((sides > 0).all() and (sides <= _LONGEST_SIDE).all() and form.fits(arrays)):
        raise StoreError(f"{where}: damaged, its offsets do not fit its data")
    return arrays


def verify(file: h5py.File, form: RecordFormat[Any], where: str, block: int = 1 << 22) -> None:
    """Read everything and compare with the stored checksum.

    Raises:
        StoreError: something was changed.
        OSError: something cannot be read, as HDF5's own checksums do not match.
    """
    text, _ = read_manifest(file, form, where)
    names = form.stored_in(file)
    checksum = Checksum(names)
    for name in names:
        dataset = file[name]
        for start in range(0, dataset.shape[0], block):
            checksum.add(name, dataset[start : start + block])
    if checksum.hexdigest(text) != file.attrs.get("checksum"):
        raise StoreError(f"{where}: damaged, its checksum does not match its content")


def pack_index(records: Sequence[Any], grids: Sequence[tuple[int, ...]]) -> Arrays:
    """The datasets that every format has: ids, sizes, grids and stamps."""
    ids = [record.id.encode("utf-8", "surrogateescape") for record in records]
    return {
        "id": np.array(ids, dtype=f"S{max([1, *map(len, ids)])}"),
        "size": np.array([record.size for record in records], np.int32).reshape(-1, 2),
        "grid": np.array(grids, np.int32).reshape(-1, 2),
        **_stamps([record.stamp for record in records]),
    }


def _stamps(stamps: Sequence[FileStamp]) -> Arrays:
    return {
        "file_bytes": np.array([stamp.length for stamp in stamps], np.int64),
        "file_time": np.array([stamp.time for stamp in stamps], np.int64),
        "file_sha256": np.frombuffer(b"".join(stamp.sha256 for stamp in stamps), np.uint8).reshape(-1, DIGEST_BYTES),
    }


def offsets(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Where pieces of these lengths begin and the last one ends."""
    return np.concatenate([[0], np.cumsum(np.array(counts, np.int64))]).astype(np.int64)


def joined(parts: Sequence[npt.NDArray[Any]], dtype: str) -> npt.NDArray[Any]:
    """Arrays one behind the other; of this type even if there is none."""
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)
