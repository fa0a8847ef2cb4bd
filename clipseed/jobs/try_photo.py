"""``clipseed try``: one photo and some words, maps and label mask beside it in one picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clipseed.data.background import choose_background
from clipseed.data.dataset import DatasetOptions
from clipseed.data.images import FileReader
from clipseed.data.types import Sample
from clipseed.data.vocabulary import named_vocabulary
from clipseed.defaults import LabelRecipe, Precision
from clipseed.jobs.label import LabelledImage, LabelOptions, LabelWork, LabelWorkRecipe, check
from clipseed.report.overlay import contact_sheet, fitted, heat_overlay, label_overlay, map_caption, outlined
from clipseed.runtime.run import Loading, RunOptions
from clipseed.runtime.work import results_of
from clipseed.segments import enlarged
from clipseed.store.empty import empty_maps
from clipseed.store.files import replacing

_HEIGHT = 320


@dataclass(frozen=True)
class TryOptions:
    """Everything ``clipseed try`` can be told.

    Attributes:
        photo: The image's file; turned as its EXIF orientation says.
        words: What it shows, one class each.
        out: The PNG to write.
        background: As of :class:`~clipseed.data.dataset.DatasetOptions`.
        recipe, checkpoint: As of :class:`~clipseed.jobs.label.LabelOptions`.
    """

    photo: Path
    words: tuple[str, ...]
    out: Path
    background: str | None = None
    recipe: LabelRecipe | None = None
    checkpoint: str | None = None
    model: str | None = None
    weights: str | None = None
    device: str = "auto"
    precision: Precision = "auto"


@dataclass(frozen=True)
class TryResult:
    """What came of it.

    Attributes:
        shares: Part of the photo that each word got.
        empty: Words whose map is empty.
    """

    out: Path
    shares: dict[str, float]
    empty: tuple[str, ...]


def run_try(options: TryOptions, loading: Loading | None = None) -> TryResult:
    """Label one photo and draw what came of it.

    Raises:
        ImageError: the photo cannot be read.
        InputError: a word is given twice.
        WeightsError: the model's weights are not here and cannot be fetched.
        StoreError: ``out`` cannot be written.
    """
    vocabulary = named_vocabulary(options.words, "given", "the words")
    if options.background is not None:
        vocabulary = choose_background(vocabulary, options.background)
    told = LabelOptions(
        DatasetOptions("folder", exif=True), Path("pseudo"), options.recipe, keep=Path("cams"),
        checkpoint=options.checkpoint, model=options.model, weights=options.weights,
        run=RunOptions(device=options.device, precision=options.precision, workers=0),
    )  # fmt: skip
    check(told)
    reader = FileReader(exif=True)
    sample = Sample(options.photo.name, options.photo, tuple(range(len(options.words))))
    image = np.asarray(reader(sample))  # what is wrong with it is said before a model is loaded
    if loading:
        loading(told.cam.model_name)
    (found,) = results_of(LabelWork(LabelWorkRecipe(told, vocabulary, reader)), [sample])
    assert isinstance(found, LabelledImage)
    labels, cam = found.labels, found.soft
    assert cam is not None
    tile = fitted(image, _HEIGHT)
    maps = zip(options.words, replace(cam, size=tile.shape[:2]).upsampled(), strict=True)
    row = [(options.photo.name, tile), *((map_caption(word, heat), heat_overlay(tile, heat)) for word, heat in maps)]
    small = enlarged(labels, tile.shape[:2])
    row.append(("label mask", outlined(label_overlay(tile, small), small)))
    with replacing(options.out) as temporary:
        contact_sheet([row], _HEIGHT).save(temporary, format="PNG")
    shares = {word: float((labels == k + 1).mean()) for k, word in enumerate(options.words)}
    gone = empty_maps(range(len(options.words)), cam.maps)
    return TryResult(options.out, shares, tuple(options.words[k] for k in gone))
