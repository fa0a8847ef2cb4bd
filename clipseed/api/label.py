"""``clipseed.label``: images and class names in, label masks out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import overload

import numpy as np

from clipseed.api.images import Classes, MemoryReader, Request, requested
from clipseed.api.model import FrozenClip, seen
from clipseed.api.results import PseudoLabel
from clipseed.clip import model as clip_model
from clipseed.data.dataset import DatasetOptions
from clipseed.data.images import AnyImage
from clipseed.data.vocabulary import Vocabulary
from clipseed.defaults import CAM_MAX_SIDE, WEIGHTS, LabelRecipe, Precision
from clipseed.jobs.label import LabelledImage, LabelOptions, LabelWork, LabelWorkRecipe, check
from clipseed.jobs.sam_masks import GridMasks, MasksRecipe
from clipseed.runtime.run import RunOptions
from clipseed.runtime.work import results_of


@overload
def label(  # type: ignore[overload-overlap]  # a path is a sequence of strings, too
    images: AnyImage, labels: Sequence[str], *, recipe: LabelRecipe | None = None, classes: Classes | None = None,
    background: str | Sequence[str] | None = None, confidence: float | None = None,
    clip: clip_model.FrozenClip | None = None, model: str | None = None, weights: str | Path = WEIGHTS,
    checkpoint: str | Path | None = None, max_side: int = CAM_MAX_SIDE, device: str = "auto",
    precision: Precision = "auto",
) -> PseudoLabel: ...  # fmt: skip


@overload
def label(
    images: Sequence[AnyImage], labels: Sequence[str] | Sequence[Sequence[str]], *,
    recipe: LabelRecipe | None = None, classes: Classes | None = None,
    background: str | Sequence[str] | None = None, confidence: float | None = None,
    clip: clip_model.FrozenClip | None = None, model: str | None = None, weights: str | Path = WEIGHTS,
    checkpoint: str | Path | None = None, max_side: int = CAM_MAX_SIDE, device: str = "auto",
    precision: Precision = "auto",
) -> list[PseudoLabel]: ...  # fmt: skip


def label(
    images: AnyImage | Sequence[AnyImage], labels: Sequence[str] | Sequence[Sequence[str]], *,
    recipe: LabelRecipe | None = None, classes: Classes | None = None,
    background: str | Sequence[str] | None = None, confidence: float | None = None,
    clip: clip_model.FrozenClip | None = None, model: str | None = None, weights: str | Path = WEIGHTS,
    checkpoint: str | Path | None = None, max_side: int = CAM_MAX_SIDE, device: str = "auto",
    precision: Precision = "auto",
) -> PseudoLabel | list[PseudoLabel]:  # fmt: skip
    """Label masks of one image, or of a list of them, as ``clipseed label`` makes them.

    Models are loaded at the first call and kept for the next one.

    Args:
        images: Pillow images, paths, or arrays ``(H, W, 3)`` uint8.
        labels: Class names that the image shows; of a list of images one list of names for each, or one for all.
        recipe: ``clip-es``, ``svc`` or ``segments`` (with ``checkpoint``, the default then).
        classes: The whole class list, by which masks are numbered: ``voc``, ``coco``, a file, or names. Default: the
            labels, in the order they come.
        background: Words that compete with the classes; default: general ones, or the class list's.
        confidence: Less certain pixels become 255 (0.95 in CLIP-ES's paper).
        clip: A model that is loaded already, in place of ``model``, ``weights``, ``device`` and ``precision``
            (:meth:`clipseed.FrozenClip.load`).
        model: As of :meth:`clipseed.FrozenClip.load`, like ``weights``, ``device`` and ``precision``.
        weights: Pretrained tag, file, or ``toy``.
        device: Where it runs, SAM too.
        precision: Of the networks.
        checkpoint: SAM's weights, or ``toy``.
        max_side: Longer images are shrunk to it for CLIP; 0: never.

    Raises:
        ImageError: an image cannot be read.
        InputError: a label is in no class list.
        UsageError: labels do not belong to the images, or an option not to the recipe.
        WeightsError: a model cannot be loaded.
    """
    request = requested(images, labels, classes, background)
    options = LabelOptions(
        DatasetOptions("folder"), Path("pseudo"), recipe, keep=Path("cams"), confidence=confidence, max_side=max_side,
        checkpoint=None if checkpoint is None else str(checkpoint), run=RunOptions(device=device, precision=precision),
    )  # fmt: skip
    check(options)
    made = LabelWorkRecipe(options, request.vocabulary, request.reader)
    loaded = clip or _clip(model, str(weights), device, precision)
    grid = None if made.grid is None else _grid(options.checkpoint or "", device, precision)
    results = results_of(LabelWork(made, loaded, grid), request.samples)
    found = [_answer(request, one) for one in results if isinstance(one, LabelledImage)]
    return found[0] if request.single else found


def _answer(request: Request, found: LabelledImage) -> PseudoLabel:
    assert found.soft is not None
    cam = seen(request, found.soft)
    confidence = None if found.confidence is None else found.confidence.astype(np.float32)
    return PseudoLabel(found.labels, request.vocabulary.class_names, cam.names, confidence, cam.image, cam)


@lru_cache(maxsize=1)
def _clip(model: str | None, weights: str, device: str, precision: Precision) -> FrozenClip:
    return FrozenClip.load(model, weights, device, precision)


@lru_cache(maxsize=1)
def _grid(checkpoint: str, device: str, precision: Precision) -> GridMasks:
    options = LabelOptions(
        DatasetOptions("folder"), Path("pseudo"), checkpoint=checkpoint,
        run=RunOptions(device=device, precision=precision),
    )  # fmt: skip
    recipe = LabelWorkRecipe(options, Vocabulary("none", ()), MemoryReader(())).grid
    assert isinstance(recipe, MasksRecipe)
    return GridMasks(recipe)
