"""COCO: an image folder and ``annotations/instances_*.json`` (masks use the contiguous class order)."""

from __future__ import annotations

from pathlib import Path

from clipseed.data.json_fields import integer, records
from clipseed.data.labels import Labels, read_json
from clipseed.data.listing import clean_id
from clipseed.data.paths import is_folder
from clipseed.data.types import Sample
from clipseed.data.vocabulary import ClassText, Vocabulary
from clipseed.errors import InputError


def find_annotations(root: Path, split: str | None) -> tuple[str, Path]:
    """Split name and instances file below ``root``.

    Raises:
        InputError: there is none, or several and no ``split`` to choose by.
    """
    files = {path.stem.removeprefix("instances_"): path for path in sorted(root.glob("annotations/instances_*.json"))}
    if split is None and len(files) == 1:
        return next(iter(files.items()))
    if split in files:
        return split, files[split]
    have = ", ".join(files) or "none"
    if split is None and files:
        raise InputError(f"{root}: choose one of its annotation files with --split ({have})")
    what = f"annotations/instances_{split or '*'}.json"
    raise InputError(f"{root}: no {what} here (there: {have}); name the folder with --root")


def find_images(root: Path, split: str) -> Path:
    """Image folder of a split: ``<root>/<split>`` or ``<root>/images/<split>``.

    Raises:
        InputError: neither exists.
    """
    for candidate in (root / split, root / "images" / split):
        if is_folder(candidate):
            return candidate
    raise InputError(f"{root}: no image folder {split!r} or images/{split}; name it with --images")


def read_instances(
    path: Path, images: Path, vocabulary: Vocabulary | None, labels: Labels | None
) -> tuple[Vocabulary, list[Sample]]:
    """Samples of an instances file, in its image order; labels are ascending class indices.

    Categories become classes by ascending category id. ``vocabulary`` gives their words; without one the category
    names are the classes.

    Raises:
        InputError: malformed file, or as many categories as the vocabulary does not have.
    """
    data = read_json(path, "a COCO annotation file")
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a COCO annotation file (no mapping at the top)")
    categories = sorted(records(data, "categories", path), key=lambda item: integer(item, "id", str(path)))
    if vocabulary is None:
        vocabulary = Vocabulary(path.stem, tuple(ClassText(str(item.get("name", ""))) for item in categories))
    if len(categories) != len(vocabulary.classes):
        raise InputError(
            f"{path}: {len(categories)} categories, but vocabulary {vocabulary.name!r} has "
            f"{len(vocabulary.classes)} classes; give a fitting list with --classes"
        )
    class_of = {integer(item, "id", str(path)): position for position, item in enumerate(categories)}
    if len(class_of) < len(categories):
        raise InputError(f"{path}: two categories have the same id")
    present: dict[int, set[int]] = {}
    for item in records(data, "annotations", path):
        category = class_of.get(integer(item, "category_id", str(path)))
        if category is None:
            raise InputError(f"{path}: an annotation has the unknown category_id {item['category_id']}")
        present.setdefault(integer(item, "image_id", str(path)), set()).add(category)
    samples: dict[str, Sample] = {}
    for item in records(data, "images", path):
        file_name = item.get("file_name")
        if not isinstance(file_name, str):
            raise InputError(f"{path}: an image has no file_name")
        identifier = clean_id(file_name, str(path))
        if identifier in samples:
            raise InputError(f"{path}: two images have the id {identifier!r} (file_name without suffix)")
        found = tuple(sorted(present.get(integer(item, "id", str(path)), ())))
        known = found if labels is None else labels.get(identifier)
        samples[identifier] = Sample(identifier, images / file_name, known)
    return vocabulary, list(samples.values())
