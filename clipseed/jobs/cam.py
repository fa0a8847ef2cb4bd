"""``clipseed cam``: stream a data set through frozen CLIP and store its class activation maps."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clipseed.cam.methods import Method, compute_cams
from clipseed.clip.model import TOY_WEIGHTS, FrozenClip, model_name, same_model, weights_location
from clipseed.clip.tagging import tag
from clipseed.clip.text import TextBank
from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.data.labels import Labels
from clipseed.data.listing import clean_id
from clipseed.data.types import ImageReader, ImageSet, Sample
from clipseed.data.vocabulary import Vocabulary
from clipseed.defaults import CAM_MAX_SIDE, TAG_THRESHOLD, WEIGHTS
from clipseed.device import pick_device
from clipseed.errors import InputError, StoreError, UsageError
from clipseed.jobs.refine import caa_manifest, caa_options, refine_manifest
from clipseed.refine.caa import CaaOptions, caa
from clipseed.runtime.features import Feature, FeatureOptions, cut_units, stream_features
from clipseed.runtime.images import (
    LoadedViews,
    ViewLoader,
    batches_in_flight,
    dealt_unit,
    decode_ahead,
    default_workers,
    stacked,
    token_budget,
    unit_size_for,
)
from clipseed.runtime.interrupt import interruptible
from clipseed.runtime.run import Loading, RunOptions, RunReport, Start, open_engine, run
from clipseed.runtime.stream import BatchSize, StreamStats
from clipseed.runtime.work import Deferred, LocalEngine, Work
from clipseed.store.cam_records import Cam
from clipseed.store.cam_writer import CamWriter
from clipseed.store.differences import differences
from clipseed.store.empty import stage_of
from clipseed.store.files import write_text
from clipseed.store.manifest import Manifest, package_versions
from clipseed.store.writer import recorded_manifest


@dataclass(frozen=True)
class CamOptions:
    """Everything ``clipseed cam`` can be told.

    ``paper`` reproduces CLIP-ES's released code: its half-precision rounding, its word lists, native image size,
    and maps stored in float32 so that later rounding is the released one. With ``refine`` the output is what
    ``clipseed refine caa`` would make of the maps; ``box_threshold`` as there.
    """

    data: DatasetOptions
    out: Path
    model: str | None = None
    weights: str | None = None
    method: Method = "softmax-gradcam"
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    max_side: int = CAM_MAX_SIDE
    min_side: int = 0
    paper: bool = False
    refine: Literal["caa"] | None = None
    caa: CaaOptions = field(default_factory=CaaOptions)
    box_threshold: float | None = None
    tag_threshold: float = TAG_THRESHOLD
    tag_top_k: int | None = None
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def chosen_weights(self) -> str:
        """Tag or file of the model's weights."""
        return self.weights or (TOY_WEIGHTS if self.data.dataset == "toy" else WEIGHTS)

    @property
    def model_name(self) -> str:
        """The model, for people."""
        return model_name(self.model, self.chosen_weights)


@dataclass(kw_only=True)
class CamReport(RunReport):
    """What a run did; ``tags``: of images without labels."""

    tags: TagReport | None = None


StartOn = Callable[[ImageSet], Start]
"""From the data set, once it is read, to the callback that begins to show progress."""


def run_cam(
    options: CamOptions, start: StartOn | None = None, start_tags: Start | None = None, loading: Loading | None = None
) -> CamReport:
    """Compute and store the class activation maps of a data set; resumes what an earlier run began.

    Args:
        options: What to do.
        start: Begins to show progress, once the data set is read.
        start_tags: The same for tagging images without labels, which comes first when the options ask for it.
        loading: Called before the model is loaded; when there is nothing to do, it is not.

    Raises:
        ClipseedError: see the modules it uses; images that cannot be read are skipped and reported instead.
    """
    _check(options)
    image_set = open_dataset(options.data)
    recipe = CamRecipe(options, image_set.vocabulary, image_set.reader)
    say = partial(loading, options.model_name) if loading else None
    with contextlib.closing(open_engine(recipe, options.run.cluster, recipe.known(), say)) as engine:
        return _run(options, image_set, recipe, engine, start, start_tags)


def _run(
    options: CamOptions, image_set: ImageSet, recipe: CamRecipe, engine: Deferred[Cam], start: StartOn | None,
    start_tags: Start | None,
) -> CamReport:  # fmt: skip
    about, shard = engine.about, options.run.shard
    manifest = cam_manifest(options, image_set, about["model"], about["weights"])
    stage = stage_of(manifest)  # in one pass, too: spreading leaves a positive map positive
    if recipe.refinement:
        manifest = refine_manifest("caa", caa_manifest(recipe.refinement), manifest, about["model"], about["weights"])
    dtype = "float32" if options.paper else "float16"
    unit = dealt_unit(about["unit"], len(image_set.samples), shard.count * engine.hands)
    with CamWriter(
        options.out, manifest, dtype, unit, overwrite=options.run.overwrite, shard=shard, stage=stage
    ) as writer:
        reader = image_set.reader
        files = {sample.id: reader.file(sample) for sample in image_set.samples if sample.id in writer.done}
        replaced = writer.forget_replaced(files)
        tags = None
        if options.data.auto_labels:

            def tagger() -> tuple[FrozenClip, TextBank]:
                work = engine.engine.work if isinstance(engine.engine, LocalEngine) else recipe()
                assert isinstance(work, CamWork)
                return work.clip, work.text

            image_set, tags = tag_unlabelled(options, image_set, tagger, writer, replaced, start_tags)
        samples = image_set.samples
        writer.forget_unlike({sample.id: sample.labels for sample in samples})
        untagged = {} if tags is None else tags.skipped
        unlabelled = [sample.id for sample in samples if sample.labels is None]
        unusable = {key: untagged.get(key, "no labels are given for it") for key in unlabelled}
        done = run(engine, writer, samples, start(image_set) if start else None, shard=shard, unusable=unusable)
    return CamReport(**vars(done), tags=tags)


def _check(options: CamOptions) -> None:
    if not options.scales or any(not 0.1 <= scale <= 8 for scale in options.scales):
        raise UsageError("--scales: give factors between 0.1 and 8, such as 0.5,1.0,1.5")
    options.run.check()
    if not 0 < options.tag_threshold <= 1 or (options.tag_top_k is not None and options.tag_top_k < 1):
        raise UsageError("--tag-threshold: give a share above 0 and up to 1; --tag-top-k: a number from 1")
    if options.refine and 1.0 not in options.scales:
        raise UsageError("--refine caa needs 1 among the --scales, whose attention it spreads along")
    if options.max_side < 0 or options.min_side < 0:
        raise UsageError("--max-side and --min-side: give a number of pixels, or 0 for no limit")


def tag_settings(options: CamOptions) -> dict[str, Any]:
    """What a manifest says about labels that CLIP gave."""
    return {"labels": "auto", "tag_threshold": options.tag_threshold, "tag_top_k": options.tag_top_k}


def cam_manifest(options: CamOptions, image_set: ImageSet, model: dict[str, Any], weights: str) -> Manifest:
    """Everything that decides the maps, and where the images are."""
    return {
        "kind": "cam",
        "method": options.method,
        "options": {
            "scales": list(options.scales),
            "flip": options.flip,
            "max_side": options.max_side,
            "min_side": options.min_side,
            "paper": options.paper,
            "exif": options.data.exif,
        },
        "model": model,
        "weights": weights,
        "max_pixels": options.data.max_pixels,
        "vocabulary": image_set.vocabulary.as_dict(),
        "dataset": {
            "name": image_set.name,
            "root": str(image_set.root) if image_set.root else None,
            "split": image_set.split,
            "ground_truth": image_set.ground_truth,
            **image_set.source,
            **(tag_settings(options) if options.data.auto_labels else {}),
        },
        "versions": package_versions(),
    }


@dataclass(frozen=True)
class CamRecipe:
    """Loads the model that a run needs."""

    options: CamOptions
    vocabulary: Vocabulary
    reader: ImageReader

    @property
    def refinement(self) -> CaaOptions | None:
        """Constants of refining in the same pass."""
        if not self.options.refine:
            return None
        return caa_options(self.options.caa, self.options.box_threshold, self.vocabulary.name, self.options.paper)

    def known(self) -> dict[str, Any] | None:
        """What :meth:`CamWork.about` would say, if the output that is there was made with the same model."""
        options = self.options
        there = None if options.run.overwrite else recorded_manifest(options.out)
        if there is None or not isinstance(there.get("model"), dict):
            return None
        model, device = there["model"], pick_device(options.run.device)
        if not same_model(
            model, options.model, options.chosen_weights, device, options.run.precision, released_rounding=options.paper
        ):
            return None
        return {
            "model": model,
            "weights": weights_location(options.chosen_weights),
            "device": str(device),
            "unit": unit_size_for(device),
        }

    def __call__(self) -> CamWork:
        """Load it."""
        return CamWork(self)


class CamWork(Work[LoadedViews, Cam]):
    """Images to maps."""

    def __init__(self, recipe: CamRecipe) -> None:
        super().__init__()
        options = self._options = recipe.options
        self.clip = FrozenClip.load(
            options.model,
            options.chosen_weights,
            options.run.device,
            options.run.precision,
            released_rounding=options.paper,
        )
        self.text = self.clip.encode_text(recipe.vocabulary)
        self._refinement, self._reader = recipe.refinement, recipe.reader
        device = self.clip.tower.device
        self.workers = options.run.workers if options.run.workers is not None else default_workers(device)
        self.batch = BatchSize(options.run.batch_size, token_budget(device))
        self.ahead = decode_ahead(device, self.workers) + 2 * (options.run.batch_size or 0)
        self.queue, self.lanes = batches_in_flight(device), 2

    def about(self) -> dict[str, Any]:
        """Model, where its weights are, device, and images per unit."""
        device = self.clip.tower.device
        return {
            "model": self.clip.manifest(),
            "weights": self.clip.location,
            "device": str(device),
            "unit": unit_size_for(device),
        }

    @property
    def loader(self) -> ViewLoader:
        """Decodes images at the scales of the run."""
        options = self._options
        return ViewLoader(self._reader, self.clip.tower.patch, options.scales, options.max_side, options.min_side)

    def compute(self, items: Sequence[LoadedViews]) -> list[Cam]:
        """Maps of a batch."""
        labels = [item.sample.labels or () for item in items]
        if not labels[0]:  # images that show no class need no model
            maps = [torch.zeros(0, *items[0].grid) for _ in items]
        else:
            device = self.clip.tower.device
            scales = range(len(self._options.scales))
            views = [stacked([item.views[k] for item in items], device) for k in scales]
            options, grid = self._options, items[0].grid
            layers = self._refinement.layers if self._refinement else 0
            batch = compute_cams(
                self.clip, self.text, views, labels, grid, options.method, options.flip, options.paper, layers
            )
            maps = batch.maps
            if self._refinement and batch.attention is not None:
                # Rounded as `clipseed cam` would have stored them, so that one pass gives what two commands give.
                stored = maps if options.paper else [cam.half().float() for cam in maps]
                maps = caa(stored, batch.attention, self._refinement)
            self.counters["recomputed"] += batch.recomputed
        return [
            Cam(item.sample.id, np.array(row, np.int32), cam.numpy(), item.size, item.stamp)
            for item, row, cam in zip(items, labels, maps, strict=True)
        ]


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
    output: CamWriter,
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
