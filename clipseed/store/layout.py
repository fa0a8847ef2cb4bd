"""The seeds file: names, types and checksum of its datasets.

One file is flat and ragged; with n pictures and C maps in all it holds

===============  ===========  ==========================================================
``id``           (n,) S       UTF-8 sample ids
``size``         (n, 2) i4    height and width of the picture in pixels
``grid``         (n, 2) i4    height and width of its maps
``class_offset`` (n+1,) i8    where each picture's classes begin in ``class_id``
``class_id``     (C,) i4      class indices (mask value = index + 1)
``cam_offset``   (n+1,) i8    where each picture's maps begin in ``cam``
``cam``          (sum K h w)  f2 or f4, values in [0, 1], maps row by row, class by class
===============  ===========  ==========================================================

and the attributes ``format``, ``version``, ``manifest`` (JSON) and ``checksum``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from clipseed.errors import StoreError

FORMAT = "clipseed-seeds"
VERSION = 1
DATASETS = ("id", "size", "grid", "class_offset", "class_id", "cam_offset", "cam")
Arrays = dict[str, npt.NDArray[Any]]
_CHUNK_BYTES = 1 << 18


class Checksum:
    """SHA-256 over the datasets' bytes and the manifest, fed piece by piece."""

    def __init__(self) -> None:
        self._digests = {name: hashlib.sha256() for name in DATASETS}

    def add(self, name: str, values: npt.NDArray[Any]) -> None:
        """Feed the next piece of a dataset."""
        if name == "id":  # NumPy pads ids to a common width, which depends on what else is in the array
            self._digests[name].update(b"".join(bytes(value) + b"\n" for value in values))
        else:
            self._digests[name].update(np.ascontiguousarray(values).data)

    def hexdigest(self, manifest: str) -> str:
        """Digest of everything fed so far."""
        parts = [manifest] + [self._digests[name].hexdigest() for name in DATASETS]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def create_datasets(file: h5py.File, first: Arrays, id_bytes: int) -> None:
    """Make the empty, growable datasets of a seeds file, with the types of its first block.

    Chunks are no larger than that block, so that small files stay small; each carries HDF5's own checksum too.
    """
    for name in DATASETS:
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


def seal(file: h5py.File, manifest: str, checksum: Checksum) -> None:
    """Write the attributes that make the file a seeds file."""
    file.attrs["format"] = FORMAT
    file.attrs["version"] = VERSION
    file.attrs["manifest"] = manifest
    file.attrs["checksum"] = checksum.hexdigest(manifest)


def read_manifest(file: h5py.File, where: str) -> tuple[str, dict[str, Any]]:
    """The manifest as stored and parsed.

    Raises:
        StoreError: not a seeds file, or one of a newer version.
    """
    kind = file.attrs.get("format")
    if kind != FORMAT:
        raise StoreError(f"{where}: an HDF5 file, but not a clipseed seeds file")
    version = int(file.attrs.get("version", 0))
    if version != VERSION:
        raise StoreError(f"{where}: seeds format version {version}; this clipseed reads version {VERSION}")
    text = str(file.attrs.get("manifest", ""))
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise StoreError(f"{where}: its manifest is damaged ({error})") from error
    if not isinstance(manifest, dict):
        raise StoreError(f"{where}: its manifest is damaged")
    return text, manifest


def check_datasets(file: h5py.File, where: str) -> None:
    """Raise :class:`StoreError` unless all datasets are there with fitting shapes."""
    missing = [name for name in DATASETS if not isinstance(file.get(name), h5py.Dataset)]
    if missing:
        raise StoreError(f"{where}: damaged, dataset {missing[0]!r} is missing")
    count = file["id"].shape[0]
    shapes = dict.fromkeys(("size", "grid"), (count, 2)) | dict.fromkeys(_OFFSETS, (count + 1,))
    for name, shape in shapes.items():
        if file[name].shape != shape:
            raise StoreError(f"{where}: damaged, {name!r} has shape {file[name].shape} instead of {shape}")


_OFFSETS = ("class_offset", "cam_offset")


def check_offsets(arrays: Mapping[str, npt.NDArray[Any]], classes: int, values: int, where: str) -> None:
    """Raise :class:`StoreError` unless offsets, sizes and grids agree with each other and with the data's length."""
    class_offset, cam_offset = arrays["class_offset"], arrays["cam_offset"]
    grid, size = arrays["grid"].astype(np.int64), arrays["size"]
    counts = np.diff(class_offset)
    fits = (
        class_offset[0] == 0
        and cam_offset[0] == 0
        and class_offset[-1] == classes
        and cam_offset[-1] == values
        and (counts >= 0).all()
        and (np.diff(cam_offset) == counts * grid.prod(axis=1)).all()
        and (grid > 0).all()
        and (size > 0).all()
    )
    if not fits:
        raise StoreError(f"{where}: damaged, its offsets do not fit its data")


def verify(file: h5py.File, where: str, block: int = 1 << 22) -> None:
    """Read everything and compare with the stored checksum.

    Raises:
        StoreError: something was changed.
        OSError: something cannot be read, as HDF5's own checksums do not match.
    """
    text, _ = read_manifest(file, where)
    checksum = Checksum()
    for name in DATASETS:
        dataset = file[name]
        for start in range(0, dataset.shape[0], block):
            checksum.add(name, dataset[start : start + block])
    if checksum.hexdigest(text) != file.attrs.get("checksum"):
        raise StoreError(f"{where}: damaged, its checksum does not match its content")
