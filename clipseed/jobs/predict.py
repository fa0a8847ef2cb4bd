"""``clipseed predict``: label masks by a trained segmenter, or refined pseudo-labels where labels are known."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipseed.clip.text import TextBank
from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.data.stamps import UNKNOWN, FileStamp, file_stamp
from clipseed.data.types import ImageReader, ImageSet, Sample
from clipseed.defaults import EmptyPolicy
from clipseed.errors import UsageError
from clipseed.pseudo.posterior import posterior_labels
from clipseed.refine.crf import WECLIP, clip_es_unary, dense_crf
from clipseed.runtime.clip_work import TokenWork
from clipseed.runtime.images import dealt_unit, unit_size_for
from clipseed.runtime.run import Loading, RunOptions, RunReport, Start, open_engine, run
from clipseed.store.cam_records import Cam
from clipseed.store.manifest import Manifest, package_versions
from clipseed.store.scored_masks import ScoredMask, ScoredMaskWriter
from clipseed.train.inference import ViewOptions, shown
from clipseed.train.prompts.files import PromptFile, read_prompts, text_of
from clipseed.train.segmenter import Placement, SegmenterFile, enlarged, read_segmenter
from clipseed.train.weclip.network import WeclipNetwork

Floats = npt.NDArray[np.float32]
SOFT_LEAST = 0.1
"""Classes whose probability is smaller everywhere are left out of ``--soft``."""
_CRF_LEAST = 1e-3
"""Likewise for the CRF, whose cost grows with their number; the released code takes all."""
_MOST_PER_UNIT = 64


@dataclass(frozen=True)
class PredictOptions:
    """Everything ``clipseed predict`` can be told.

    Attributes:
        segmenter: File of ``clipseed train``, or a checkpoint of WeCLIP's authors.
        data: The images; their vocabulary is the segmenter's.
        classes: Class list of an authors' checkpoint; of another, to be checked against its own, or, where its head
            scores by text, other words to ask it with.
        labels_known: Make refined pseudo-labels of the classes that images are labelled with, instead of predictions:
            CAMs, refined with the decoder's affinity and along colours (WeCLIP).
        view: Scales, mirror image, size.
        crf: Refine with a dense CRF (WeCLIP's constants).
        soft: CAM file for the scores behind the masks.
        empty: As of :class:`~clipseed.jobs.crf.CrfOptions`, where labels are known.
        prompts: Learned prompts, in place of the vocabulary's words, where labels are known.
        model, weights: The frozen CLIP, where it is not where it was, or that reads other words.
    """

    segmenter: Path
    data: DatasetOptions
    out: Path
    classes: str | None = None
    labels_known: bool = False
    view: ViewOptions = field(default_factory=ViewOptions)
    crf: bool = False
    soft: Path | None = None
    empty: EmptyPolicy = "background"
    prompts: Path | None = None
    model: str | None = None
    weights: str | None = None
    run: RunOptions = field(default_factory=RunOptions)


def run_predict(options: PredictOptions, start: Start | None = None, loading: Loading | None = None) -> RunReport:
    """Segment the images of a data set; resumes what an earlier run began.

    Args:
        options: What to do.
        start: Begins to show progress.
        loading: Called before the model is loaded.

    Raises:
        ClipseedError: see the modules it uses; images that cannot be read are skipped and reported.
    """
    _check(options)
    file = read_segmenter(options.segmenter, options.classes)
    learned = _learned(options, file)
    image_set = open_dataset(replace(options.data, vocabulary=file.vocabulary, auto_labels=_free(options)))
    recipe = PredictRecipe(options, image_set.reader, file, learned)
    say = partial(loading, str(options.segmenter)) if loading else None
    samples = image_set.samples
    if not options.labels_known:
        samples = [replace(sample, labels=None) for sample in samples]
    with contextlib.closing(open_engine(recipe, options.run.cluster, None, say)) as engine:
        about, shard = engine.about, options.run.shard
        unit = dealt_unit(min(about["unit"], _MOST_PER_UNIT), len(samples), shard.count * engine.hands)
        manifest = _manifest(options, image_set, file, about)
        if learned is not None:
            manifest["options"] |= learned.manifest()
        with ScoredMaskWriter(
            options.out, options.soft, manifest, unit, overwrite=options.run.overwrite, shard=shard,
            empty=options.empty,
        ) as writer:  # fmt: skip
            files = {sample.id: image_set.reader.file(sample) for sample in samples}
            writer.follow({sample.id: sample.labels for sample in samples}, lambda key: file_stamp(files[key]))
            unlabelled = [sample.id for sample in samples if options.labels_known and sample.labels is None]
            unusable = dict.fromkeys(unlabelled, "no labels are given for it")
            return run(engine, writer, samples, start, shard=shard, unusable=unusable)


def _free(options: PredictOptions) -> bool:
    """Whether images may come without labels."""
    return not options.labels_known and options.data.dataset != "toy"


def _check(options: PredictOptions) -> None:
    options.view.check()
    options.run.check()
    if options.labels_known and (len(options.view.scales) > 1 or options.view.flip):
        raise UsageError("--labels: refined pseudo-labels come from one view; leave --scales and --flip out")
    if options.labels_known and options.view.window:
        raise UsageError("--labels: refined pseudo-labels come from whole images; leave --window out")
    if options.soft is not None and options.soft.resolve() == options.out.resolve():
        raise UsageError(f"--out and --soft are both {options.out}; give each its own place")


def _learned(options: PredictOptions, file: SegmenterFile) -> PromptFile | None:
    """Learned prompts, where texts are read at all."""
    if options.prompts is None:
        if options.labels_known and file.about.get("prompts"):
            raise UsageError(f"--labels: {file.path} was trained with learned prompts; name them with --prompts")
        return None
    if not options.labels_known:
        raise UsageError("--prompts belongs to --labels: predictions read no text")
    learned = read_prompts(options.prompts, None, file.vocabulary.name)
    if learned.vocabulary.class_names != file.vocabulary.class_names:
        raise UsageError(f"--prompts {options.prompts}: prompts of other classes than those of {file.path}")
    return learned


def _manifest(options: PredictOptions, image_set: ImageSet, file: SegmenterFile, about: dict[str, Any]) -> Manifest:
    view = options.view
    labels = "known" if options.labels_known else None
    return {
        "kind": "predict",
        "method": str(file.about["kind"]),
        "options": {
            "segmenter": file.about["digest"], "labels": labels, "scales": list(view.scales), "flip": view.flip,
            "max_side": view.max_side, "min_side": 0, "paper": view.released, "crf": options.crf,
            "exif": options.data.exif, "empty": options.empty,
            **({"window": [view.window, view.window_stride]} if view.window else {}),
        },
        "source": {"segmenter": options.segmenter.name},
        "model": about["model"],
        "weights": about["weights"],
        "max_pixels": options.data.max_pixels,
        "vocabulary": file.vocabulary.as_dict(),
        "dataset": image_set.manifest,
        "input": str(options.segmenter.resolve()),
        "versions": package_versions(),
    }  # fmt: skip


@dataclass(frozen=True)
class ShownImage:
    """A decoded image as the network sees it, ``(3, h, w)``, and, where a CRF follows, as it is, ``(H, W, 3)``."""

    sample: Sample
    size: tuple[int, int]
    view: npt.NDArray[Any]
    pixels: npt.NDArray[np.uint8] | None
    stamp: FileStamp
    tokens: int

    @property
    def key(self) -> tuple[int, ...]:
        """Images share a batch when they and their views have equal sizes, and both or neither have labels."""
        return (*self.size, *self.view.shape, int(not self.sample.labels))

    @property
    def cost(self) -> int:
        """Tokens of the view."""
        return self.tokens


@dataclass(frozen=True)
class ShowingLoader:
    """Decodes a sample and brings it to the size of the run; runs in worker processes."""

    reader: ImageReader
    patch: int
    view: ViewOptions
    pixels: bool

    def __call__(self, sample: Sample) -> ShownImage:
        """Decode one sample.

        Raises:
            ImageError: it cannot be read.
        """
        path = self.reader.file(sample)
        stamp = UNKNOWN if path is None else file_stamp(path)
        image = self.reader(sample)
        view = shown(image, self.patch, self.view).numpy()
        pixels = np.asarray(image).copy() if self.pixels else None
        tokens = (view.shape[1] // self.patch) * (view.shape[2] // self.patch) + 1
        return ShownImage(sample, (image.height, image.width), view, pixels, stamp, tokens)


@dataclass(frozen=True)
class PredictRecipe:
    """Puts the segmenter, which was read already, on its CLIP."""

    options: PredictOptions
    reader: ImageReader
    file: SegmenterFile
    learned: PromptFile | None = None

    def __call__(self) -> PredictWork:
        """Load it."""
        return PredictWork(self)


class PredictWork(TokenWork[ShownImage, ScoredMask]):
    """Images to label masks."""

    def __init__(self, recipe: PredictRecipe) -> None:
        options = self._options = recipe.options
        self._reader = recipe.reader
        place = Placement(options.model, options.weights, options.run.device, options.run.precision)
        self.segmenter = recipe.file.on(place)
        network = self.segmenter.network
        if options.labels_known and not isinstance(network, WeclipNetwork):
            raise UsageError(f"--labels: {options.segmenter} is no WeCLIP, and makes no pseudo-labels")
        self._text: TextBank | None = None
        if isinstance(network, WeclipNetwork) and options.labels_known:
            self._text = text_of(network.clip, self.segmenter.vocabulary, recipe.learned)
        super().__init__(network.device, options.run)

    def about(self) -> dict[str, Any]:
        """Model, where its weights are, device, and images per unit."""
        network = self.segmenter.network
        described = network.describe()
        return {**described, "device": str(network.device), "unit": unit_size_for(network.device)}

    @property
    def loader(self) -> ShowingLoader:
        """Decodes images at the size of the run."""
        options = self._options
        return ShowingLoader(self._reader, self.segmenter.network.patch, options.view, options.crf)

    def compute(self, items: Sequence[ShownImage]) -> list[ScoredMask]:
        """Masks of a batch."""
        images = torch.from_numpy(np.stack([item.view for item in items])).to(self.segmenter.network.device)
        found = self._known(images, items) if self._options.labels_known else self._predicted(images, items)
        if self._options.crf:
            found = self._smoothed(found, items)
        return [self._finished(item, result) for item, result in zip(items, found, strict=True)]

    def _predicted(self, images: Tensor, items: Sequence[ShownImage]) -> list[_Scores]:
        logits = self.segmenter.logits(images, self._options.view)
        wide = enlarged(logits, items[0].size)
        every = tuple(range(len(self.segmenter.classes)))
        return [_Scores(every, rows, low.softmax(dim=0)) for rows, low in zip(wide.softmax(dim=1), logits, strict=True)]

    def _known(self, images: Tensor, items: Sequence[ShownImage]) -> list[_Scores]:
        """Refined pseudo-labels; their scores grow by a known factor in PAR."""
        network, labels = self.segmenter.network, [tuple(item.sample.labels or ()) for item in items]
        assert isinstance(network, WeclipNetwork)
        assert self._text is not None
        scores = network.pseudo_scores(images, labels, items[0].size, self._text)
        return [_Scores(row, maps, maps) for row, maps in zip(labels, scores, strict=True)]

    def _smoothed(self, found: Sequence[_Scores], items: Sequence[ShownImage]) -> list[_Scores]:
        """The posterior of a dense CRF over background and the classes that have any chance."""
        chosen = [scores if self._options.view.released else scores.likely(_CRF_LEAST) for scores in found]
        unaries = [torch.from_numpy(clip_es_unary(scores.probabilities().cpu().numpy())) for scores in chosen]
        device = self.segmenter.network.device
        pixels = [torch.from_numpy(item.pixels).to(device) for item in items if item.pixels is not None]
        posteriors = dense_crf([unary.to(device) for unary in unaries], pixels, WECLIP)
        return [_Scores(scores.classes, rows, rows) for scores, rows in zip(chosen, posteriors, strict=True)]

    def _finished(self, item: ShownImage, scores: _Scores) -> ScoredMask:
        options, kept = self._options, np.array(scores.classes, np.int32)
        labels = posterior_labels(scores.maps.cpu().numpy(), kept)
        soft = None
        if options.soft is not None:
            likely = scores if options.labels_known else scores.likely(SOFT_LEAST)
            maps = likely.soft[1:].clamp(0, 1).cpu().numpy()
            soft = Cam(item.sample.id, np.array(likely.classes, np.int32), maps, item.size, item.stamp)
        classes = tuple(scores.classes) if options.labels_known else ()
        return ScoredMask(item.sample.id, labels, classes, item.stamp, soft)


@dataclass(frozen=True)
class _Scores:
    """Scores of one image, background first.

    Attributes:
        classes: The K classes.
        maps: ``(1 + K, H, W)`` at the image's size.
        soft: ``(1 + K, h, w)`` what is stored of them, each in [0, 1].
    """

    classes: tuple[int, ...]
    maps: Tensor
    soft: Tensor

    def likely(self, least: float) -> _Scores:
        """Only the classes that score as much somewhere."""
        peaks = self.soft[1:].amax(dim=(1, 2)).tolist() if self.classes else []
        rows = [0, *(k + 1 for k, peak in enumerate(peaks) if peak >= least)]
        return _Scores(tuple(self.classes[k - 1] for k in rows[1:]), self.maps[rows], self.soft[rows])

    def probabilities(self) -> Tensor:
        """The maps, summing to 1 over background and classes."""
        return self.maps / self.maps.sum(dim=0, keepdim=True)
