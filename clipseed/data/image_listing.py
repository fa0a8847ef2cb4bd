"""Data sets for commands that look at images alone: no labels, no classes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from clipseed.data import coco, voc
from clipseed.data.dataset import DATASETS
from clipseed.data.images import FileReader
from clipseed.data.listing import list_images, read_split
from clipseed.data.types import ImageReader, Sample
from clipseed.data.vocabulary import load_vocabulary
from clipseed.defaults import MAX_PIXELS
from clipseed.errors import UsageError


@dataclass(frozen=True)
class ListingOptions:
    """Where images are; the data-set options of the command line that do not concern labels."""

    dataset: str
    root: Path | None = None
    images: Path | None = None
    split: str | None = None
    exif: bool = False
    max_pixels: int = MAX_PIXELS
    limit: int | None = None


@dataclass(frozen=True)
class ImageListing:
    """An ordered list of images.

    Attributes:
        samples: In the order of the split file, or sorted by id; without labels, unless they come from CAMs.
        reader: How to open them.
        dataset: Where they are, for the manifest.
        exif, max_pixels: As they are read.
    """

    samples: tuple[Sample, ...]
    reader: ImageReader
    dataset: dict[str, str | int | None] = field(default_factory=dict)
    exif: bool = False
    max_pixels: int | None = MAX_PIXELS


def list_data_set(options: ListingOptions) -> ImageListing:
    """List a data set's images.

    Raises:
        UsageError: an option is missing or does not belong to this data set.
        InputError: files are missing or malformed.
    """
    if options.dataset not in DATASETS:
        raise UsageError(f"--dataset {options.dataset}: choose one of {', '.join(DATASETS)}")
    belongs = {"root": ("voc", "coco"), "images": ("coco", "folder"), "split": ("voc", "coco", "folder")}
    for name, where in belongs.items():
        if getattr(options, name) is not None and options.dataset not in where:
            raise UsageError(f"--{name} does not belong to --dataset {options.dataset} (but to {', '.join(where)})")
    if options.dataset == "toy":
        return _toy(options)
    split, folder, root, samples = {"voc": _voc, "coco": _coco, "folder": _folder}[options.dataset](options)
    about: dict[str, str | int | None] = {
        "name": options.dataset, "root": str(root), "split": split, "ground_truth": None, "images": str(folder)
    }  # fmt: skip
    reader = FileReader(exif=options.exif, max_pixels=options.max_pixels)
    bare = tuple(Sample(sample.id, sample.path, None) for sample in samples[: options.limit])
    return ImageListing(bare, reader, about, options.exif, options.max_pixels)


_Listing = tuple[str, Path, Path, list[Sample]]
"""Name of the split, folder of the images, root of the data set, images."""


def _voc(options: ListingOptions) -> _Listing:
    root = voc.find_devkit(options.root).resolve()
    split, samples = voc.read_devkit(root, options.split, load_vocabulary("voc"), {})
    return split, root / "JPEGImages", root, samples


def _coco(options: ListingOptions) -> _Listing:
    start = options.root or (Path(os.environ["CLIPSEED_COCO"]) if os.environ.get("CLIPSEED_COCO") else Path())
    root = start.resolve()
    split, annotations = coco.find_annotations(root, options.split)
    images = (options.images or coco.find_images(root, split)).resolve()
    _, samples = coco.read_instances(annotations, images, None, {})
    return split, images, root, samples


def _folder(options: ListingOptions) -> _Listing:
    if options.images is None:
        raise UsageError("--dataset folder needs --images DIR, the folder with the images")
    found = list_images(options.images)
    name, ids = "all", list(found)
    if options.split:
        name, ids = Path(options.split).stem, read_split(Path(options.split))
    folder = options.images.resolve()
    return name, folder, folder, [Sample(key, found.get(key, options.images / key), None) for key in ids]


def _toy(options: ListingOptions) -> ImageListing:
    from clipseed.data.toy.dataset import toy_set

    toy = toy_set(load_vocabulary("toy"))
    about: dict[str, str | int | None] = {
        "name": "toy", "root": None, "split": toy.split, "ground_truth": toy.ground_truth, **toy.source
    }  # fmt: skip
    bare = tuple(Sample(sample.id, sample.path, None) for sample in toy.samples[: options.limit])
    return ImageListing(bare, toy.reader, about)
