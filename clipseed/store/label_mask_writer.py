"""A folder of label masks as the output of a command: resumable, locked, with a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipseed.data.paths import IMAGE_SUFFIXES
from clipseed.data.stamps import UNKNOWN, FileStamp
from clipseed.data.types import Sample, check_id
from clipseed.defaults import EmptyPolicy
from clipseed.errors import StoreError, UsageError
from clipseed.store.empty import (
    Earlier,
    EmptyLabels,
    EmptyList,
    background_to_ignore,
    class_names,
    nothing_earlier,
    without_pixel,
)
from clipseed.store.files import remove_leftovers, storage_errors, write_skipped, write_text
from clipseed.store.label_mask_folder import MANIFEST, read_label_mask_manifest
from clipseed.store.label_masks import LabelMaskNote, label_mask_note, write_label_mask
from clipseed.store.legend import write_legend
from clipseed.store.manifest import Manifest, dumps, refuse_differences
from clipseed.store.places import noted
from clipseed.store.shards import WHOLE, Empty, Shard
from clipseed.store.shared_output import SharedOutput
from clipseed.store.units import Unit, missing_units
from clipseed.store.writer import Finished, is_older, made_from_the_same, without_input
from clipseed.types import IGNORE, LabelMask
from clipseed.wording import counted, some


@dataclass(frozen=True)
class Labelled:
    """A finished image.

    Attributes:
        labels: Its label mask ``(H, W)``.
        classes: Those that it was made for.
        stamp: The image file that it was made from.
    """

    id: str
    labels: LabelMask
    classes: tuple[int, ...]
    stamp: FileStamp = UNKNOWN


class LabelMaskWriter(SharedOutput):
    """Writes masks below a folder, the id being the path without suffix. Use as a context manager: it holds a lock.

    Masks appear under their name only when they are complete, so those that are there are done. ``classes.csv`` says
    what their values mean.

    Args:
        folder: Made when missing.
        manifest: What decides the content, kept as ``manifest.json``.
        unit_size: Samples per unit, the piece that shards are made of.
        overwrite: Delete the masks of an earlier run first.
        shard: Which images are this run's to do; the folder is shared with the others.
        empty: What becomes of the mask of an image in which some label got no pixel: ``background``: nothing;
            ``ignore``: its 0 becomes 255; ``skip``: it is not written. All are listed in ``empty.csv``
            (:mod:`clipseed.store.empty`).
        earlier: Knows which labels had come to nothing before.

    Raises:
        StoreError: made with other settings, in use by another process, or not writable.
        UsageError: ``folder`` is a file, or holds other things.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, unit_size: int, *, overwrite: bool = False, shard: Shard = WHOLE,
        empty: EmptyPolicy = "background", earlier: Earlier = nothing_earlier,
    ) -> None:  # fmt: skip
        super().__init__(folder, folder, unit_size, shard)
        self._policy, self._empty = empty, EmptyList(folder, manifest, earlier=earlier)
        self._without_mask: Empty = {}
        self._pixels = self._ignored = 0
        self._manifest, self._overwrite = noted(manifest, folder), overwrite
        self._same_input = False
        self.done: set[str] = set()

    def __enter__(self) -> LabelMaskWriter:
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"--out {self.folder}: is a file; masks go to a folder")
        if self._overwrite and not self._shard.whole:
            raise UsageError(f"--overwrite cannot be used by one of several runs; delete {self.folder} first")
        self._acquire()
        try:
            self._prepare()
        except BaseException:
            self._release()
            if not (self.folder / MANIFEST).exists():  # nothing of ours stays in a folder that is not ours
                (self.folder / "lock").unlink(missing_ok=True)
            raise
        return self

    def _prepare(self) -> None:
        remove_leftovers(self.folder, lambda _: self._shard.whole)
        self._reports.take_back()
        plan = self.folder / MANIFEST
        there = read_label_mask_manifest(self.folder)
        found = self._masks()
        if there is None and not plan.exists():
            if found:
                raise UsageError(f"--out {self.folder}: holds masks that clipseed did not make; choose another folder")
            if any(path.suffix.lower() in IMAGE_SUFFIXES for path in self.folder.iterdir()):
                raise UsageError(f"--out {self.folder}: holds images; choose another folder")
        elif there is not None and there.get("kind") != self._manifest["kind"]:
            raise UsageError(f"--out {self.folder}: holds another command's output; choose another folder")
        elif self._overwrite:
            for path in found.values():
                if label_mask_note(path).classes is not None:  # ours
                    path.unlink()
        else:
            stored = self._recorded(plan)
            refuse_differences(stored, self._manifest, str(self.folder))
            self._same_input = made_from_the_same(stored, self._manifest, self.folder)
            if found and not self._same_input:
                self._manifest = without_input(self._manifest)
        write_text(plan, dumps(self._manifest) + "\n")
        names = class_names(self._manifest)
        if names:
            write_legend(self.folder, names)
        self.done = {key for key, path in found.items() if not path.name.startswith(".") and path.exists()}

    def _masks(self) -> dict[str, Path]:
        """Masks in the folder, whoever made them, by id."""
        return {path.relative_to(self.folder).with_suffix("").as_posix(): path for path in self.folder.rglob("*.png")}

    def follow(self, classes: Mapping[str, tuple[int, ...] | None], stamp: Callable[[str], FileStamp]) -> None:
        """Follow what masks are made from: delete those made for other labels, or from another image file.

        Masks of images that are not there any more go too, provided that what is here was made from that very input.

        Args:
            classes: Of each image of the input; ``None``: not known.
            stamp: From an id to the image file that the input was made from.
        """
        notes = {key: label_mask_note(self._path(key)) for key in self.done}
        relabelled, repainted, gone = set(), set(), set()
        for key, note in notes.items():
            if key not in classes:
                gone |= {key} if self._same_input and note.classes is not None else set()
            elif classes[key] not in (None, note.classes):
                relabelled.add(key)
            elif is_older(note.image, stamp(key)):
                repainted.add(key)
        for keys, one, many, told in (
            (relabelled, "mask was", "masks were", "made for other labels; made again"),
            (repainted, "image was", "images were", f"replaced ({some(repainted, 3)}); masks made again"),
            (gone, "image is", "images are", f"not in the input any more ({some(gone, 3)}); masks deleted"),
        ):
            if keys:
                self.notes.append(f"{counted(len(keys), one, many)} {told}")
            for key in keys:
                if notes[key].classes is not None:  # ours
                    self._path(key).unlink(missing_ok=True)
            self.done -= keys
            self._empty.forget(keys)

    def replaced(self, stamp: Callable[[str], FileStamp]) -> set[str]:
        """Ids of masks that were made from another image file than is there now; ``stamp``: from an id to that."""
        return {key for key in self.done if is_older(label_mask_note(self._path(key)).image, stamp(key))}

    def _path(self, identifier: str) -> Path:
        return self.folder / f"{identifier}.png"

    def _recorded(self, plan: Path) -> Manifest:
        try:
            stored = json.loads(plan.read_text(encoding="utf-8"))
            if not isinstance(stored, dict):
                raise ValueError("not a manifest")
        except (OSError, ValueError, RecursionError) as error:
            raise StoreError(f"{plan}: damaged; start again with --overwrite") from error
        return stored

    def units(self, samples: Sequence[Sample]) -> list[Unit]:
        """This run's units, without what is done (:func:`~clipseed.store.units.missing_units`)."""
        return missing_units(samples, self._unit_size, self._shard, self.done)

    def write(self, unit: Unit, results: Sequence[Labelled]) -> None:
        """Store the masks of a unit, each with the classes that it was made for and its image file's digest in it."""
        for result in results:
            self._write(result.id, result.labels, result.classes, result.stamp)

    def _write(self, identifier: str, labels: LabelMask, classes: tuple[int, ...], image: FileStamp) -> None:
        path = self._path(check_id(identifier, str(self.folder)))
        gone = without_pixel(classes, labels)
        self._empty.add(identifier, classes, gone)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if gone and self._policy == "skip":
                path.unlink(missing_ok=True)  # one that was made for other labels
                self._without_mask[identifier] = (classes, gone)
                return
        if gone and self._policy == "ignore":
            labels = background_to_ignore(labels)
        self._pixels += labels.size
        self._ignored += int((labels == IGNORE).sum())
        write_label_mask(path, labels, LabelMaskNote(classes, gone, image))
        self.done.add(identifier)

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """Images that have no mask because some label got no pixel, with that as the reason."""
        return [
            (key, f"no pixel of {', '.join(map(self._empty.name, gone))} (--empty skip)")
            for key, (_, gone) in self._without_mask.items()
        ]

    def finish(self, ids: Sequence[str], skipped: Sequence[tuple[str, str]] = ()) -> Finished:
        """End the run and list what was skipped; of several runs the last one lists it for all.

        Args:
            ids: All of the data set.
            skipped: Images without a mask, with reasons.
        """
        listed: Sequence[tuple[str, str]] = skipped
        if not self._shard.whole:
            report = self._reports.report(skipped, self._without_mask)
            reported = self._reports.reported()
            if not reported:  # two were last at once, and the other one is through with it
                return self._finished(None, 0, self._empty_of(self.own(ids)))
            missing = self._shard.count - reported
            if missing:
                return self._finished(report if skipped else None, missing, self._empty_of(self.own(ids)))
            listed = self._reports.skipped()
            for key, (classes, gone) in self._reports.empty().items():
                self._empty.add(key, classes, gone)
        path = write_skipped(self.folder / "skipped.csv", listed)
        self._look(self._masks())
        empty = self._empty.write()
        self._reports.remove()
        return self._finished(path, 0, empty)

    def _finished(self, skipped_file: Path | None, open_shards: int, empty: EmptyLabels) -> Finished:
        return Finished(skipped_file, open_shards, empty, self._ignored / max(1, self._pixels))

    def _empty_of(self, ids: Collection[str]) -> EmptyLabels:
        self._look(self.done.intersection(ids))
        return self._empty.found(ids)

    def _look(self, ids: Iterable[str]) -> None:
        """Read off masks that are there which classes they were made for, and which got no pixel."""
        for key in ids:
            if key not in self._empty.classes:
                note = label_mask_note(self._path(key))
                if note.classes is not None:
                    self._empty.add(key, note.classes, note.empty)
