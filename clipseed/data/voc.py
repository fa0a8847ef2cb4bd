"""PASCAL VOC devkits: ``JPEGImages``, ``ImageSets/Segmentation/*.txt`` and ``Annotations/*.xml``."""

from __future__ import annotations

import os
from pathlib import Path
from xml.parsers import expat

from clipseed.data.labels import Labels
from clipseed.data.listing import list_images, read_split
from clipseed.data.paths import is_file, is_folder
from clipseed.data.types import Sample
from clipseed.data.vocabulary import Vocabulary
from clipseed.errors import InputError

_MAX_XML_BYTES = 4_000_000
_ALIASES = {"trainaug": ("trainaug", "train_aug"), "train_aug": ("train_aug", "trainaug")}


def find_devkit(root: Path | None) -> Path:
    """The folder that holds ``JPEGImages``: ``root``, else ``$CLIPSEED_VOC``, else the working folder.

    Raises:
        InputError: none of them is a devkit or holds one.
    """
    start = root or (Path(os.environ["CLIPSEED_VOC"]) if os.environ.get("CLIPSEED_VOC") else Path())
    for candidate in (start, start / "VOC2012", start / "VOCdevkit" / "VOC2012"):
        if is_folder(candidate / "JPEGImages"):
            return candidate
    raise InputError(
        f"{start.resolve()}: no JPEGImages folder here; go into the devkit (VOCdevkit/VOC2012), "
        "or name it with --root or $CLIPSEED_VOC"
    )


def read_devkit(
    root: Path, split: str | None, vocabulary: Vocabulary, labels: Labels | None
) -> tuple[str, list[Sample]]:
    """Split name and samples of a devkit; labels come from the XML files unless given.

    Raises:
        InputError: unknown split or class, or a malformed file.
    """
    name, ids = _resolve_split(root, split)
    samples = []
    for identifier in ids:
        if labels is not None:
            found = labels.get(identifier)
        else:
            found = _labels_of(root / "Annotations" / f"{identifier}.xml", vocabulary)
        samples.append(Sample(identifier, _image_path(root / "JPEGImages", identifier), found))
    return name, samples


def _image_path(folder: Path, identifier: str) -> Path:
    """VOC images are JPEG; a devkit made by a tool may hold PNG."""
    png = folder / f"{identifier}.png"
    return png if is_file(png) else folder / f"{identifier}.jpg"


def _resolve_split(root: Path, split: str | None) -> tuple[str, list[str]]:
    folder = root / "ImageSets" / "Segmentation"
    lists = {path.stem: path for path in sorted(folder.glob("*.txt"))}
    if split is None:
        if not lists:
            return "all", list(list_images(root / "JPEGImages"))
        if "train" not in lists and len(lists) > 1:
            raise InputError(f"{folder}: choose one of its lists with --split ({', '.join(lists)})")
        split = "train" if "train" in lists else next(iter(lists))
    for name in _ALIASES.get(split, (split,)):
        if name in lists:
            return split, read_split(lists[name])
    path = Path(split)
    if is_file(path):
        return path.stem, read_split(path, folders=("JPEGImages",))
    have = ", ".join(lists) or "none"
    raise InputError(f"--split {split}: neither a list in {folder} (there: {have}) nor a file")


def _labels_of(path: Path, vocabulary: Vocabulary) -> tuple[int, ...] | None:
    try:
        if path.stat().st_size > _MAX_XML_BYTES:
            raise InputError(f"{path}: larger than any annotation file ({_MAX_XML_BYTES} bytes)")
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return vocabulary.indices(object_names(content, str(path)), str(path))


def object_names(content: bytes, where: str) -> list[str]:
    """Every ``annotation/object/name`` of a VOC annotation in document order, nested part names left out.

    Raises:
        InputError: not well-formed XML, or XML with a document type (entities can blow up or read files).
    """
    stack: list[str] = []
    names: list[str] = []
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def refuse(*_: object) -> None:
        raise InputError(f"{where}: annotation files must not contain a document type or entities")

    def start(tag: str, _: dict[str, str]) -> None:
        stack.append(tag)
        if len(stack) == 3 and stack[1:] == ["object", "name"]:
            names.append("")

    def text(data: str) -> None:
        if len(stack) == 3 and stack[1:] == ["object", "name"]:
            names[-1] += data

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = text
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise InputError(f"{where}: line {error.lineno}: not valid XML ({expat.ErrorString(error.code)})") from error
    except (LookupError, ValueError, TypeError) as error:  # what Python's codecs say to an odd encoding
        raise InputError(f"{where}: its encoding cannot be read ({error}); save it as UTF-8") from error
    return [name.strip() for name in names]
