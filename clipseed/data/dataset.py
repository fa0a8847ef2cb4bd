"""One entry point for every data set that the commands know."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from clipseed.data import coco, voc
from clipseed.data.background import choose_background
from clipseed.data.images import FileReader, peculiarities, read_image
from clipseed.data.labels import LabelFile, Labels, read_label_file, read_labels
from clipseed.data.listing import list_photos, read_split
from clipseed.data.paths import IMAGE_SUFFIXES, is_file, is_folder
from clipseed.data.types import ImageReader, ImageSet, Sample, check_id
from clipseed.data.vocabulary import (
    Vocabulary,
    checked,
    load_vocabulary,
    named_vocabulary,
    parse_vocabulary,
)
from clipseed.defaults import MAX_PIXELS, DatasetName
from clipseed.errors import ImageError, InputError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

DATASETS: tuple[DatasetName, ...] = get_args(DatasetName)
_FILES = ("voc", "coco", "folder")
_BELONGS = {"root": ("voc", "coco"), "images": ("coco", "folder"), "labels": _FILES}
"""Options that only some data sets have; ignored silently they would give other results than were asked for."""


@dataclass(frozen=True)
class DatasetOptions:
    """Where the images, labels and class texts are; the command line's data-set options.

    ``templates`` and ``background`` replace the vocabulary's own when given
    (:func:`~clipseed.data.background.choose_background`). With ``auto_labels`` images may lack
    labels: the command finds them itself. With ``folder_labels`` the first folder of an image's path is its class, and
    the folders are the class list where none is given. With ``images_only`` none has labels, and no class list is
    needed. A ``vocabulary`` that is known stands in for ``classes``.
    """

    dataset: str
    root: Path | None = None
    images: Path | None = None
    split: str | None = None
    labels: Path | None = None
    auto_labels: bool = False
    folder_labels: bool = False
    images_only: bool = False
    classes: str | None = None
    vocabulary: Vocabulary | None = None
    templates: tuple[str, ...] = ()
    background: str | None = None
    exif: bool = False
    max_pixels: int = MAX_PIXELS
    limit: int | None = None
    toy_seed: int = 0


def open_dataset(options: DatasetOptions) -> ImageSet:
    """List a data set's samples with their labels.

    Raises:
        UsageError: an option is missing or does not belong to this data set.
        InputError: files are missing or malformed.
    """
    openers = {"voc": _open_voc, "coco": _open_coco, "folder": _open_folder, "toy": _open_toy}
    if options.dataset not in openers:
        raise UsageError(f"--dataset {options.dataset}: choose one of {', '.join(DATASETS)}")
    for name, where in _BELONGS.items():
        if getattr(options, name) is not None and options.dataset not in where:
            raise UsageError(f"--{name} does not belong to --dataset {options.dataset} (but to {', '.join(where)})")
    if options.auto_labels and options.dataset == "toy":
        raise UsageError("--labels auto: the toy set has labels; try it on a copy (clipseed demo --save-dataset DIR)")
    if options.folder_labels and options.dataset != "folder":
        raise UsageError(f"--labels folders: images of --dataset {options.dataset} do not lie in folders of classes")
    image_set = openers[options.dataset](options)
    if options.templates:
        try:
            vocabulary = checked(replace(image_set.vocabulary, templates=options.templates), "--template")
        except InputError as error:
            raise UsageError(str(error)) from error
        image_set = replace(image_set, vocabulary=vocabulary)
    if options.background is not None:
        image_set = replace(image_set, vocabulary=choose_background(image_set.vocabulary, options.background))
    if options.limit is not None:
        image_set = replace(image_set, samples=image_set.samples[: options.limit])
    if options.images_only:
        image_set = replace(image_set, samples=[Sample(one.id, one.path, None) for one in image_set.samples])
    return image_set


def recorded_set(manifest: Mapping[str, Any], samples: Sequence[Sample], reader: ImageReader, where: str) -> ImageSet:
    """The images that an output was made from, as its manifest describes them.

    Raises:
        InputError: the manifest describes no classes.
    """
    dataset = dict(manifest["dataset"])
    name, root, split, truth = (dataset.pop(key, None) for key in ("name", "root", "split", "ground_truth"))
    return ImageSet(
        name=str(name),
        root=Path(str(root)) if root else None,
        split=str(split),
        samples=samples,
        vocabulary=parse_vocabulary(manifest["vocabulary"], where, "classes"),
        reader=reader,
        ground_truth=None if truth is None else str(truth),
        source=dataset,
        exif=bool(manifest["options"].get("exif")),
        max_pixels=manifest.get("max_pixels"),
    )


def _reading(options: DatasetOptions) -> dict[str, Any]:
    """How the files of a data set are read."""
    reader = FileReader(exif=options.exif, max_pixels=options.max_pixels)
    return {"reader": reader, "exif": options.exif, "max_pixels": options.max_pixels}


def _vocabulary(options: DatasetOptions, default: str) -> Vocabulary:
    return options.vocabulary or load_vocabulary(options.classes or default)


def _labels(options: DatasetOptions, vocabulary: Vocabulary) -> Labels | None:
    """Labels by image id; ``None`` where the data set's own annotation is to be read."""
    if options.images_only:
        return {}
    return read_labels(options.labels, vocabulary) if options.labels else None


def _source(options: DatasetOptions, images: Path) -> dict[str, str | int]:
    """Image folder and label file, for the manifest; :func:`image_finder` reads them back."""
    named = {"labels": options.labels, "images": images}
    places: dict[str, str | int] = {key: str(path.resolve()) for key, path in named.items() if path is not None}
    if options.folder_labels:
        return {"labels": "folders", **places}
    return {"labels": "auto", **places} if options.auto_labels else places


def _open_voc(options: DatasetOptions) -> ImageSet:
    vocabulary = _vocabulary(options, "voc")
    root = voc.find_devkit(options.root).resolve()
    if options.labels is None and not (options.images_only or options.auto_labels or is_folder(root / "Annotations")):
        raise InputError(f"{root}: no Annotations folder, which says what images show; give --labels FILE, or auto")
    split, samples = voc.read_devkit(root, options.split, vocabulary, _labels(options, vocabulary))
    truth = root / "SegmentationClass"
    return ImageSet(
        "voc", root, split, samples, vocabulary, **_reading(options), source=_source(options, root / "JPEGImages"),
        ground_truth=str(truth) if truth.is_dir() and not options.images_only else None,
    )  # fmt: skip


def _open_coco(options: DatasetOptions) -> ImageSet:
    start = options.root or (Path(os.environ["CLIPSEED_COCO"]) if os.environ.get("CLIPSEED_COCO") else Path())
    root = start.resolve()
    split, annotations = coco.find_annotations(root, options.split)
    images = (options.images or coco.find_images(root, split)).resolve()
    # Without labels the file's own categories will do, however many there are.
    expected = None if options.images_only and options.vocabulary is None else _vocabulary(options, "coco")
    labels = {} if expected is None else _labels(options, expected)
    vocabulary, samples = coco.read_instances(annotations, images, expected, labels)
    if options.auto_labels and not any(sample.labels for sample in samples):
        # A file that annotates nothing (COCO's test sets) knows no labels, rather than that there is nothing to see.
        samples = [replace(sample, labels=None) for sample in samples]
    truth = next((path for path in (root / "masks" / split, root / "masks") if path.is_dir()), None)
    return ImageSet(
        "coco", root, split, samples, vocabulary, **_reading(options), source=_source(options, images),
        ground_truth=str(truth) if truth and not options.images_only else None,
    )  # fmt: skip


def _open_folder(options: DatasetOptions) -> ImageSet:
    if options.images is None:
        raise UsageError("--dataset folder needs --images DIR, the folder with the images")
    files, unread = list_photos(options.images)  # first, as whoever looks for a mistake would
    if options.images_only:
        vocabulary, known = options.vocabulary or Vocabulary("none", ()), LabelFile({}, "nothing")
    elif options.folder_labels:
        vocabulary, known = _labels_of_folders(options, options.images, files)
    else:
        vocabulary, known = _folder_labels(options)
    labels = known.labels
    if options.split:
        if not is_file(Path(options.split)):
            raise InputError(f"--split {options.split}: no such file; of a folder it is a file with one id per line")
        name, ids = Path(options.split).stem, read_split(Path(options.split))
    else:
        # Labelled ids that have no image stay in the list, so that the run reports them.
        name, ids = "all", sorted(files.keys() | labels.keys())
    if not options.auto_labels and not options.images_only and not files.keys() & labels.keys():
        raise InputError(
            f"{options.labels}: none of its {len(labels)} ids is an image in {options.images} (read as "
            f"{known.read_as}; first label id {next(iter(labels), '')!r}, first image {next(iter(files))!r})"
        )
    samples = [Sample(key, files.get(key, options.images / key), labels.get(key)) for key in ids]
    root = options.images.resolve()
    notes = (*known.notes, *unread, *peculiarities(list(files.values()), exif=options.exif))
    return ImageSet(
        "folder", root, name, samples, vocabulary, **_reading(options), source=_source(options, root), notes=notes
    )


def _folder_labels(options: DatasetOptions) -> tuple[Vocabulary, LabelFile]:
    if options.classes is None and options.vocabulary is None:
        raise UsageError("--dataset folder needs --classes FILE (one class name per line), or --classes voc or coco")
    if options.labels is None and not options.auto_labels:
        raise UsageError(
            "--dataset folder needs --labels FILE (which classes each image shows; CSV, JSON or text), --labels "
            "folders (each image lies in a folder called like its class), or --labels auto to have CLIP tag them"
        )
    vocabulary = _vocabulary(options, "")
    if options.labels is None:
        return vocabulary, LabelFile({}, "nothing")
    return vocabulary, read_label_file(options.labels, vocabulary)


def _labels_of_folders(options: DatasetOptions, root: Path, files: Mapping[str, Path]) -> tuple[Vocabulary, LabelFile]:
    """Class list and labels from where images lie: ``cat/2019/x.jpg`` shows a cat.

    Raises:
        InputError: no image lies in a folder, or a folder is called like no class of the list that is given.
    """
    folders = {key: key.partition("/")[0] for key in files if "/" in key}
    names = sorted(set(folders.values()))
    if not names:
        raise InputError(f"--labels folders: the images lie in {root} itself, not in one folder for each class")
    if options.classes is None and options.vocabulary is None:
        vocabulary = named_vocabulary(names, root.resolve().name or "folders", f"--labels folders: {root}")
    else:
        vocabulary = _vocabulary(options, "")
    indices = {name: vocabulary.index(name, f"--labels folders: {root / name}") for name in names}
    return vocabulary, LabelFile({key: (indices[name],) for key, name in folders.items()}, "folders")


def _open_toy(options: DatasetOptions) -> ImageSet:
    from clipseed.data.toy.dataset import HELD_OUT_COUNT, SPLITS, toy_set

    if options.split is not None and options.split not in SPLITS:
        raise UsageError(f"--split {options.split}: the toy set has {' and '.join(SPLITS)}")
    seed, count = SPLITS[options.split] if options.split else (options.toy_seed, HELD_OUT_COUNT)
    return toy_set(_vocabulary(options, "toy"), seed, count)


@dataclass(frozen=True)
class ImageFinder:
    """Opens the images of the data set that a manifest describes, by sample id; survives pickling.

    Attributes:
        folder: Where the images are; ``None`` for the toy world.
        toy_seed: Seed of the toy world.
        exif, max_pixels: As for :func:`~clipseed.data.images.read_image`.
    """

    folder: Path | None
    toy_seed: int = 0
    exif: bool = False
    max_pixels: int = MAX_PIXELS

    def __call__(self, identifier: str) -> Image:
        """The image.

        Raises:
            ImageError: it is gone or unreadable.
        """
        if self.folder is None:
            from clipseed.data.toy.dataset import ToyReader

            return ToyReader(self.toy_seed)(Sample(identifier, Path(identifier), None))
        try:
            check_id(identifier, str(self.folder))  # a foreign file's id must not lead out of the folder
        except InputError as error:
            raise ImageError(str(error)) from error
        path = self._path(identifier)
        if path is None:
            raise ImageError(
                f"{self.folder / identifier}: the image is not there any more; name the folder that holds it now "
                "with --images"
            )
        return read_image(path, exif=self.exif, max_pixels=self.max_pixels)

    def path(self, identifier: str) -> Path | None:
        """The file of an image; ``None`` where there is none."""
        try:
            return None if self.folder is None else self._path(check_id(identifier, str(self.folder)))
        except InputError:
            return None

    def _path(self, identifier: str) -> Path | None:
        assert self.folder is not None
        for suffix in IMAGE_SUFFIXES:
            path = self.folder / f"{identifier}{suffix}"
            if is_file(path):
                return path
        # Suffixes in capitals, or in both.
        wanted = (self.folder / identifier).name
        beside = (self.folder / identifier).parent
        try:
            entries = sorted(beside.iterdir())
        except OSError:
            return None
        for path in entries:
            if path.stem == wanted and path.suffix.lower() in IMAGE_SUFFIXES and is_file(path):
                return path
        return None


def relocated(manifest: Mapping[str, Any], images: Path | None, root: Path | None = None) -> dict[str, Any]:
    """A manifest whose images are in this folder now, or in the data set of this root.

    Raises:
        UsageError: both are given, or the data set has no root.
        InputError: there is no such folder, or no data set there.
    """
    dataset = manifest.get("dataset")
    known = dict(dataset) if isinstance(dataset, dict) else {}
    if images is None and root is None:
        return dict(manifest)
    if images is not None and root is not None:
        raise UsageError("--images and --root: give one of them")
    if images is None:
        assert root is not None
        images = _images_below(root, known)
        known["root"] = str(images.parent.resolve() if known.get("name") == "voc" else root.resolve())
    elif not is_folder(images):
        raise UsageError(f"--images {images}: no such folder")
    return {**manifest, "dataset": {**known, "images": str(images.resolve())}}


def _images_below(root: Path, dataset: Mapping[str, Any]) -> Path:
    name = dataset.get("name")
    if name == "voc":
        return voc.find_devkit(root) / "JPEGImages"
    if name == "coco":
        return coco.find_images(root, str(dataset.get("split")))
    raise UsageError(f"--root belongs to voc and coco; the images of a {name} data set are named with --images")


def image_finder(
    dataset: Mapping[str, str | int | None], *, exif: bool = False, max_pixels: int | None = None
) -> ImageFinder:
    """Where the images of the data set are that a manifest describes.

    Raises:
        InputError: it describes none.
    """
    if dataset.get("name") == "toy" and not dataset.get("images"):
        seed = str(dataset.get("toy_seed") or 0)
        if not seed.isdecimal() or len(seed) > 20:
            raise InputError(f"the manifest names no seed of the toy set ({seed[:40]!r})")
        return ImageFinder(None, int(seed))
    return ImageFinder(Path(str(dataset.get("images"))), exif=exif, max_pixels=max_pixels or MAX_PIXELS)
