"""Reading seeds: one mapping over a portable file or a folder of shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from clipseed.data.paths import is_file, is_folder, never_ends
from clipseed.errors import StoreError
from clipseed.store.manifest import Manifest
from clipseed.store.records import SeedMap
from clipseed.store.shard import SeedFile

SHARD_PATTERN = "unit-*.h5"
_VERIFY_BELOW = 256 << 20
_PARTS = ("options", "vocabulary", "dataset")


class Seeds(Mapping[str, SeedMap]):
    """Seeds of a data set: sample id to :class:`~clipseed.store.records.SeedMap`, in stored order.

    Safe to use after a fork: each process opens the files for itself.
    """

    def __init__(self, path: Path, *, verify: bool | None = None) -> None:
        self.path = path
        self._paths = _seed_files(path)
        if verify is None:
            verify = sum(map(_bytes, self._paths)) < _VERIFY_BELOW
        self._files = [SeedFile(file, verify=verify) for file in self._paths]
        self._process = os.getpid()
        self.manifest: Manifest = self._files[0].manifest
        try:
            self._check()
        except StoreError:
            self.close()
            raise
        self._rows: dict[str, tuple[int, int]] = {}
        for number, file in enumerate(self._files):
            for row, identifier in enumerate(file.ids):
                if self._rows.setdefault(identifier, (number, row)) != (number, row):
                    self.close()
                    raise StoreError(f"{path}: the id {identifier!r} is stored twice")

    def _check(self) -> None:
        names = class_names(self.manifest, self.path)
        for file in self._files:
            if len(file.class_counts) > len(names):
                raise StoreError(f"{file.path}: damaged, it has class {len(file.class_counts) - 1} of {len(names)}")

    def __getitem__(self, identifier: str) -> SeedMap:
        number, row = self._rows[identifier]
        return self._opened()[number].read(row)

    def classes(self, identifier: str) -> npt.NDArray[np.int32]:
        """Classes of a picture ``(K,)``, without reading its maps."""
        number, row = self._rows[identifier]
        return self._opened()[number].classes(row)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def _opened(self) -> list[SeedFile]:
        if os.getpid() != self._process:
            self._files = [SeedFile(file, verify=False) for file in self._paths]
            self._process = os.getpid()
        return self._files

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that ``SeedMap.classes`` indexes."""
        return class_names(self.manifest, self.path)

    @property
    def files(self) -> list[SeedFile]:
        """The underlying files."""
        return self._opened()

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Seeds:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def class_names(manifest: Manifest, path: Path) -> tuple[str, ...]:
    """Class names of a seeds file's manifest.

    Raises:
        StoreError: the manifest has another form than every manifest of ours.
    """
    parts = {"model": manifest.get("model", {}), **{part: manifest.get(part) for part in _PARTS}}
    odd = next((part for part, value in parts.items() if not isinstance(value, dict)), None)
    classes = manifest["vocabulary"].get("classes") if odd is None else None
    if not isinstance(classes, list) or not all(
        isinstance(item, dict) and isinstance(item.get("name"), str) for item in classes
    ):
        raise StoreError(f"{path}: damaged, its manifest has no {odd or 'list of classes'!r}")
    return tuple(item["name"] for item in classes)


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error


def _seed_files(path: Path) -> list[Path]:
    if never_ends(path):
        raise StoreError(f"{path}: a pipe or a device, not a seeds file")
    if not is_folder(path) and not is_file(path):
        if is_folder(path.with_name(path.name + ".parts")):
            raise StoreError(f"{path}: not finished yet; run the command that writes it again, it resumes")
        raise StoreError(f"{path}: no such file")
    if not is_folder(path):
        return [path]
    shards = sorted(path.glob(SHARD_PATTERN))
    if not shards:
        raise StoreError(f"{path}: no seeds in this folder (looked for {SHARD_PATTERN})")
    return shards


def open_seeds(path: str | Path, *, verify: bool | None = None) -> Seeds:
    """Open seeds for reading.

    Args:
        path: A seeds file, or a folder of shards.
        verify: Read everything and check the checksum first; by default for outputs below 256 MB. Without it, damage is
            found when the damaged record is read.

    Raises:
        StoreError: missing, unfinished, not ours, or damaged.
    """
    return Seeds(Path(path), verify=verify)
