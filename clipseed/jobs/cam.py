"""``clipseed cam``: stream a data set through frozen CLIP and store its class activation maps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clipseed.cam.methods import Method, compute_cams
from clipseed.clip.model import FrozenClip, chosen_weights, model_name
from clipseed.clip.tagging import tag
from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.data.types import ImageReader, ImageSet, Sample
from clipseed.data.vocabulary import Vocabulary
from clipseed.defaults import CAM_MAX_SIDE, TAG_THRESHOLD
from clipseed.errors import UsageError
from clipseed.jobs.refine import caa_manifest, caa_options, refine_manifest
from clipseed.refine.caa import CaaOptions, caa
from clipseed.runtime.clip_work import ClipChoice, ClipWork
from clipseed.runtime.features import features_of
from clipseed.runtime.images import LoadedViews, ViewLoader, dealt_unit, stacked
from clipseed.runtime.run import Loading, RunOptions, RunReport, Start, open_engine, run
from clipseed.runtime.work import Deferred
from clipseed.store.cam_records import Cam
from clipseed.store.cam_writer import CamWriter
from clipseed.store.empty import Stage, stage_of
from clipseed.store.manifest import Manifest, package_versions
from clipseed.store.tags import Tagged, TagStore, label_file
from clipseed.store.writer import recorded_manifest
from clipseed.train.prompts.files import PromptFile, read_prompts, text_of


@dataclass(frozen=True)
class CamOptions:
    """Everything ``clipseed cam`` can be told.

    ``paper`` reproduces CLIP-ES's released code: its half-precision rounding, its word lists, native image size,
    and maps stored in float32 so that later rounding is the released one. With ``refine`` the output is what
    ``clipseed refine caa`` would make of the maps; ``box_threshold`` as there. ``prompts`` are learned ones, in place
    of the vocabulary's words; ``softmax_floor`` see :func:`~clipseed.clip.text.masked_softmax`. With ``raw`` maps keep
    the scale and the sign that they have, in float32, which FMA-WSSS's steps build on.
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
    prompts: Path | None = None
    raw: bool = False
    softmax_floor: float = 0.0
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def chosen_weights(self) -> str:
        """Tag or file of the model's weights."""
        return chosen_weights(self.weights, self.data.dataset)

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
    options: CamOptions, start: StartOn | None = None, start_tags: StartOn | None = None, loading: Loading | None = None
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
    check(options)
    image_set, learned = open_with_prompts(options.data, options.prompts)
    recipe = CamRecipe(options, image_set.vocabulary, image_set.reader, learned)
    say = partial(loading, options.model_name) if loading else None
    with contextlib.closing(open_engine(recipe, options.run.cluster, recipe.known(), say)) as engine:
        return _run(options, image_set, recipe, engine, start, start_tags)


def open_with_prompts(data: DatasetOptions, prompts: Path | None) -> tuple[ImageSet, PromptFile | None]:
    """A data set, whose classes are those of the learned prompts, where there are any.

    Raises:
        ClipseedError: as of the data set, or of the prompts.
    """
    learned = None if prompts is None else read_prompts(prompts, data.classes, data.dataset)
    return open_dataset(data if learned is None else learned.dataset(data)), learned


def _run(
    options: CamOptions, image_set: ImageSet, recipe: CamRecipe, engine: Deferred[Any], start: StartOn | None,
    start_tags: StartOn | None,
) -> CamReport:  # fmt: skip
    about, shard = engine.about, options.run.shard
    manifest, stage = recipe.manifest(image_set, about)
    dtype = "float32" if options.paper or options.raw else "float16"
    unit = dealt_unit(about["unit"], len(image_set.samples), shard.count * engine.hands)
    with CamWriter(
        options.out, manifest, dtype, unit, overwrite=options.run.overwrite, shard=shard, stage=stage
    ) as writer:
        reader = image_set.reader
        files = {sample.id: reader.file(sample) for sample in image_set.samples if sample.id in writer.done}
        replaced = writer.forget_replaced(files)
        tags = None
        if options.data.auto_labels:
            begin = start_tags(image_set) if start_tags else None
            file = label_file(writer.out, writer.portable)
            image_set, tags = tag_unlabelled(
                options.run, image_set, engine, file, writer.manifest, writer.unit_size, replaced, begin
            )
        samples = image_set.samples
        known = samples
        if tags is not None:  # what other shards have not tagged yet is theirs to judge
            own = set(writer.own([sample.id for sample in samples]))
            known = [sample for sample in samples if sample.labels is not None or sample.id in own]
        writer.forget_unlike({sample.id: sample.labels for sample in known})
        unusable = without_labels(samples, tags)
        done = run(engine, writer, samples, start(image_set) if start else None, shard=shard, unusable=unusable)
    if tags is not None:  # the batch size that was lowered there is that of both
        done.stats.out_of_memory = done.stats.out_of_memory or tags.stats.out_of_memory
    return CamReport(**vars(done), tags=tags)


def without_labels(samples: Sequence[Sample], tags: TagReport | None) -> dict[str, str]:
    """Ids of images that have no labels, with the reason."""
    untagged = {} if tags is None else dict(tags.stats.skipped)
    missing = [sample.id for sample in samples if sample.labels is None]
    return {key: untagged.get(key, "no labels are given for it") for key in missing}


def check(options: CamOptions) -> None:
    """Raise UsageError for options that mean nothing."""
    if not options.scales or any(not 0.1 <= scale <= 8 for scale in options.scales):
        raise UsageError("--scales: give factors between 0.1 and 8, such as 0.5,1.0,1.5")
    options.run.check()
    if not 0 < options.tag_threshold <= 1 or (options.tag_top_k is not None and options.tag_top_k < 1):
        raise UsageError("--tag-threshold: give a share above 0 and up to 1; --tag-top-k: a number from 1")
    if options.refine and 1.0 not in options.scales:
        raise UsageError("--refine caa needs 1 among the --scales, whose attention it spreads along")
    if options.refine and options.raw:
        raise UsageError(
            "--raw: what --refine caa gives is in [0, 1]; refine raw maps with clipseed refine caa --preset"
        )
    if not 0 <= options.softmax_floor < 1:
        raise UsageError(f"--softmax-floor {options.softmax_floor}: give a number from 0 to below 1")
    if options.max_side < 0 or options.min_side < 0:
        raise UsageError("--max-side and --min-side: give a number of pixels, or 0 for no limit")
    if options.max_side and options.min_side > options.max_side:
        raise UsageError(f"--min-side {options.min_side}: is above --max-side {options.max_side}")


def tag_settings(options: CamOptions) -> dict[str, Any]:
    """What a manifest says about labels that CLIP gave."""
    return {"labels": "auto", "tag_threshold": options.tag_threshold, "tag_top_k": options.tag_top_k}


def cam_manifest(
    options: CamOptions, image_set: ImageSet, model: dict[str, Any], weights: str, learned: PromptFile | None = None
) -> Manifest:
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
            **({"raw": True} if options.raw else {}),
            **({"softmax_floor": options.softmax_floor} if options.softmax_floor else {}),
            **({} if learned is None else learned.manifest()),
        },
        **({} if learned is None else {"prompts": str(learned.path.resolve())}),
        "model": model,
        "weights": weights,
        "max_pixels": options.data.max_pixels,
        "vocabulary": image_set.vocabulary.as_dict(),
        "dataset": {
            **image_set.manifest,
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
    learned: PromptFile | None = None

    @property
    def choice(self) -> ClipChoice:
        """Which CLIP."""
        options = self.options
        return ClipChoice(options.model, options.chosen_weights, options.run, released_rounding=options.paper)

    @property
    def refinement(self) -> CaaOptions | None:
        """Constants of refining in the same pass."""
        if not self.options.refine:
            return None
        return caa_options(self.options.caa, self.options.box_threshold, self.vocabulary.name, self.options.paper)

    def known(self) -> dict[str, Any] | None:
        """What :meth:`CamWork.about` would say, if the output that is there was made with the same model."""
        return self.choice.known(recorded_manifest(self.options.out))

    def manifest(self, image_set: ImageSet, about: dict[str, Any]) -> tuple[Manifest, Stage]:
        """What decides the maps, given what the work says of itself, and the stage at which labels may vanish."""
        manifest = cam_manifest(self.options, image_set, about["model"], about["weights"], self.learned)
        stage = stage_of(manifest)  # in one pass, too: spreading leaves a positive map positive
        if self.refinement:
            constants = caa_manifest(self.refinement)
            manifest = refine_manifest("caa", constants, manifest, about["model"], about["weights"])
        return manifest, stage

    def __call__(self) -> CamWork:
        """Load it."""
        return CamWork(self)


@dataclass(frozen=True)
class CamLoader:
    """Decodes images at the scales of the run, and those without labels, which are to be tagged, at one."""

    views: ViewLoader

    def __call__(self, sample: Sample) -> LoadedViews:
        """Decode one sample.

        Raises:
            ImageError: it cannot be read.
        """
        return (self.views if sample.labels is not None else replace(self.views, scales=(1.0,)))(sample)


class CamWork(ClipWork[Cam | Tagged]):
    """Images with labels to maps, images without to tags; with the same model, loaded once (``None``: here)."""

    def __init__(self, recipe: CamRecipe, clip: FrozenClip | None = None) -> None:
        super().__init__(recipe.choice, clip)
        self._options, self._vocabulary = recipe.options, recipe.vocabulary
        self.text = text_of(self.clip, recipe.vocabulary, recipe.learned, recipe.options.softmax_floor)
        self._refinement, self._reader = recipe.refinement, recipe.reader

    @property
    def loader(self) -> CamLoader:
        """Decodes images at the scales of the run."""
        options = self._options
        return CamLoader(
            ViewLoader(self._reader, self.clip.tower.patch, options.scales, options.max_side, options.min_side)
        )

    def compute(self, items: Sequence[LoadedViews]) -> Sequence[Cam | Tagged]:
        """Maps, or tags, of a batch."""
        return self.tags(items) if items[0].sample.labels is None else self.maps(items)

    def tags(self, items: Sequence[LoadedViews]) -> list[Tagged]:
        """Classes that CLIP finds in images."""
        features, recomputed = features_of(self.clip, items)
        self.counters["recomputed"] += recomputed
        probability = self.text.probabilities(features)
        options = self._options
        tags = tag(probability, len(self._vocabulary.classes), options.tag_threshold, options.tag_top_k)
        return [
            Tagged(item.sample.id, {k: float(row[k]) for k in found})
            for item, row, found in zip(items, probability, tags, strict=True)
        ]

    def maps(self, items: Sequence[LoadedViews]) -> list[Cam]:
        """Maps of images with labels, all of them with some or all with none."""
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
                self.clip, self.text, views, labels, grid, options.method, options.flip, options.paper, layers,
                options.raw,
            )  # fmt: skip
            maps = batch.maps
            if self._refinement and batch.attention is not None:
                # Rounded as `clipseed cam` would have stored them, so that one pass gives what two commands give.
                stored = maps if options.paper else [cam.half().float() for cam in maps]
                maps = caa(stored, batch.attention, self._refinement)
            self.counters["recomputed"] += batch.recomputed
        return [
            Cam(item.sample.id, np.array(row, np.int32), cam.numpy(), item.size, item.stamp, self._options.raw)
            for item, row, cam in zip(items, labels, maps, strict=True)
        ]


_SETTINGS = ("max_side", "min_side", "paper", "exif")
"""Options of ``clipseed cam`` that change tags."""
_TEXTS = ("prompts", "softmax_floor")
"""Likewise, where they were given."""


@dataclass(kw_only=True)
class TagReport(RunReport):
    """What tagging did; ``out`` is the label file, and ``open_shards`` counts those with images to be tagged yet.

    Attributes:
        tagged: Images of this run that CLIP tagged, now or earlier.
        without_class: Those of them in which it found no class: all background.
        with_all: Those in which it found every class there is.
    """

    tagged: int
    without_class: int
    with_all: int = 0

    @property
    def alike(self) -> bool:
        """Whether most images got all classes, or most none: then tags tell images not apart."""
        return self.tagged > 1 and 2 * max(self.with_all, self.without_class) > self.tagged


def tag_unlabelled(
    options: RunOptions, image_set: ImageSet, engine: Deferred[Any], file: Path, manifest: Manifest, unit_size: int,
    replaced: Collection[str] = (), start: Start | None = None,
) -> tuple[ImageSet, TagReport]:  # fmt: skip
    """Give tags to this run's samples without labels; those that cannot be read stay without.

    Args:
        options: How to run.
        image_set: The data set.
        engine: Of a :class:`CamRecipe`, or other work that answers with tags to images without labels.
        file: The label file (:func:`~clipseed.store.tags.label_file`); it holds the data set's own labels too.
        manifest: Of what the tags are for.
        unit_size: Samples per unit.
        replaced: Images whose earlier tags are those of another image.
        start: Begins to show progress.

    Raises:
        StoreError: the label file was edited, is not ours, or cannot be written.
    """
    shard = options.shard
    with TagStore(
        file, _deciding(manifest), image_set, unit_size, shard=shard, overwrite=options.overwrite, replaced=replaced
    ) as store:
        done = run(engine, store, image_set.samples, start, shard=shard, may_be_empty=True)
        tagged = [key for key in store.own([sample.id for sample in image_set.samples]) if key in store.scores]
        without = sum(not store.scores[key] for key in tagged)
        classes = len(image_set.vocabulary.classes)
        everything = sum(len(store.scores[key]) == classes > 1 for key in tagged)
        samples = [store.labelled(sample) for sample in image_set.samples]
    report = TagReport(**vars(done), tagged=len(tagged), without_class=without, with_all=everything)
    return replace(image_set, samples=samples), report


def _deciding(manifest: Manifest) -> Manifest:
    """What of an output's settings decides its tags."""
    parts: Manifest = {part: manifest.get(part) for part in ("model", "vocabulary", "dataset")}
    options = manifest["options"]
    asked = {key: options[key] for key in _TEXTS if key in options}
    return {**parts, "options": {**{key: options.get(key) for key in _SETTINGS}, **asked}}
