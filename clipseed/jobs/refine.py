"""``clipseed refine``: read CAMs, look at the images again, store refined CAMs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipseed.cam.dense import dense_features, similarities
from clipseed.clip.attention import patch_attention
from clipseed.clip.model import FrozenClip, model_name
from clipseed.data.dataset import relocated
from clipseed.data.vocabulary import parse_vocabulary
from clipseed.defaults import (
    BOX_THRESHOLD,
    COCO_BOX_THRESHOLD,
    PAR_DILATIONS,
    PAR_ITERATIONS,
    PAR_POSITION_WEIGHT,
    PAR_SHARPNESS,
    PATCH_TEMPERATURE,
    CaaPreset,
)
from clipseed.device import pick_device
from clipseed.errors import ImageError, InputError, UsageError, WeightsError
from clipseed.refine.affinity import balance
from clipseed.refine.caa import FMA_WSSS, CaaOptions, Source, caa, caa_of_raw, spread_within_boxes
from clipseed.refine.distribution import distribution_affinity
from clipseed.refine.par import refine_par
from clipseed.runtime.clip_work import ClipChoice, TokenWork, about_clip
from clipseed.runtime.images import (
    LARGE_IMAGE,
    ImageLoader,
    LoadedImage,
    LoadedViews,
    ViewLoader,
    cam_sample,
    dealt_unit,
    earlier_in_cams,
    misfit,
    one_by_one,
    recorded_reader,
    stacked,
)
from clipseed.runtime.run import Loading, RunOptions, RunReport, Start, open_engine, run
from clipseed.runtime.work import Deferred
from clipseed.store.cam_records import Cam
from clipseed.store.cam_writer import CamWriter
from clipseed.store.cams import CamSet
from clipseed.store.files import freshen
from clipseed.store.manifest import Manifest, package_versions, recorded_prompts
from clipseed.store.writer import recorded_manifest
from clipseed.train.prompts.files import PromptFile, read_prompts, text_of

Method = Literal["caa", "js", "par"]


@dataclass(frozen=True)
class ParOptions:
    """Constants of pixel-adaptive refinement (:func:`~clipseed.refine.par.refine_par`)."""

    iterations: int = PAR_ITERATIONS
    dilations: tuple[int, ...] = PAR_DILATIONS
    sharpness: float = PAR_SHARPNESS
    position_weight: float = PAR_POSITION_WEIGHT


@dataclass(frozen=True)
class RefineOptions:
    """Everything ``clipseed refine`` can be told.

    Attributes:
        source: The CAMs to refine; images, model and vocabulary are those they were made with.
        preset: FMA-WSSS's constants and source of CAA; the result keeps its scale, for ``clipseed sam-seed``. Its boxes
            are the released code's, unless ``paper`` is ``False``.
        box_threshold: ``None``: the preset's, or CLIP-ES's 0.7 for COCO's classes, 0.4 otherwise.
        caa: Constants; ``None``: the preset's, or CLIP-ES's.
        prompts: Where the learned prompts are now that the CAMs were made with, if they have moved.
        paper: Reproduce the released code; ``None``: as the CAMs were made.
        images, root, weights: Where the images, their data set and the weights are now, if they have moved.
    """

    method: Method
    source: Path
    out: Path | None = None
    images: Path | None = None
    root: Path | None = None
    weights: str | None = None
    prompts: Path | None = None
    preset: CaaPreset | None = None
    box_threshold: float | None = None
    caa: CaaOptions | None = None
    temperature: float = PATCH_TEMPERATURE
    par: ParOptions = field(default_factory=ParOptions)
    paper: bool | None = None
    run: RunOptions = field(default_factory=RunOptions)


def fma_constants(preset: CaaPreset) -> tuple[CaaOptions, Source]:
    """Constants of a preset, and what spreads."""
    return FMA_WSSS[preset.removeprefix("fma-")]


@dataclass(kw_only=True)
class RefineReport(RunReport):
    """What a run did."""

    source: Path


def default_out(source: Path, method: str) -> Path:
    """``cams.h5`` refined by ``caa`` is ``cams-caa.h5``."""
    named = source if source.name not in {"", ".."} else source.resolve()
    return named.with_name(f"{named.stem}-{method}{named.suffix}")


def caa_options(chosen: CaaOptions, box_threshold: float | None, classes: str, paper: bool) -> CaaOptions:
    """Fill in what depends on the data set (named by its vocabulary) and on ``--paper``.

    Raises:
        UsageError: a constant means nothing.
    """
    threshold = box_threshold
    if threshold is None:
        threshold = COCO_BOX_THRESHOLD if classes.startswith("coco") else BOX_THRESHOLD
    if not 0 <= threshold < 1:
        raise UsageError(f"--box-threshold {threshold}: give a share of the peak from 0 to below 1")
    for name, value, least, most in (
        ("layers", chosen.layers, 1, 1000), ("rounds", chosen.rounds, 0, 1000), ("power", chosen.power, 1, 100),
    ):  # fmt: skip
        if not least <= value <= most:
            raise UsageError(f"--{name} {value}: give a number from {least} to {most}")
    return replace(chosen, box_threshold=threshold, released=paper)


def refine_manifest(
    method: str, options: dict[str, Any], source: Manifest, model: dict[str, Any], weights: str,
    made_from: Path | None = None,
) -> Manifest:  # fmt: skip
    """What decides refined CAMs: the constants, and everything that decided the CAMs they were made from.

    ``made_from`` is where those are, if they were stored at all.
    """
    kept = {key: source["options"].get(key) for key in ("paper", "exif", "max_side", "min_side")}
    return {
        "kind": "refine",
        "method": method,
        "options": {**kept, **options},
        "source": {key: source[key] for key in ("kind", "method", "options", "source") if key in source},
        **({"prompts": source["prompts"]} if "prompts" in source else {}),
        "model": model,
        "weights": weights,
        "max_pixels": source.get("max_pixels"),
        "vocabulary": source["vocabulary"],
        "dataset": source["dataset"],
        **({"input": str(made_from.resolve())} if made_from else {}),
        "versions": package_versions(),
    }


def caa_manifest(chosen: CaaOptions) -> dict[str, Any]:
    """The constants of CAA as a manifest has them."""
    return {**{key: value for key, value in asdict(chosen).items() if key != "released"}, "paper": chosen.released}


def check(options: RefineOptions) -> None:
    """Raise UsageError for options that mean nothing."""
    par = options.par
    if not 1 <= par.iterations <= 1000:
        raise UsageError(f"--iterations {par.iterations}: give a number from 1 to 1000")
    if not par.dilations or any(not 1 <= step <= 1000 for step in par.dilations):
        raise UsageError("--dilations: give distances in pixels, such as 1,2,4,8,12,24")
    if not 1e-3 <= par.sharpness <= 1e3 or not 0 <= par.position_weight <= 1e3:
        raise UsageError("--sharpness and --position-weight: give positive numbers (0.3 and 0.01 in the paper)")
    if not 1e-4 <= options.temperature <= 100:
        raise UsageError(f"--temperature {options.temperature}: give a number from 0.0001 to 100")
    options.run.check()


_PIXEL_UNIT = 64
"""Maps of pixels are large: no more of them are held at once, whatever the device."""


def run_refine(options: RefineOptions, start: Start | None = None, loading: Loading | None = None) -> RefineReport:
    """Refine CAMs; resumes what an earlier run began.

    Args:
        options: What to do.
        start: Begins to show progress.
        loading: Called before a model is loaded; when there is nothing to do, none is.

    Raises:
        ClipseedError: see the modules it uses; images that cannot be read are skipped and reported.
    """
    check(options)
    out = options.out or default_out(options.source, options.method)
    if out.resolve() == options.source.resolve():
        raise UsageError(f"--out {out}: is the file that is being refined")
    with CamSet(options.source) as cams, contextlib.closing(_open(options, out, cams, loading)) as engine:
        about, shard = engine.about, options.run.shard
        source = relocated(cams.manifest, options.images, options.root)
        manifest = refine_manifest(
            options.method, about["constants"], source, about["model"], about["weights"], options.source
        )
        exact = cams.manifest["options"].get("paper") or options.preset
        dtype = "float32" if exact else "float16"
        unit = dealt_unit(about["unit"], len(cams), shard.count * engine.hands)
        with CamWriter(
            out, manifest, dtype, unit, overwrite=options.run.overwrite, shard=shard, earlier=earlier_in_cams(cams)
        ) as writer:
            writer.forget_unlike({key: tuple(cams.classes(key).tolist()) for key in cams})
            writer.follow(cams.keys(), cams.stamp)
            done = run(engine, writer, [cam_sample(cams, key) for key in cams], start, shard=shard)
        freshen(out, options.source)
        return RefineReport(**vars(done), source=options.source)


def _open(options: RefineOptions, out: Path, cams: CamSet, loading: Loading | None) -> Deferred[Cam]:
    """What can be refused is refused here, before workers start."""
    if options.method != "par" and cams.manifest["method"] in ("par", "dense-crf"):
        raise UsageError(f"{options.source}: holds maps of pixels; refine {options.method} works on patch maps")
    if options.preset is not None:
        if options.method != "caa":
            raise UsageError("--preset belongs to refine caa")
        if fma_constants(options.preset)[1] == "raw" and not cams.manifest["options"].get("raw"):
            raise UsageError(
                f"--preset {options.preset}: spreads maps at their own scale, and those of {options.source} are in "
                "[0, 1]; make them with clipseed cam --raw"
            )
    if options.method == "par":
        return open_engine(partial(_Par, options, cams), options.run.cluster)
    choice = _choice(options, cams.manifest)
    about = choice.known(recorded_manifest(out))
    if about is not None:
        same = about["model"].get("sha256") == cams.manifest["model"].get("sha256")
        about = about | {"constants": _constants(options, cams.manifest)} if same else None
    say = partial(loading, model_name(choice.model, choice.weights)) if loading else None
    return open_engine(partial(_Spreading, options, cams), options.run.cluster, about, say)


def _choice(options: RefineOptions, source: Manifest) -> ClipChoice:
    """The model that made the CAMs, from where its weights are now."""
    model = source["model"]
    name = None if model["model"] == "inferred" else model["model"]
    weights = options.weights or source.get("weights") or model["weights"]
    return ClipChoice(name, weights, options.run, _released(options, source))


def _released(options: RefineOptions, source: Manifest) -> bool:
    return bool(source["options"].get("paper")) if options.paper is None else options.paper


def _learned(options: RefineOptions, source: Manifest) -> PromptFile | None:
    """The learned prompts that CAMs were made with, where they were made with some.

    Raises:
        WeightsError: they are not where they were, or are others now.
    """
    sha256 = recorded_prompts(source)
    if sha256 is None:
        return None
    path = options.prompts or Path(str(source.get("prompts")))
    try:
        found = read_prompts(path, str(source["vocabulary"].get("name")))
    except (WeightsError, UsageError) as error:
        raise WeightsError(
            f"{options.source}: its prompts cannot be read; name them with --prompts. {error}"
        ) from error
    if found.sha256 != sha256:
        raise WeightsError(f"--prompts {path}: not the prompts that {options.source} was made with")
    return found


def _chosen(options: RefineOptions, source: Manifest) -> CaaOptions:
    """CAA's constants, with everything filled in."""
    name = str(source["vocabulary"].get("name"))
    if options.preset is None:
        return caa_options(options.caa or CaaOptions(), options.box_threshold, name, _released(options, source))
    constants, _ = fma_constants(options.preset)
    threshold = constants.box_threshold if options.box_threshold is None else options.box_threshold
    return caa_options(options.caa or constants, threshold, name, options.paper is not False)


def _constants(options: RefineOptions, source: Manifest) -> dict[str, Any]:
    found = caa_manifest(_chosen(options, source))
    if options.preset is not None:
        found |= {"raw": True, "preset": options.preset}
    return found | ({"temperature": options.temperature} if options.method == "js" else {})


class _Refinement(TokenWork[Any, Cam]):
    """What the refinements share: streaming the images of stored CAMs."""

    def __init__(self, options: RefineOptions, cams: CamSet, device: torch.device) -> None:
        super().__init__(device, options.run)
        self.options, self.cams, self.device = options, cams, device
        self.reader = recorded_reader(relocated(self.cams.manifest, options.images, options.root))

    def refined(self, items: Sequence[Any], cams: list[Cam]) -> list[Cam]:
        """Refine images that fit their CAMs."""
        raise NotImplementedError

    def compute(self, items: Sequence[Any]) -> list[Cam | ImageError]:
        """Refine a batch, leaving out images that do not fit their CAMs."""
        cams = [self.cams[item.sample.id] for item in items]
        found: list[Cam | ImageError | None] = [
            misfit(cam, item.size, item.stamp) for cam, item in zip(cams, items, strict=True)
        ]
        fit = [k for k, problem in enumerate(found) if problem is None]
        if fit:
            results = self.refined([items[k] for k in fit], [cams[k] for k in fit])
            for k, result in zip(fit, results, strict=True):
                found[k] = result
        return [result for result in found if result is not None]


class _Spreading(_Refinement):
    """CAA and the class-distribution affinity: maps spread between patches."""

    def __init__(self, options: RefineOptions, cams: CamSet) -> None:
        source = cams.manifest
        choice = _choice(options, source)
        self.caa, self._constants = _chosen(options, source), _constants(options, source)
        self.clip = choice.load()
        if self.clip.info.sha256 != source["model"]["sha256"]:
            raise WeightsError(f"--weights {choice.weights}: not the weights that {options.source} was made with")
        super().__init__(options, cams, self.clip.tower.device)
        if options.method == "js":
            words = parse_vocabulary(source["vocabulary"], str(options.source), "classes")
            self.text = text_of(self.clip, words, _learned(options, source))

    def about(self) -> dict[str, Any]:
        """Constants, model and where its weights are, device, and images per unit."""
        return about_clip(self.clip) | {"constants": self._constants}

    @property
    def loader(self) -> ViewLoader:
        """Decodes images as the maps were made from them."""
        recorded = self.cams.manifest["options"]
        limits = (int(recorded.get("max_side") or 0), int(recorded.get("min_side") or 0))
        return ViewLoader(self.reader, self.clip.tower.patch, (1.0,), *limits)

    def refined(self, items: Sequence[LoadedViews], cams: list[Cam]) -> list[Cam]:
        """Spread maps along attention."""
        if not len(cams[0].classes):
            return cams
        for item, cam in zip(items, cams, strict=True):
            if cam.maps.shape[1:] != item.grid:
                raise InputError(f"{item.sample.id}: its maps are not on the patch grid of the model")
        pixels = stacked([item.views[0] for item in items], self.device)
        given = cams if self.options.preset else [cam.unit() for cam in cams]
        raw = [torch.from_numpy(cam.maps) for cam in given]
        maps = self._maps(self.clip, pixels, raw)
        broken = [k for k, found in enumerate(maps) if not torch.isfinite(found).all()]
        if broken and self.clip.exact is not self.clip:
            self.counters["recomputed"] += len(broken)
            again = self._maps(self.clip.exact, pixels[broken], [raw[k] for k in broken])
            for k, found in zip(broken, again, strict=True):
                maps[k] = found
        scaled = self.options.preset is not None
        return [
            replace(cam, maps=found.nan_to_num(0.0).numpy(), raw=scaled) for cam, found in zip(cams, maps, strict=True)
        ]

    def _maps(self, clip: FrozenClip, pixels: Tensor, cams: list[Tensor]) -> list[Tensor]:
        attention = patch_attention(clip.tower, pixels, self.caa.layers)
        if self.options.preset is not None:
            return caa_of_raw(cams, attention, self.caa, fma_constants(self.options.preset)[1])
        if self.options.method == "caa":
            return caa(cams, attention, self.caa)
        scores = similarities(dense_features(clip, pixels, "svc"), self.text)
        affinity = balance(distribution_affinity(scores, attention, self.options.temperature), self.caa.rounds)
        return spread_within_boxes(cams, affinity, self.caa)


class _Par(_Refinement):
    """Pixel-adaptive refinement: maps follow the colours of the image, at its full size."""

    def __init__(self, options: RefineOptions, cams: CamSet) -> None:
        super().__init__(options, cams, pick_device(options.run.device))
        self.one_by_one = None if options.run.batch_size else one_by_one(self.device, LARGE_IMAGE)

    def about(self) -> dict[str, Any]:
        """Constants, the model that the maps come from, device, and images per unit."""
        source, par = self.cams.manifest, self.options.par
        return {
            "constants": {**asdict(par), "dilations": list(par.dilations)},
            "model": source["model"],
            "weights": str(source.get("weights")),
            "device": str(self.device),
            "unit": _PIXEL_UNIT,
        }

    @property
    def loader(self) -> ImageLoader:
        """Decodes images at their own size."""
        return ImageLoader(self.reader)

    def refined(self, items: Sequence[LoadedImage], cams: list[Cam]) -> list[Cam]:
        """Let maps follow colours."""
        if not len(cams[0].classes):
            return cams
        return along_colors([item.pixels for item in items], cams, self.options.par, self.device)


def along_colors(
    images: Sequence[npt.NDArray[np.uint8]], cams: Sequence[Cam], par: ParOptions, device: torch.device
) -> list[Cam]:
    """CAMs of images ``(H, W, 3)`` of one size, at that size, following their colours."""
    maps = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(cam.upsampled()) for cam in cams], batch_first=True)
    pixels = stacked(images, device)
    refined = refine_par(maps.to(device), pixels, par.iterations, par.dilations, par.sharpness, par.position_weight)
    refined /= (1 + par.position_weight) ** par.iterations  # its weights sum to more than 1
    found = refined.clamp_(0, 1).cpu().numpy()
    return [replace(cam, maps=rows[: len(cam.classes)], raw=False) for cam, rows in zip(cams, found, strict=True)]
