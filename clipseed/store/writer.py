"""Writing records so that nothing is lost: small immutable units first, one portable file at the end.

``--out cams.h5`` collects units in ``cams.h5.parts/`` and ends as one file; ``--out DIR`` keeps the units. A unit
holds one *unit*, a fixed run of the data set's order, and appears under its name only when it is complete and on the
disk. What is there is never computed again; what is missing is, and what was made from an image that has been replaced
since. Output made with other settings is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import h5py

from clipseed.data.paths import is_file
from clipseed.data.stamps import FileStamp, replaced
from clipseed.data.types import Sample
from clipseed.errors import StoreError, UsageError
from clipseed.store.empty import EmptyLabels
from clipseed.store.files import remove_leftovers, remove_leftovers_of, write_skipped, write_text_once
from clipseed.store.gather import gathered
from clipseed.store.layout import R, RecordFormat
from clipseed.store.manifest import Manifest, OtherSettings, dumps, refuse_differences
from clipseed.store.names import is_portable, list_beside, parts_of, unit_files
from clipseed.store.places import located, noted, same_places
from clipseed.store.record_file import RecordFile, write_portable, write_unit
from clipseed.store.shards import WHOLE, Shard, Skipped, lock_output, unit_number
from clipseed.store.shared_output import SharedOutput
from clipseed.store.units import Unit, missing_units
from clipseed.wording import counted, some


@dataclass(frozen=True)
class Finished:
    """How a run left its output.

    Attributes:
        skipped_file: List of what was left out; ``None`` when nothing was.
        open_shards: How many other runs' shards are still missing; the last of them finishes the output.
        empty: Labels that came to nothing, of the whole output or of the shard; ``None`` where records have no labels.
        ignored_share: Of the pixels that this run wrote, how many are 255; ``None`` where they are no label masks.
    """

    skipped_file: Path | None
    open_shards: int = 0
    empty: EmptyLabels | None = None
    ignored_share: float | None = None


_OTHER_FORMATS = {".npz", ".npy", ".hdf", ".hdf5", ".pt", ".pth", ".png", ".jpg", ".json", ".csv", ".zip", ".mat"}
"""What people may think that an output can be; a folder of such a name surprises them."""

T = TypeVar("T")
W = TypeVar("W", bound="RecordWriter[Any]")


class RecordWriter(SharedOutput, Generic[R]):
    """The output of one command. Use as a context manager: it holds the output's lock.

    Args:
        out: ``NAME.h5`` for one portable file, anything else for a folder of units.
        manifest: What decides the content.
        form: What the records are.
        unit_size: Samples per unit; what an interrupted output began with is kept.
        overwrite: Delete what is there first.
        shard: Which units are this run's.
        option: What ``out`` was given with, for messages.

    Raises:
        StoreError: made with other settings, in use by another process, or not writable.
        UsageError: ``out`` cannot be an output.
    """

    def __init__(
        self, out: Path, manifest: Manifest, form: RecordFormat[R], unit_size: int, *, overwrite: bool = False,
        shard: Shard = WHOLE, option: str = "--out",
    ) -> None:  # fmt: skip
        self.portable = is_portable(out)
        super().__init__(out, parts_of(out) if self.portable else out, unit_size, shard)
        self.manifest = noted(manifest, out)
        self._text = dumps(self.manifest)
        self._form, self._overwrite, self._option = form, overwrite, option
        self._done: dict[str, Path] = {}
        self._stamps: dict[str, bytes] = {}
        self._outdated = False
        """Whether the finished file says something that is true no more, though nothing may be missing in it."""
        self._other_input = False
        if not self.portable and out.exists() and not out.is_dir():
            raise UsageError(f"{option} {out}: is a file; give NAME.h5 for one file, or a folder for units")
        if not self.portable and (out.suffix.lower() in _OTHER_FORMATS or out.name == "-"):
            raise UsageError(f"{option} {out}: give NAME.h5 for one file, or a folder for units; no other format")
        if self.portable and out.is_dir():
            raise UsageError(f"{option} {out}: is a folder; give the name of a file in it")
        if not self.portable and _foreign(out):
            raise UsageError(f"{option} {out}: a folder that holds other things; choose a new one")
        if overwrite and not shard.whole:
            raise UsageError(f"--overwrite cannot be used by one of several runs; delete {out} first")

    def __enter__(self: W) -> W:
        self._acquire(self._option)
        try:
            self._prepare()
        except BaseException:
            self._release()
            if self.portable and not any(path.suffix for path in self.folder.iterdir()):  # locks at most
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def _prepare(self) -> None:
        remove_leftovers(self.folder, self._is_ours)
        if self._shard.whole:
            self._remove_leftovers_beside()
        self._reports.take_back()
        if self._overwrite:
            for path in (*unit_files(self.folder), self.folder / "manifest.json"):
                path.unlink(missing_ok=True)
            if self.portable:
                self.out.unlink(missing_ok=True)
        plan = self.folder / "manifest.json"
        if plan.is_file():
            self._read_plan(plan)
        # Units first: they are newer than a finished file that corrected labels or new images are added to.
        for path in unit_files(self.folder):
            if self._shard.takes(unit_number(path)):
                self._take_stock(path)
        if self.portable and self.out.is_file():
            self._take_stock(self.out)
        if self._other_input:
            self.manifest = without_input(self.manifest)
            self._text = dumps(self.manifest)
        # Written once nothing is to be refused any more; of several runs the first one's counts.
        write_text_once(plan, json.dumps({"unit_size": self._unit_size, "manifest": self.manifest}, indent=1))
        self._read_plan(plan)

    def _remove_leftovers_beside(self) -> None:
        """Delete what killed runs left of the files that only the end of the whole output writes."""
        if self.portable:
            for path in (self.out, list_beside(self.out, "skipped"), list_beside(self.out, "empty")):
                remove_leftovers_of(path)

    def _is_ours(self, leftover: Path) -> bool:
        """Whether no other run can be writing this temporary file: with shards, those of other units may be alive."""
        number = unit_number(leftover)
        return self._shard.whole or (number >= 0 and self._shard.takes(number))

    def _read_plan(self, plan: Path) -> None:
        try:
            stored = json.loads(plan.read_text(encoding="utf-8"))
            self._unit_size = int(stored["unit_size"])
            refuse_differences(stored["manifest"], self.manifest, str(self.folder), self._option)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{plan}: damaged; start again with --overwrite") from error

    def _take_stock(self, path: Path) -> None:
        """Note which ids a finished file holds; a damaged unit is dropped and computed again."""
        try:
            with RecordFile(path, self._form, verify=True) as file:
                refuse_differences(file.manifest, self.manifest, str(path), self._option)
                self._note(file, path)
                self._outdated |= path == self.out and not same_places(file.manifest, self.manifest, self.out)
                self._other_input |= not made_from_the_same(file.manifest, self.manifest, self.out)
        except OtherSettings:
            raise
        except StoreError as error:
            if path == self.out:
                raise StoreError(f"{error}; delete it, or start again with --overwrite") from error
            path.unlink()
            self.notes.append(f"{error}; its images are computed again")

    def _note(self, file: RecordFile[R], path: Path) -> None:
        for row, identifier in enumerate(file.ids):
            self._done.setdefault(identifier, path)
            self._stamps.setdefault(identifier, file.stamp(row).packed())

    def forget(self, keys: Collection[str]) -> None:
        """Take records for not done. A unit that holds one of them goes, and its other records are made again too."""
        paths = {self._done[key] for key in keys}
        self._outdated |= self.out in paths
        for path in paths - {self.out}:
            path.unlink()
        gone = paths - {self.out}
        self._done = {key: path for key, path in self._done.items() if key not in keys and path not in gone}

    def forget_replaced(self, files: Mapping[str, Path | None]) -> set[str]:
        """Take records for not done whose image file holds something else now; returns their ids."""
        known = ((key, FileStamp.unpacked(self._stamps[key])) for key in self._done if key in files)
        stale = replaced((key, stamp, files[key]) for key, stamp in known)
        if stale:
            self.notes.append(
                f"{counted(len(stale), 'image was', 'images were')} replaced ({some(stale, 3)}); computed again"
            )
        self.forget(stale)
        return stale

    def follow(self, ids: Collection[str], stamp: Callable[[str], FileStamp]) -> None:
        """Follow the output that this one is made from: what it has of other image files now is to be made again.

        What it holds no more leaves, provided that all that is here was made from that very output.

        Args:
            ids: What the other output holds.
            stamp: From an id to its image file there.
        """
        ours = self._stamps
        stale = {key for key in self._done if key in ids and is_older(FileStamp.unpacked(ours[key]), stamp(key))}
        if stale:
            self.notes.append(
                f"{counted(len(stale), 'image was', 'images were')} replaced ({some(stale, 3)}); made again"
            )
        gone = set() if self._other_input else {key for key in self._done if key not in ids}
        if gone:
            self.notes.append(
                f"{counted(len(gone), 'image is', 'images are')} not in the input any more "
                f"({some(gone, 3)}); gone from {self.out}"
            )
        self.forget(stale | gone)

    def _adopt(self, file: RecordFile[R], path: Path) -> None:
        """Take over what another run's shard made, which is newer than what a finished file holds."""
        self._done |= dict.fromkeys(file.ids, path)

    @property
    def unit_size(self) -> int:
        """Samples per unit, as the output began with."""
        return self._unit_size

    @property
    def done(self) -> frozenset[str]:
        """Ids that are stored already."""
        return frozenset(self._done)

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """Results that were not stored, with reasons: none."""
        return []

    def units(self, samples: Sequence[Sample]) -> list[Unit]:
        """This run's units, without what is done (:func:`~clipseed.store.units.missing_units`)."""
        return missing_units(samples, self._unit_size, self._shard, self._done)

    def write(self, unit: Unit, records: Sequence[R]) -> None:
        """Store the records of a unit as one file; images that were skipped are simply not among them."""
        if not records:
            return
        path = self._unit_path(unit.index)
        write_unit(path, self._text, records, self._form)
        for record in records:
            self._done[record.id] = path

    def _unit_path(self, index: int) -> Path:
        """``unit-000012.h5``, or ``unit-000012-1.h5`` where samples skipped earlier come in a second file."""
        path = self.folder / f"unit-{index:06d}.h5"
        number = 0
        while path.exists():
            number += 1
            path = self.folder / f"unit-{index:06d}-{number}.h5"
        return path

    def finish(self, ids: Sequence[str], skipped: Sequence[tuple[str, str]] = ()) -> Finished:
        """End the run: make the portable file, in the order of ``ids``, and list what was skipped.

        One of several runs reports its shard; the last to do so ends the whole output.
        """
        if self._shard.whole:
            return self._end(ids, skipped)
        report = self._reports.report(skipped)
        self._release()
        missing = self._shard.count - self._reports.reported()
        if missing:
            return Finished(report if skipped else None, missing, self._empty_labels())
        try:
            self._lock = lock_output(self.folder, self.out, WHOLE)
        except StoreError:  # two were last at once, and the other one is at it
            return Finished(report if skipped else None, empty=self._empty_labels())
        if not self._reports.reported():  # ... and through with it
            self._release()
            if self.portable and not unit_files(self.folder):
                shutil.rmtree(self.folder, ignore_errors=True)  # locking made it again
            return Finished(None, empty=self._empty_labels())
        everything: Skipped = self._reports.skipped()
        for path in unit_files(self.folder):
            if not self._shard.takes(unit_number(path)):
                with RecordFile(path, self._form, verify=False) as file:
                    self._adopt(file, path)
        return self._end(ids, everything)

    def _end(self, ids: Sequence[str], skipped: Sequence[tuple[str, str]]) -> Finished:
        self._remove_leftovers_beside()
        fresh = any(path != self.out for path in self._done.values())
        if self.portable and (fresh or self._outdated or not self.out.is_file()):
            wanted = dict.fromkeys(key for key in ids if key in self._done)
            order = [*wanted, *(key for key in self._done if key not in wanted)]
            size = sum(path.stat().st_size for path in set(self._done.values()))
            records = gathered(order, self._done, self._form)
            write_portable(self.out, self._text, records, self._form, order, size)
        listed = write_skipped(list_beside(self.out, "skipped"), skipped)
        empty = self._empty_labels(write=True)
        if self.portable:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._reports.remove()
        self._release()
        return Finished(listed, empty=empty)

    def _empty_labels(self, *, write: bool = False) -> EmptyLabels | None:
        """Labels that came to nothing, for records that have labels; ``write``: the output is whole, list them."""
        return None


def recorded_manifest(out: Path) -> Manifest | None:
    """The manifest of an output of records that is there, finished or begun; ``None`` where none can be read."""
    parts = parts_of(out) if is_portable(out) else out
    try:
        if is_file(out):
            with h5py.File(out, "r", locking=False) as file:
                found = json.loads(str(file.attrs["manifest"]))
        else:
            found = json.loads((parts / "manifest.json").read_text(encoding="utf-8"))["manifest"]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None
    return located(found, out) if isinstance(found, dict) else None


def made_from_the_same(stored: Manifest, wanted: Manifest, out: Path) -> bool:
    """Whether two manifests of an output name the same file as what it was made from; a folder may be half written."""
    then, now = (located(manifest, out).get("input") for manifest in (stored, wanted))
    return then is not None and then == now and is_file(Path(then))


def without_input(manifest: Manifest) -> Manifest:
    """The manifest of an output that was made from several."""
    kept = {key: value for key, value in manifest.items() if key != "input"}
    return {
        **kept,
        "relative": {name: place for name, place in manifest.get("relative", {}).items() if name != "input"},
    }


def is_older(ours: FileStamp, source: FileStamp) -> bool:
    """Whether a record was made before its source's record was, from another image file; without stamp it was."""
    return source.known and ours.sha256 != source.sha256


def _foreign(folder: Path) -> bool:
    """Whether something is in a folder, and it is no output of records."""
    if not folder.is_dir() or not any(folder.iterdir()) or unit_files(folder):
        return False
    try:
        return "unit_size" not in json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        # A run that was stopped before it wrote anything leaves a lock at most.
        return not all(path.name.startswith(("lock", ".tmp-")) for path in folder.iterdir())
