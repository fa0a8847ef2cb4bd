"""Labels that CLIP gave: the label file of an output, and what is known about it.

``NAME.labels.csv`` (``labels.csv`` in a folder of units) is what the user reads, corrects and gives back.
``NAME.tags.json`` beside it, the *memory*, knows the scores, the settings, and the label file's digest, by which an
edited one is noticed. A run of one shard keeps its tags in a memory of its own (``NAME.tags-1-of-2.json``); whoever
finds that all images of the data set are tagged, or could not be read, puts the label file together.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from clipseed.data.labels import Labels
from clipseed.data.listing import clean_id
from clipseed.data.types import ImageSet, Sample
from clipseed.data.vocabulary import Vocabulary
from clipseed.errors import InputError, StoreError
from clipseed.store.differences import differences
from clipseed.store.files import remove_leftovers_of, write_text
from clipseed.store.manifest import Manifest, dumps
from clipseed.store.shards import WHOLE, Shard
from clipseed.store.units import Unit, missing_units, own_items
from clipseed.store.writer import Finished

_SAVE_EVERY = 20.0
"""Seconds of work that a kill may cost."""

Scores = dict[str, dict[int, float]]
"""Sample id to its tags' probabilities by class index, the most probable first."""


@dataclass(frozen=True)
class Tagged:
    """The tags of one image: probabilities by class index, the most probable first."""

    id: str
    scores: dict[int, float]


def label_file(out: Path, portable: bool) -> Path:
    """Where the tags of an output go: ``NAME.labels.csv`` beside ``NAME.h5``, or ``DIR/labels.csv``."""
    return out.with_name(f"{out.stem}.labels.csv") if portable else out / "labels.csv"


class TagStore:
    """An :class:`~clipseed.runtime.run.Output` of tags. Use as a context manager: leaving it saves what there is.

    Args:
        path: The label file.
        settings: What decides tags.
        image_set: The data set; samples that have labels of their own get no tags, and keep them in the label file.
        unit_size: Samples per unit.
        shard: Which units are this run's.
        overwrite: Forget earlier tags.
        replaced: Images whose earlier tags are those of another image.

    Attributes:
        scores: All tags known: of this data set, and of images that earlier runs had.

    Raises:
        StoreError: the label file was edited, is not ours, or cannot be written.
    """

    def __init__(
        self, path: Path, settings: Manifest, image_set: ImageSet, unit_size: int, *, shard: Shard = WHOLE,
        overwrite: bool = False, replaced: Collection[str] = (),
    ) -> None:  # fmt: skip
        self._settings, self._set = json.loads(dumps(settings)), image_set  # in an order that is always the same
        self._unit_size, self._shard = unit_size, shard
        self._prefix = path.name.removesuffix("labels.csv")
        self._memory = path.with_name(f"{self._prefix}tags.json")
        self.out = path
        self.folder = self._memory if shard.whole else path.with_name(f"{self._prefix}tags-{shard.tag}.json")
        self.notes: list[str] = []
        self.left_out: list[tuple[str, str]] = []
        self._labelled = {sample.id for sample in image_set.samples if sample.labels is not None}
        self._saved, self._dirty = time.monotonic(), False
        self._refuse_foreign()
        for written in {self.folder, *((self.out,) if shard.whole else ())}:
            remove_leftovers_of(written)
        if overwrite:
            self._remove_parts()
        self.scores: Scores = {} if overwrite else self._known()[0]
        for key in replaced:
            self.scores.pop(key, None)

    @property
    def done(self) -> frozenset[str]:
        """Ids of images with tags."""
        return frozenset(self.scores)

    def own(self, items: Sequence[str]) -> list[str]:
        """Those of the data set's ids without labels that are this run's to tag."""
        return [key for key in own_items(items, self._unit_size, self._shard) if key not in self._labelled]

    def units(self, samples: Sequence[Sample]) -> list[Unit]:
        """This run's units, without what has labels or tags."""
        return missing_units(samples, self._unit_size, self._shard, self._labelled | self.scores.keys())

    def write(self, unit: Unit, records: Sequence[Tagged]) -> None:
        """Take tags over; when much work has gathered, save them."""
        self.scores |= {record.id: record.scores for record in records}
        self._dirty = self._dirty or bool(records)
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self._save()

    def finish(self, ids: Sequence[str], skipped: Sequence[tuple[str, str]] = ()) -> Finished:
        """Save; one of several runs puts the label file together if no image is left to be tagged.

        Raises:
            StoreError: the label file was edited meanwhile.
        """
        if self._shard.whole:
            self._put(self.scores, {key for key, _ in skipped}, last=True)
            self._remove_parts()
            return Finished(None)
        lost = {key for key, _ in skipped}
        if self._all_common(ids, lost):
            self.folder.unlink(missing_ok=True)
        else:
            self._save(lost)
        scores, given_up = self._known()
        there = scores.keys() | given_up | self._labelled
        shards = [Shard(index, self._shard.count) for index in range(self._shard.count)]
        missing = sum(not there.issuperset(own_items(ids, self._unit_size, shard)) for shard in shards)
        if not missing:
            self._put(scores, given_up, last=True)
            self._remove_parts()
        return Finished(None, missing)

    def labelled(self, sample: Sample) -> Sample:
        """A sample with its tags, if it has no labels of its own and is tagged."""
        if sample.labels is not None or sample.id not in self.scores:
            return sample
        return Sample(sample.id, sample.path, tuple(self.scores[sample.id]))

    def __enter__(self) -> TagStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._dirty:
            self._save()

    def _known(self) -> tuple[Scores, set[str]]:
        """Tags that any run made with the same settings, and the images that shards could not read.

        The common memory counts while its label file is there: whoever moves that away wants images tagged again. It is
        read before those of shards, because what puts it together deletes them.
        """
        scores, given_up = self._common()
        parts = sorted(self._parts(), key=lambda path: path.name.endswith(f"-of-{self._shard.count}.json"))
        for part in map(_read, parts):  # those of other cuts, which are older, first
            found, lost = self._told(part)
            scores = {key: row for key, row in scores.items() if key not in lost} | found
            given_up = (given_up | lost) - found.keys()
        return scores, given_up

    def _common(self) -> tuple[Scores, set[str]]:
        return self._told(_read(self._memory) if self.out.is_file() else None)

    def _all_common(self, ids: Sequence[str], lost: Collection[str]) -> bool:
        """Whether this shard has nothing to say that the common memory does not."""
        scores, given_up = self._common()
        return given_up.issuperset(lost) and all(
            key in lost or (key in scores and scores[key] == self.scores.get(key)) for key in self.own(ids)
        )

    def _told(self, memory: dict[str, Any] | None) -> tuple[Scores, set[str]]:
        """What a memory says of tags and of images without, if it was made with the same settings."""
        if memory is None or differences(memory["settings"], self._settings):
            return {}, set()
        index = self._set.vocabulary.index
        scores = {
            key: {index(name, str(self._memory)): value for name, value in found.items()}
            for key, found in memory["tags"].items()
        }
        return scores, set(map(str, memory["skipped"])) - scores.keys()

    def _parts(self) -> list[Path]:
        """The memories of shards."""
        return list(self.out.parent.glob(f"{glob.escape(self._prefix)}tags-*-of-*.json"))

    def _remove_parts(self) -> None:
        for path in self._parts():
            path.unlink(missing_ok=True)

    def _refuse_foreign(self) -> None:
        """Do not touch a label file that somebody wrote or edited."""
        ours = (_read(self._memory) or {}).get("sha256", [])
        if self.out.is_file() and _digest(self.out.read_bytes()) not in ours:
            raise StoreError(
                f"{self.out}: --labels auto would overwrite this file, which is not as CLIP's tags left it; use it "
                f"with --labels {self.out} and another --out, or move it away to have the images tagged again"
            )

    def _save(self, skipped: Collection[str] = ()) -> None:
        """Write what there is: the label file, or one shard's part of it."""
        if self._shard.whole:
            self._put(self.scores)
        else:
            ids = [sample.id for sample in self._set.samples]
            own = {key: self.scores[key] for key in self.own(ids) if key in self.scores}
            self._write_memory(self.folder, own, skipped, [])
        self._saved, self._dirty = time.monotonic(), False

    def _put(self, scores: Scores, skipped: Collection[str] = (), *, last: bool = False) -> None:
        """Write the label file and its memory where they changed.

        The memory comes first and knows the old label file as well as the new one, so that a crash between the two
        does not make either look like somebody's edit; the ``last`` one of a run knows the new one alone.
        """
        self._refuse_foreign()
        ids = dict.fromkeys(sample.id for sample in self._set.samples)
        ordered = {key: scores[key] for key in (*ids, *(key for key in scores if key not in ids)) if key in scores}
        content = labels_csv(self._labels(ordered), self._set.vocabulary)
        old = _digest(self.out.read_bytes()) if self.out.is_file() else None
        new = _digest(content.encode())
        self._write_memory(self._memory, ordered, skipped, sorted({new, old} - {None}, key=str))
        if old != new:
            write_text(self.out, content)
            if last and old is not None:
                self._write_memory(self._memory, ordered, skipped, [new])
        self._saved, self._dirty = time.monotonic(), False

    def _write_memory(
        self, path: Path, scores: Scores, skipped: Collection[str], digests: Sequence[str | None]
    ) -> None:
        names = self._set.vocabulary.class_names
        tags = {key: {names[k]: value for k, value in found.items()} for key, found in scores.items()}
        memory = {"settings": self._settings, "sha256": digests, "tags": tags, "skipped": sorted(skipped)}
        write_text(path, json.dumps(memory, indent=1))

    def _labels(self, scores: Scores) -> Labels:
        """All labels known: the data set's own and the tags in its order, then tags of images not in this run."""
        own = {
            sample.id: sample.labels if sample.labels is not None else tuple(scores[sample.id])
            for sample in self._set.samples
            if sample.labels is not None or sample.id in scores
        }
        return {**own, **{key: tuple(found) for key, found in scores.items() if key not in own}}


def _read(path: Path) -> dict[str, Any] | None:
    """A memory; ``None`` where there is none that can be read."""
    try:
        memory = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = {"settings": dict, "sha256": list, "tags": dict}
    if not isinstance(memory, dict) or not all(isinstance(memory.get(key), kind) for key, kind in known.items()):
        return None
    if not all(isinstance(found, dict) for found in memory["tags"].values()):
        return None
    if not isinstance(memory.setdefault("skipped", []), list):  # older versions did not list them
        return None
    return memory


def labels_csv(labels: Labels, vocabulary: Vocabulary) -> str:
    """Rows ``id,label`` for :func:`~clipseed.data.labels.read_labels`; an id without labels has an empty one."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["id", "label"])
    for key, found in labels.items():
        # The reader takes one image suffix off an id, and splits cells at these characters.
        name = key if _reads_back(key) else f"{key}.png"
        words = [str(k) if set(";|") & set(vocabulary.class_names[k]) else vocabulary.class_names[k] for k in found]
        table.writerows([name, word] for word in words or [""])
    return buffer.getvalue()


def _reads_back(identifier: str) -> bool:
    try:
        return clean_id(identifier, "") == identifier
    except InputError:
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
