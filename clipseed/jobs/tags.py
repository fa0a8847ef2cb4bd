"""``--labels auto``: CLIP tags the images that have no labels, before ``clipseed cam`` computes their maps.

The tags stand beside the output in a label file that people can correct and give back with ``--labels``. A second file
remembers how they were made, with their scores: the same command again uses them as they are, other settings make them
anew, and a label file that somebody edited is never overwritten.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from clipseed.clip.model import FrozenClip
from clipseed.clip.tagging import tag
from clipseed.clip.text import TextBank
from clipseed.data.labels import Labels
from clipseed.data.listing import clean_id
from clipseed.data.types import ImageReader, ImageSet, Sample
from clipseed.data.vocabulary import Vocabulary
from clipseed.errors import InputError, StoreError
from clipseed.jobs.cam import CamOptions
from clipseed.jobs.features import Feature, FeatureOptions, cut_units, stream_features
from clipseed.runtime.interrupt import interruptible
from clipseed.runtime.run import Start
from clipseed.runtime.stream import StreamStats
from clipseed.store.differences import differences
from clipseed.store.files import write_text
from clipseed.store.manifest import Manifest
from clipseed.store.seed_writer import SeedWriter

_SAVE_EVERY = 20.0
"""Seconds of work that a kill may cost."""
_SETTINGS = ("max_side", "min_side", "paper", "exif")
"""Options of ``clipseed cam`` that change tags."""

Scores = dict[str, dict[int, float]]
"""Sample id to its tags' probabilities by class index, the most probable first."""


@dataclass
class TagReport:
    """What tagging did.

    Attributes:
        path: The label file.
        tagged: Images of this run that CLIP tagged, now or earlier; ``computed`` of them now.
        empty: Those of them in which it found no class: all background.
        skipped: Images that could not be read, with reasons.
    """

    path: Path
    tagged: int
    computed: int
    empty: int
    skipped: dict[str, str] = field(default_factory=dict)


def label_file(out: Path, portable: bool) -> Path:
    """Where the tags of an output go: ``NAME.labels.csv`` beside ``NAME.h5``, or ``DIR/labels.csv``."""
    return out.with_name(f"{out.stem}.labels.csv") if portable else out / "labels.csv"


def tag_unlabelled(
    options: CamOptions,
    image_set: ImageSet,
    tagger: Callable[[], tuple[FrozenClip, TextBank]],
    output: SeedWriter,
    replaced: Collection[str] = (),
    start: Start | None = None,
) -> tuple[ImageSet, TagReport]:
    """Give tags to every sample without labels; those that cannot be read stay without.

    Args:
        options: The rule (``tag_threshold``, ``tag_top_k``), and how to run.
        image_set: The data set.
        tagger: Gives the model, and the prototypes of the vocabulary; not called where nothing is to be tagged.
        output: Where the maps go, locked; :func:`label_file` stands beside it and holds the data set's own labels too.
        replaced: Images whose earlier tags are those of another image.
        start: Begins to show progress.

    Raises:
        StoreError: the label file was edited, is not ours, or cannot be written.
    """
    path = label_file(output.out, output.portable)
    store = _TagStore(path, _deciding(output.manifest), image_set)
    if not options.run.overwrite:
        store.load()
    store.refuse_foreign()
    store.scores = {key: found for key, found in store.scores.items() if key not in replaced}
    unlabelled = [sample for sample in image_set.samples if sample.labels is None]
    todo = sum(sample.id not in store.scores for sample in unlabelled)
    stats = StreamStats()
    if todo:
        stats = _tag(options, image_set.reader, unlabelled, *tagger(), store, start)
    else:
        store.save()
    samples = [_with_tags(sample, store.scores) for sample in image_set.samples]
    tagged = [sample.id for sample in unlabelled if sample.id in store.scores]
    empty = sum(not store.scores[key] for key in tagged)
    report = TagReport(path, len(tagged), stats.computed, empty, dict(stats.skipped))
    return replace(image_set, samples=samples), report


def _tag(
    options: CamOptions, reader: ImageReader, unlabelled: Sequence[Sample], clip: FrozenClip, text: TextBank,
    store: _TagStore, start: Start | None,
) -> StreamStats:  # fmt: skip
    """Tag what is not in the store yet, and save."""
    units = cut_units(unlabelled, clip.tower.device)
    missing = [[sample for sample in unit if sample.id not in store.scores] for unit in units]
    todo = sum(map(len, missing))

    def write(features: Sequence[Feature]) -> None:
        if not features:
            return
        probability = text.probabilities(torch.stack([row for _, row in features]))
        tags = tag(probability, store.classes, options.tag_threshold, options.tag_top_k)
        for (key, _), row, found in zip(features, probability, tags, strict=True):
            store.scores[key] = {k: float(row[k]) for k in found}
        store.save_now_and_then()

    run = FeatureOptions(options.max_side, options.min_side, options.run.batch_size, options.run.workers)
    advance = start(todo, len(unlabelled) - todo) if start else (lambda count, stats: None)
    with interruptible(lambda: f"interrupted; {len(store.scores)} images are tagged. Run the same command again."):
        try:
            return stream_features(clip, reader, missing, run, write, advance)
        finally:
            store.save()


def _with_tags(sample: Sample, scores: Scores) -> Sample:
    if sample.labels is not None or sample.id not in scores:
        return sample
    return replace(sample, labels=tuple(scores[sample.id]))


def _deciding(manifest: Manifest) -> Manifest:
    """What of an output's settings decides its tags."""
    parts: Manifest = {part: manifest.get(part) for part in ("model", "vocabulary", "dataset")}
    return {**parts, "options": {key: manifest["options"].get(key) for key in _SETTINGS}}


class _TagStore:
    """The label file and what is known about it (``NAME.tags.json`` beside it)."""

    def __init__(self, path: Path, settings: Manifest, image_set: ImageSet) -> None:
        self._path, self._settings, self._set = path, settings, image_set
        self._memory = path.with_name(path.name.removesuffix("labels.csv") + "tags.json")
        self._saved = time.monotonic()
        self.classes = len(image_set.vocabulary.classes)
        self.scores: Scores = {}

    def load(self) -> None:
        """Take over earlier tags, if they were made with the same settings and the label file is still there."""
        memory = self._remembered()
        if memory is None or not self._path.is_file() or differences(memory["settings"], self._settings):
            return
        vocabulary = self._set.vocabulary
        self.scores = {
            key: {vocabulary.index(name, str(self._memory)): value for name, value in found.items()}
            for key, found in memory["tags"].items()
        }

    def refuse_foreign(self) -> None:
        """Do not touch a label file that somebody wrote or edited.

        Raises:
            StoreError: it is one.
        """
        ours = (self._remembered() or {}).get("sha256", [])
        if self._path.is_file() and _digest(self._path.read_bytes()) not in ours:
            raise StoreError(
                f"{self._path}: --labels auto would overwrite this file, which is not as CLIP's tags left it; use it "
                f"with --labels {self._path} and another --out, or move it away to have the images tagged again"
            )

    def _remembered(self) -> dict[str, Any] | None:
        try:
            memory = json.loads(self._memory.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        known = {"settings": dict, "sha256": list, "tags": dict}
        if not isinstance(memory, dict) or not all(isinstance(memory.get(key), kind) for key, kind in known.items()):
            return None
        if not all(isinstance(found, dict) for found in memory["tags"].values()):
            return None
        return memory

    def save_now_and_then(self) -> None:
        """Save when much work has gathered."""
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write both files where they changed.

        The memory comes first and knows the old label file as well as the new one, so that a crash between the two
        does not make either look like somebody's edit.
        """
        content = labels_csv(self._labels(), self._set.vocabulary)
        old = _digest(self._path.read_bytes()) if self._path.is_file() else None
        new = _digest(content.encode())
        names = self._set.vocabulary.class_names
        memory = {
            "settings": self._settings,
            "sha256": sorted({new, old} - {None}, key=str),
            "tags": {key: {names[k]: value for k, value in found.items()} for key, found in self.scores.items()},
        }
        write_text(self._memory, json.dumps(memory, indent=1))
        if old != new:
            write_text(self._path, content)
        self._saved = time.monotonic()

    def _labels(self) -> Labels:
        """All labels known: the data set's own and the tags in its order, then tags of images not in this run."""
        own = {
            sample.id: sample.labels if sample.labels is not None else tuple(self.scores[sample.id])
            for sample in self._set.samples
            if sample.labels is not None or sample.id in self.scores
        }
        return {**own, **{key: tuple(found) for key, found in self.scores.items() if key not in own}}


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
