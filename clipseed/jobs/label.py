"""``clipseed label``: images to label masks in one pass over the images, with no file in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipseed.cam.methods import Method
from clipseed.clip.model import FrozenClip
from clipseed.data.dataset import DatasetOptions
from clipseed.data.stamps import FileStamp, file_stamp
from clipseed.data.types import ImageReader, ImageSet, Sample
from clipseed.data.vocabulary import Vocabulary
from clipseed.defaults import (
    CAM_MAX_SIDE,
    CRF_ALPHA,
    LABEL_THRESHOLD,
    SAM_MAX_SIDE,
    TAG_THRESHOLD,
    EmptyPolicy,
    LabelRecipe,
)
from clipseed.errors import ImageError, InputError, UsageError
from clipseed.jobs import cam as cam_job
from clipseed.jobs.cam import (
    CamOptions,
    CamRecipe,
    CamWork,
    StartOn,
    TagReport,
    open_with_prompts,
    tag_unlabelled,
    without_labels,
)
from clipseed.jobs.crf import Problem
from clipseed.jobs.refine import ParOptions, along_colors
from clipseed.jobs.sam_masks import (
    TOY,
    GridMasks,
    Inputs,
    LoadedForSam,
    MasksRecipe,
    SamMasksOptions,
    shrunk_for_sam,
)
from clipseed.jobs.sam_seed import MISSING_LIST, Seeder
from clipseed.pseudo.posterior import posterior_pixels
from clipseed.pseudo.rules import RuleOptions, decide, label_mask, thresholding
from clipseed.refine.crf import CLIP_ES, CrfParameters
from clipseed.runtime.clip_work import TokenWork
from clipseed.runtime.images import (
    LARGE_IMAGE,
    LoadedImage,
    LoadedViews,
    ViewLoader,
    dealt_unit,
    one_by_one,
    token_budget,
)
from clipseed.runtime.run import Loading, RunOptions, RunReport, open_engine, run
from clipseed.runtime.stream import Advance, BatchSize, StreamStats
from clipseed.runtime.threads import single_threads
from clipseed.runtime.work import Deferred
from clipseed.sam.options import FMA, ProposalOptions
from clipseed.store.cam_records import Cam
from clipseed.store.files import write_skipped
from clipseed.store.label_mask_folder import read_label_mask_manifest
from clipseed.store.manifest import Manifest, label_manifest
from clipseed.store.scored_masks import ScoredMask, ScoredMaskWriter
from clipseed.store.segment_records import unpack_segments
from clipseed.store.segments import SegmentSet
from clipseed.store.tags import Tagged, label_file
from clipseed.store.units import Unit
from clipseed.train.prompts.files import PromptFile
from clipseed.types import IGNORE

_MOST_PER_UNIT = 1024
"""Images of a unit: what a kill can cost."""


@dataclass(frozen=True)
class Crf:
    """``clipseed crf``."""

    parameters: CrfParameters = CLIP_ES
    alpha: float = CRF_ALPHA


@dataclass(frozen=True)
class Threshold:
    """``clipseed threshold --threshold``."""

    threshold: float = LABEL_THRESHOLD


@dataclass(frozen=True)
class SamSeed:
    """``clipseed sam-masks`` with its defaults, where no segments are given, and ``clipseed sam-seed``."""


@dataclass(frozen=True)
class Steps:
    """What a recipe does with an image, in this order; each step is that of the command it names.

    Attributes:
        cam: ``clipseed cam --method``.
        caa: ``clipseed refine caa``.
        par: ``clipseed refine par``.
        labels: From maps to the label mask.
    """

    cam: Method
    labels: Crf | Threshold | SamSeed
    caa: bool = True
    par: ParOptions | None = None


RECIPES: dict[LabelRecipe, Steps] = {
    "clip-es": Steps(cam="softmax-gradcam", caa=True, labels=Crf()),
    "svc": Steps(cam="svc", caa=True, par=ParOptions(), labels=Threshold()),
    "segments": Steps(cam="softmax-gradcam", caa=True, labels=SamSeed()),
}
"""CLIP-ES (gradients, and CLIP's attention); maps without gradients that follow colours; FMA-WSSS's seeding by SAM's
segments. All constants are the defaults of the commands."""


@dataclass(frozen=True)
class LabelOptions:
    """Everything ``clipseed label`` can be told.

    Attributes:
        recipe: What is done; ``None``: ``segments`` where there are any, else ``clip-es``.
        keep: CAM file, or folder, for the refined maps on the patch grid.
        segments: Segments file of ``clipseed sam-masks``.
        checkpoint: SAM's weights instead, or ``toy``.
        proposals: Settings of SAM's grid.
        confidence: Pixels whose label is less certain become 255; not with ``svc``, whose labels have no confidence.
        empty: As of :class:`~clipseed.jobs.crf.CrfOptions`.
        prompts: Learned prompts, in place of the vocabulary's words.
    """

    data: DatasetOptions
    out: Path
    recipe: LabelRecipe | None = None
    keep: Path | None = None
    segments: Path | None = None
    checkpoint: str | None = None
    proposals: ProposalOptions = FMA
    confidence: float | None = None
    empty: EmptyPolicy = "background"
    model: str | None = None
    weights: str | None = None
    max_side: int = CAM_MAX_SIDE
    min_side: int = 0
    tag_threshold: float = TAG_THRESHOLD
    tag_top_k: int | None = None
    prompts: Path | None = None
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def chosen_recipe(self) -> LabelRecipe:
        """The recipe that is meant."""
        return self.recipe or ("segments" if self.segments or self.checkpoint else "clip-es")

    @property
    def steps(self) -> Steps:
        """What is done."""
        return RECIPES[self.chosen_recipe]

    @property
    def cam(self) -> CamOptions:
        """The first steps, as ``clipseed cam`` is told them."""
        return CamOptions(
            self.data, self.keep or self.out, self.model, self.weights, self.steps.cam, max_side=self.max_side,
            min_side=self.min_side, refine="caa" if self.steps.caa else None, tag_threshold=self.tag_threshold,
            tag_top_k=self.tag_top_k, prompts=self.prompts, run=self.run,
        )  # fmt: skip

    @property
    def sam(self) -> SamMasksOptions:
        """The segments, as ``clipseed sam-masks`` is told them."""
        data = replace(self.data, images_only=True)
        run = replace(self.run, batch_size=None)
        return SamMasksOptions(self.out, data, checkpoint=self.checkpoint, proposals=self.proposals, run=run)


@dataclass(kw_only=True)
class LabelReport(RunReport):
    """What a run did.

    Attributes:
        recipe: What was done.
        kept: Where the maps are.
        tags: Of images without labels.
        missing: Images that the segments do not know; they are listed in ``missing_file``.
        ground_truth: Where the data set has masks to score against.
    """

    recipe: LabelRecipe
    kept: Path | None = None
    tags: TagReport | None = None
    missing: int = 0
    missing_file: Path | None = None
    ground_truth: str | None = None

    @property
    def coverage(self) -> float | None:
        """Share of pixels, of the images labelled in this run, that are not 255; ``None`` where there were none."""
        return None if self.ignored_share is None or not self.stats.computed else 1 - self.ignored_share

    @property
    def foreground(self) -> float:
        """Share of their pixels that show a class."""
        return self.stats.counters["foreground"] / max(1, self.stats.counters["pixels"])


def run_label(
    options: LabelOptions, start: StartOn | None = None, start_tags: StartOn | None = None,
    loading: Loading | None = None,
) -> LabelReport:  # fmt: skip
    """Label the images of a data set; resumes what an earlier run began.

    Args:
        options: What to do.
        start: Begins to show progress, once the data set is read.
        start_tags: The same for tagging images without labels, which comes first when the options ask for it.
        loading: Called before the model is loaded; when there is nothing to do, it is not.

    Raises:
        ClipseedError: see the modules it uses; images that cannot be read are skipped and reported.
    """
    check(options)
    image_set, learned = open_with_prompts(options.data, options.prompts)
    with contextlib.ExitStack() as opened:
        segments = None if options.segments is None else opened.enter_context(SegmentSet(options.segments))
        recipe = LabelWorkRecipe(options, image_set.vocabulary, image_set.reader, segments, learned)
        say = partial(loading, options.cam.model_name) if loading else None
        engine = opened.enter_context(
            contextlib.closing(open_engine(recipe, options.run.cluster, recipe.known(), say))
        )  # fmt: skip
        return _run(options, image_set, recipe, engine, start, start_tags)


def _run(
    options: LabelOptions, image_set: ImageSet, recipe: LabelWorkRecipe, engine: Deferred[Any], start: StartOn | None,
    start_tags: StartOn | None,
) -> LabelReport:  # fmt: skip
    about, shard = engine.about, options.run.shard
    maps, stage = recipe.cam.manifest(image_set, about)
    unit = dealt_unit(min(about["unit"], _MOST_PER_UNIT), len(image_set.samples), shard.count * engine.hands)
    missing = _missing(options, recipe.segments, image_set.samples)
    with ScoredMaskWriter(
        options.out, options.keep, _manifest(options, recipe, maps, about), unit, overwrite=options.run.overwrite,
        shard=shard, empty=options.empty, soft_manifest=maps, soft_stage=stage,
    ) as writer:  # fmt: skip
        files = {sample.id: image_set.reader.file(sample) for sample in image_set.samples}

        def stamp(key: str) -> FileStamp:
            return file_stamp(files.get(key))

        tags = None
        if options.data.auto_labels:
            begin = start_tags(image_set) if start_tags else None
            image_set, tags = tag_unlabelled(
                options.run, image_set, engine, label_file(options.out, False), maps, unit,
                writer.masks.replaced(stamp), begin,
            )  # fmt: skip
        samples = image_set.samples
        writer.follow({sample.id: sample.labels for sample in samples}, stamp)
        listed = write_skipped(options.out / MISSING_LIST, [(key, f"not in {options.segments}") for key in missing])
        begin = start(image_set) if start else None
        done = run(engine, writer, samples, begin, shard=shard, unusable=without_labels(samples, tags))
    if tags is not None:
        done.stats.out_of_memory = done.stats.out_of_memory or tags.stats.out_of_memory
    return LabelReport(
        **vars(done), recipe=options.chosen_recipe, kept=options.keep, tags=tags, missing=len(missing),
        missing_file=listed, ground_truth=image_set.ground_truth,
    )  # fmt: skip


def check(options: LabelOptions) -> None:
    """Raise UsageError for what cannot be meant."""
    cam_job.check(options.cam)
    seeding = isinstance(options.steps.labels, SamSeed)
    if options.segments is not None and options.checkpoint is not None:
        raise UsageError("--segments and --checkpoint: give the segments, or the SAM that finds them")
    given = "--segments" if options.segments is not None else "--checkpoint" if options.checkpoint is not None else None
    if given and not seeding:
        raise UsageError(f"{given} belongs to --recipe segments, not to {options.chosen_recipe}")
    if seeding and given is None and options.data.dataset != TOY:
        raise UsageError(
            "--recipe segments needs --segments FILE (of clipseed sam-masks), or SAM's weights with --checkpoint FILE"
        )
    if options.confidence is not None and options.chosen_recipe == "svc":
        raise UsageError("--confidence: labels of --recipe svc have none")
    if options.confidence is not None and not 0 < options.confidence <= 1:
        raise UsageError(f"--confidence {options.confidence}: give a probability above 0, up to 1 (0.95 in the paper)")
    places = [path.resolve() for path in (options.out, options.keep, options.segments) if path is not None]
    if len(set(places)) < len(places):
        raise UsageError("--out, --keep and --segments: give each its own place")


def _missing(options: LabelOptions, segments: SegmentSet | None, samples: Sequence[Sample]) -> list[str]:
    """Ids of images that the segments do not know.

    Raises:
        InputError: they know none of them.
    """
    if segments is None:
        return []
    missing = [sample.id for sample in samples if sample.id not in segments]
    if missing and len(missing) == len(samples):
        raise InputError(
            f"{options.segments}: holds segments of none of the {len(missing)} images (the first is {missing[0]!r}); "
            "was it made for another data set?"
        )
    return missing


def _manifest(options: LabelOptions, recipe: LabelWorkRecipe, maps: Manifest, about: dict[str, Any]) -> Manifest:
    """What decides the label masks: the recipe with all its constants, and everything that decides the maps."""
    steps = options.steps
    chosen: dict[str, Any] = {"confidence": options.confidence, "empty": options.empty}
    if steps.par is not None:
        chosen["par"] = {**asdict(steps.par), "dilations": list(steps.par.dilations)}
    beside: dict[str, Any] = {}
    if isinstance(steps.labels, SamSeed):
        chosen |= recipe.rules.manifest()
        beside = {"masks": about["segments"]}
    else:
        chosen |= {key: value for key, value in asdict(steps.labels).items() if key != "parameters"}
    if isinstance(steps.labels, Crf):
        chosen |= asdict(steps.labels.parameters)
    return label_manifest(maps, None, "label", options.chosen_recipe, chosen, **beside)


@dataclass(frozen=True)
class LoadedForLabel:
    """A decoded image: as CLIP sees it, and, where a step needs it, as it is ``(H, W, 3)`` and as SAM sees it."""

    sample: Sample
    views: LoadedViews
    pixels: npt.NDArray[np.uint8]
    shown: LoadedForSam | None

    @property
    def key(self) -> Any:
        """Images share a batch when CLIP sees them at one size, and both or neither have labels."""
        return self.views.key

    @property
    def cost(self) -> int:
        """Tokens."""
        return self.views.cost


@dataclass(frozen=True)
class LabelLoader:
    """Decodes a sample once for all steps; runs in worker processes."""

    views: ViewLoader
    sam_side: int | None

    def __call__(self, sample: Sample) -> LoadedForLabel:
        """Decode one sample.

        Raises:
            ImageError: it cannot be read.
        """
        stamp = file_stamp(self.views.reader.file(sample))
        image = self.views.reader(sample)
        shown = None if self.sam_side is None else shrunk_for_sam(sample, image, stamp, self.sam_side)
        return LoadedForLabel(sample, self.views.of(sample, image, stamp), np.asarray(image).copy(), shown)


@dataclass(frozen=True)
class LabelWorkRecipe:
    """Loads the models that a run needs."""

    options: LabelOptions
    vocabulary: Vocabulary
    reader: ImageReader
    segments: SegmentSet | None = None
    learned: PromptFile | None = None

    @property
    def cam(self) -> CamRecipe:
        """The first steps."""
        return CamRecipe(self.options.cam, self.vocabulary, self.reader, self.learned)

    @property
    def grid(self) -> MasksRecipe | None:
        """The SAM, where it is needed."""
        if self.segments is not None or not isinstance(self.options.steps.labels, SamSeed):
            return None
        return MasksRecipe(self.options.sam, Inputs(None, None), self.reader, self.options.data.dataset)

    @property
    def rules(self) -> Any:
        """How segments are labelled."""
        chosen = RuleOptions(min_confidence=self.options.confidence or 0.0)
        return decide(chosen, self.vocabulary.name, label_map=False, asked=self._prompted)

    @property
    def _prompted(self) -> bool:
        return self.segments is not None and bool(self.segments.manifest["vocabulary"])

    def known(self) -> dict[str, Any] | None:
        """What :meth:`LabelWork.about` would say, if the output that is there was made with the same models."""
        if self.grid is not None:
            return None
        about = self.cam.choice.known(read_label_mask_manifest(self.options.out))
        return about and {**about, "segments": self.segments_manifest(None)}

    def segments_manifest(self, grid: GridMasks | None) -> dict[str, Any]:
        """Where segments come from."""
        if self.segments is not None:
            parts = ("kind", "method", "options", "source", "model")
            return {key: self.segments.manifest[key] for key in parts if key in self.segments.manifest}
        if grid is None:
            return {}
        options = {**self.options.proposals.manifest(), "max_side": self.options.sam.max_side}
        return {"kind": "sam-masks", "method": "grid", "options": options, "model": grid.about()["model"]}

    def __call__(self) -> LabelWork:
        """Load them."""
        return LabelWork(self)


class LabelWork(TokenWork[LoadedForLabel, "ScoredMask | Tagged"]):
    """Images with labels to label masks, images without to tags.

    CLIP takes a batch at once. What follows goes image by image on a CPU, several at once, and in batches that fit
    elsewhere.

    Args:
        recipe: What to do.
        clip: The model, where it is loaded already, and ``grid``: SAM.
    """

    lanes = 2

    def __init__(self, recipe: LabelWorkRecipe, clip: FrozenClip | None = None, grid: GridMasks | None = None) -> None:
        self._recipe, self._options = recipe, recipe.options
        self._cam = CamWork(recipe.cam, clip)
        self._grid = grid or (GridMasks(recipe.grid) if recipe.grid else None)
        self._seeder = Seeder(None, recipe.segments, recipe.rules)
        self._device = self._cam.clip.tower.device
        self._threads: ThreadPoolExecutor | None = None
        super().__init__(self._device, recipe.options.run)

    def about(self) -> dict[str, Any]:
        """As of :class:`~clipseed.runtime.clip_work.ClipWork`, and where segments come from."""
        return {**self._cam.about(), "segments": self._recipe.segments_manifest(self._grid)}

    @property
    def loader(self) -> LabelLoader:
        """Decodes images for all steps."""
        return LabelLoader(self._cam.loader.views, SAM_MAX_SIDE if self._grid else None)

    def run(self, units: Sequence[Unit], write: Any, advance: Advance | None = None) -> StreamStats:
        """As of :class:`~clipseed.runtime.work.Work`; on a CPU with threads for what goes image by image."""
        single = one_by_one(self._device, LARGE_IMAGE)
        if single is None:
            return super().run(units, write, advance)
        with single_threads(single.threads) as self._threads:
            return super().run(units, write, advance)

    def compute(self, items: Sequence[LoadedForLabel]) -> list[ScoredMask | Tagged | ImageError]:
        """Label masks, or tags, of a batch."""
        views = [item.views for item in items]
        if items[0].sample.labels is None:
            found: list[ScoredMask | Tagged | ImageError] = [*self._cam.tags(views)]
        else:
            found = [*self._labelled(items, [_as_stored(cam) for cam in self._cam.maps(views)])]
        self.counters.update(self._cam.counters)
        self._cam.counters.clear()
        return found

    def _labelled(self, items: Sequence[LoadedForLabel], cams: Sequence[Cam]) -> list[ScoredMask | ImageError]:
        results: dict[int, ScoredMask | ImageError] = {}
        for rows, answers in self._in_parts(items, cams):
            results |= dict(zip(rows, answers, strict=True))
        for result in results.values():
            if not isinstance(result, ImageError):
                self.counters["pixels"] += result.labels.size
                self.counters["foreground"] += int(np.count_nonzero((result.labels > 0) & (result.labels != IGNORE)))
        return [results[k] for k in range(len(items))]

    def _in_parts(
        self, items: Sequence[LoadedForLabel], cams: Sequence[Cam]
    ) -> Iterator[tuple[list[int], Sequence[ScoredMask | ImageError]]]:
        """Positions of images that go on together, and what became of them."""

        def of(rows: list[int]) -> Sequence[ScoredMask | ImageError]:
            with torch.inference_mode():  # threads do not have it from whoever called
                return self._finish([items[k] for k in rows], [cams[k] for k in rows])

        images = [LoadedImage(item.sample, item.pixels) for item in items]
        if self._threads is None:
            for rows in _alike(images, token_budget(self._device)):
                yield rows, of(rows)
            return
        large_sam = self._grid is not None and self._grid.one_by_one is None
        alone = [large_sam or image.cost > LARGE_IMAGE for image in images]
        small = [[k] for k, large in enumerate(alone) if not large]
        yield from zip(small, self._threads.map(of, small), strict=True)
        yield from (([k], of([k])) for k, large in enumerate(alone) if large)

    def _finish(self, items: Sequence[LoadedForLabel], cams: list[Cam]) -> Sequence[ScoredMask | ImageError]:
        """Label masks of images of one size, all of them with classes or all without, from their maps."""
        steps = self._options.steps
        refined = cams
        if steps.par is not None and len(cams[0].classes):
            pixels = [item.pixels for item in items]
            refined = [_as_stored(cam) for cam in along_colors(pixels, cams, steps.par, self._device)]
        if isinstance(steps.labels, Crf):
            return self._by_crf(steps.labels, items, refined)
        if isinstance(steps.labels, Threshold):
            rules = thresholding(threshold=steps.labels.threshold)
            return [self._mask(cam, kept, label_mask(cam, rules)) for cam, kept in zip(refined, cams, strict=True)]
        return [self._by_segments(item, cam) for item, cam in zip(items, cams, strict=True)]

    def _by_crf(self, crf: Crf, items: Sequence[LoadedForLabel], cams: Sequence[Cam]) -> list[ScoredMask | ImageError]:
        problem = Problem(crf.parameters, crf.alpha, paper=False)
        posteriors = problem.solved(cams, [item.pixels for item in items], self._device)
        found = [posterior_pixels(posterior, cam.classes) for posterior, cam in zip(posteriors, cams, strict=True)]
        return [
            self._mask(cam, cam, pixels.sure(self._options.confidence), pixels.confidence)
            for cam, pixels in zip(cams, found, strict=True)
        ]

    def _by_segments(self, item: LoadedForLabel, cam: Cam) -> ScoredMask | ImageError:
        if self._grid is None:
            try:
                return self._mask(cam, cam, self._seeder.seeded(cam).labels)
            except ImageError as error:
                return error
        assert item.shown is not None
        record = self._grid.attempt(item.shown)
        if isinstance(record, ImageError):
            return record
        return self._mask(cam, cam, label_mask(cam, self._seeder.rules, unpack_segments(record), record.class_id))

    def _mask(
        self, cam: Cam, kept: Cam, labels: npt.NDArray[np.uint8], confidence: npt.NDArray[Any] | None = None
    ) -> ScoredMask:
        soft = kept if self._options.keep is not None else None
        return LabelledImage(cam.id, labels, tuple(cam.classes.tolist()), cam.stamp, soft, confidence)


@dataclass(frozen=True)
class LabelledImage(ScoredMask):
    """A finished image.

    Attributes:
        confidence: ``(H, W)`` how probable each label is; ``None`` where the recipe has no probabilities.
    """

    confidence: npt.NDArray[Any] | None = None


def _as_stored(cam: Cam) -> Cam:
    """Rounded as a file would have it, so that one pass gives what several commands give."""
    return replace(cam, maps=cam.maps.astype(np.float16).astype(np.float32))


def _alike(images: Sequence[LoadedImage], budget: int) -> list[list[int]]:
    """Positions of images of one size, with or without classes, as many together as a budget of patches holds."""
    together: dict[tuple[int, ...], list[int]] = {}
    for k, image in enumerate(images):
        together.setdefault(image.key, []).append(k)
    parts = []
    for rows in together.values():
        limit = BatchSize(None, budget).limit(images[rows[0]].cost)
        parts += [rows[start : start + limit] for start in range(0, len(rows), limit)]
    return parts
