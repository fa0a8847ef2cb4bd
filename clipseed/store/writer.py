"""Writing seeds so that nothing is lost: small immutable shards first, one portable file at the end.

``--out cams.h5`` collects shards in ``cams.h5.parts/`` and ends as one file; ``--out DIR`` keeps the shards. A shard
holds one *unit*, a fixed run of the data set's order, and appears under its name only when it is complete and on the
disk. What is there is never computed again; what is missing is. Output made with other settings is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from filelock import FileLock

from clipseed.errors import StoreError, UsageError
from clipseed.store.files import remove_leftovers, storage_errors, write_text
from clipseed.store.locks import acquire
from clipseed.store.manifest import Manifest, differences, dumps
from clipseed.store.reader import SHARD_PATTERN
from clipseed.store.records import SeedMap
from clipseed.store.shard import SeedFile, write_portable, write_shard

_H5_SUFFIXES = {".h5", ".hdf5"}


@dataclass(frozen=True)
class Unit:
    """A run of consecutive samples that is written as one shard. ``ids`` are those still to be done."""

    index: int
    ids: tuple[str, ...]


class SeedWriter:
    """The output of one command. Use as a context manager: it holds the output's lock.

    Args:
        out: ``NAME.h5`` for one portable file, anything else for a folder of shards.
        manifest: What decides the content.
        cam_dtype: ``float16`` or ``float32``.
        unit_size: Samples per shard; what an interrupted output began with is kept.
        overwrite: Delete what is there first.

    Raises:
        StoreError: made with other settings, in use by another process, or not writable.
        UsageError: ``out`` cannot be an output.
    """

    def __init__(
        self, out: Path, manifest: Manifest, cam_dtype: str, unit_size: int, *, overwrite: bool = False
    ) -> None:
        self.out = out
        self.portable = out.suffix.lower() in _H5_SUFFIXES
        self.folder = out.with_name(out.name + ".parts") if self.portable else out
        self.manifest, self._text = manifest, dumps(manifest)
        self._cam_dtype, self._unit_size = cam_dtype, unit_size
        self._overwrite = overwrite
        self._lock: FileLock | None = None
        self.notes: list[str] = []
        self._done: dict[str, Path] = {}
        self._classes: dict[str, tuple[int, ...]] = {}
        if not self.portable and out.exists() and not out.is_dir():
            raise UsageError(f"--out {out}: is a file; give NAME.h5 for one file, or a folder for shards")
        if self.portable and out.is_dir():
            raise UsageError(f"--out {out}: is a folder; give the name of a file in it")

    def __enter__(self) -> SeedWriter:
        with storage_errors(self.folder):
            if not self.out.parent.is_dir():
                raise StoreError(f"{self.out}: the folder {self.out.parent} does not exist")
            self.folder.mkdir(exist_ok=True)
            self._lock = acquire(self.folder / "lock", self.out)
        try:
            self._prepare()
        except BaseException:
            self._release()
            raise
        return self

    def _prepare(self) -> None:
        remove_leftovers(self.folder)
        if self._overwrite:
            for path in (*self.folder.glob(SHARD_PATTERN), self.folder / "manifest.json"):
                path.unlink(missing_ok=True)
            if self.portable:
                self.out.unlink(missing_ok=True)
        plan = self.folder / "manifest.json"
        if plan.is_file():
            try:
                stored = json.loads(plan.read_text(encoding="utf-8"))
                self._unit_size = int(stored["unit_size"])
                self._refuse_other(stored["manifest"], str(self.folder))
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{plan}: damaged; start again with --overwrite") from error
        if self.portable and self.out.is_file():
            self._take_stock(self.out)
        for shard in sorted(self.folder.glob(SHARD_PATTERN)):
            self._take_stock(shard)
        if not plan.is_file():
            write_text(plan, json.dumps({"unit_size": self._unit_size, "manifest": self.manifest}, indent=1))

    def _take_stock(self, path: Path) -> None:
        """Note which ids a finished file holds; a damaged shard is dropped and computed again."""
        try:
            with SeedFile(path, verify=True) as file:
                self._refuse_other(file.manifest, str(path))
                for row, identifier in enumerate(file.ids):
                    self._done.setdefault(identifier, path)
                    self._classes.setdefault(identifier, tuple(file.classes(row).tolist()))
        except _OtherSettings:
            raise
        except StoreError as error:
            if path == self.out:
                raise StoreError(f"{error}; delete it, or start again with --overwrite") from error
            path.unlink()
            self.notes.append(f"{error}; its pictures are computed again")

    def _refuse_other(self, stored: Manifest, where: str) -> None:
        changed = differences(stored, self.manifest)
        if changed:
            shown = "\n  ".join(changed[:12])
            more = f"\n  and {len(changed) - 12} more" if len(changed) > 12 else ""
            raise _OtherSettings(
                f"{where} was made with other settings; choose another --out, or start again with --overwrite:"
                f"\n  {shown}{more}"
            )

    def forget_unlike(self, classes: Mapping[str, Sequence[int] | None]) -> None:
        """Take pictures that are stored with other classes than these for not done: their labels were corrected.

        A shard that holds one of them goes, and its other pictures are computed again too.
        """
        stale = {key for key, known in self._classes.items() if key in classes and tuple(classes[key] or ()) != known}
        shards = {self._done[key] for key in stale} - {self.out}
        for path in shards:
            path.unlink()
        self._done = {key: path for key, path in self._done.items() if key not in stale and path not in shards}
        if stale:
            self.notes.append(f"{len(stale)} pictures are stored with other labels; they are computed again")

    @property
    def done(self) -> frozenset[str]:
        """Ids that are stored already."""
        return frozenset(self._done)

    def units(self, ids: Sequence[str]) -> list[Unit]:
        """Cut the data set's ids into units and drop what is done; the cut never depends on what is done."""
        found = []
        for index, start in enumerate(range(0, len(ids), self._unit_size)):
            missing = tuple(key for key in ids[start : start + self._unit_size] if key not in self._done)
            if missing:
                found.append(Unit(index, missing))
        return found

    def write(self, index: int, records: Sequence[SeedMap]) -> None:
        """Store the records of unit ``index`` as one shard; pictures that were skipped are simply not among them."""
        if not records:
            return
        path = self._shard_path(index)
        write_shard(path, self._text, records, self._cam_dtype)
        for record in records:
            self._done[record.id] = path

    def _shard_path(self, index: int) -> Path:
        """``unit-000012.h5``, or ``unit-000012-1.h5`` where samples skipped earlier come in a second shard."""
        path = self.folder / f"unit-{index:06d}.h5"
        number = 0
        while path.exists():
            number += 1
            path = self.folder / f"unit-{index:06d}-{number}.h5"
        return path

    def finish(self, ids: Sequence[str]) -> Path:
        """Make the portable file out of the shards (in the order of ``ids``, then what else is there)."""
        if not self.portable:
            return self.out
        if any(path != self.out for path in self._done.values()) or not self.out.is_file():
            wanted = dict.fromkeys(key for key in ids if key in self._done)
            order = [*wanted, *(key for key in self._done if key not in wanted)]
            size = sum(path.stat().st_size for path in set(self._done.values()))
            write_portable(self.out, self._text, self._gather(order), self._cam_dtype, order, size)
        return self.out

    def _gather(self, order: Sequence[str]) -> Iterator[SeedMap]:
        """Read records back one by one, keeping the few files open that the order makes use of."""
        opened: dict[Path, tuple[SeedFile, dict[str, int]]] = {}
        try:
            for identifier in order:
                path = self._done[identifier]
                if path not in opened:
                    while len(opened) > 8:
                        opened.pop(next(iter(opened)))[0].close()
                    file = SeedFile(path, verify=False)
                    opened[path] = (file, {key: row for row, key in enumerate(file.ids)})
                file, rows = opened[path]
                yield file.read(rows[identifier])
        finally:
            for file, _ in opened.values():
                file.close()

    def discard_parts(self) -> None:
        """Remove the shards behind a finished portable file."""
        if self.portable:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()


class _OtherSettings(StoreError):
    """The output exists with another manifest."""
