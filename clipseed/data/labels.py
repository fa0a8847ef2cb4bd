"""Image-level labels from the files people have: CSV, one-hot CSV, JSON and plain text."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipseed.data import cvat_images, label_studio
from clipseed.data.listing import clean_id, strip_image_suffix
from clipseed.data.paths import IMAGE_SUFFIXES
from clipseed.data.text_files import read_text
from clipseed.data.vocabulary import Vocabulary
from clipseed.errors import InputError

Labels = dict[str, tuple[int, ...]]
_ID_HEADERS = {
    "id",
    "image",
    "image_id",
    "imageid",
    "file",
    "filename",
    "file_name",
    "name",
    "path",
    "photo",
    "picture",
}
_LABEL_HEADERS = {"label", "labels", "class", "classes", "class_name", "tag", "tags", "category", "categories"}
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars (|)"}
_TRUE = {"1", "1.0", "true", "yes"}
_FALSE = {"0", "0.0", "false", "no", "", "-1"}


def read_labels(path: Path, vocabulary: Vocabulary) -> Labels:
    """Read a label file; the suffix decides: ``.csv``/``.tsv``, ``.json``, ``.xml``, anything else plain text.

    - CSV rows ``id,label[,label…]``; an id may have several rows, a cell several labels separated by ``,``, ``;`` or
      ``|``. Columns are separated by commas, semicolons, tabs or bars; a header may name the column of the labels.
    - One-hot CSV: the header names the classes, the cells are 0 or 1 (VOC's -1 counts as 0).
    - JSON ``{"id": ["cat", 3], …}``, or a list of ``{"id"|"image"|"file_name": …, "labels": […]}``.
    - What annotation tools export: tasks of Label Studio (``.json``; choices, and labels of regions), "CVAT for images"
      (``.xml``; tags, and labels of shapes).
    - Text ``id label label …``, CLIP-ES's format for COCO; names with blanks are written ``traffic_light``.

    Labels are class names or indices. Ids may carry an image suffix. An id without labels is kept, with none.

    Raises:
        InputError: malformed content, unknown label or unusable id, with the line or key.
    """
    return read_label_file(path, vocabulary).labels


@dataclass(frozen=True)
class LabelFile:
    """A label file, and how it was understood.

    Attributes:
        read_as: The format, for messages, such as ``CSV separated by semicolons``.
        notes: What was not plain in it.
    """

    labels: Labels
    read_as: str
    notes: tuple[str, ...] = ()


def read_label_file(path: Path, vocabulary: Vocabulary) -> LabelFile:
    """As :func:`read_labels`, with how the file was understood."""
    content = read_text(path, "a label file")
    if not content.strip():
        raise InputError(f"{path}: the label file is empty")
    suffix = path.suffix.lower()
    if suffix in {".csv", ".tsv"}:
        return _read_csv(content, path, vocabulary, "\t" if suffix == ".tsv" else _separator(content))
    if suffix == ".json":
        return LabelFile(_read_json(content, path, vocabulary), "JSON")
    if suffix == ".xml":
        labels: Labels = {}
        for identifier, names, where in annotated(cvat_images.image_labels(path), vocabulary):
            _add(labels, clean_id(identifier, where), vocabulary.indices(names, where))
        return LabelFile(labels, "XML of CVAT")
    return LabelFile(_read_lines(content, path, vocabulary), "text, an id and its labels separated by blanks")


_LOOKED_AT = 200
_AFTER_ID = re.compile(
    r"""^\s*(?:"[^"]*"|[^"]*?(?:""" + "|".join(map(re.escape, IMAGE_SUFFIXES)) + r"""))\s*([,;\t|])""", re.IGNORECASE
)
"""What follows the name of an image, or a quoted first cell: names may hold commas themselves."""


def _separator(content: str) -> str:
    """What separates the columns: on most of the first lines it follows the image's name first."""
    found: Counter[str] = Counter()
    for line in itertools.islice((line for line in content.splitlines() if line.strip()), _LOOKED_AT):
        after = _AFTER_ID.match(line)
        first = after[1] if after else next((character for character in line if character in _SEPARATORS), None)
        if first:
            found[first] += 1
    return max(_SEPARATORS, key=lambda separator: found[separator])  # of equal ones the first


def _add(labels: Labels, identifier: str, more: Iterable[int]) -> None:
    labels[identifier] = tuple(dict.fromkeys((*labels.get(identifier, ()), *more)))


def _read_csv(content: str, path: Path, vocabulary: Vocabulary, separator: str) -> LabelFile:
    """Read rows; a header is told by its names, or by a first cell that is no image's name where the others are."""
    reader = csv.reader(io.StringIO(content), delimiter=separator, strict=True)
    rows: list[tuple[list[str], str]] = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                rows.append((cells, f"{path}: line {reader.line_num}"))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not valid CSV ({error})") from error
    header = rows.pop(0) if rows and _is_header([cells for cells, _ in rows], vocabulary) else None
    notes = [] if separator == "," else [f"{path}: columns are separated by {_SEPARATORS[separator]}"]
    if header is not None and header[0][0].lower() not in _ID_HEADERS:
        notes.append(f"{path}: its first line is taken for a header ({', '.join(header[0])[:80]})")
    columns = _Columns(None, None) if header is None else _columns(header, [cells for cells, _ in rows], vocabulary)
    labels: Labels = {}
    for cells, where in rows:
        if columns.one_hot is not None:
            found: Iterable[int] = _one_hot_row(cells[1:], columns.one_hot, where)
        else:
            chosen = cells[1:] if columns.labels is None else [cells[k] for k in columns.labels if k < len(cells)]
            found = [index for cell in chosen for index in _labels_of(cell, vocabulary, where)]
        _add(labels, clean_id(cells[0], where), found)
    return LabelFile(labels, f"CSV separated by {_SEPARATORS[separator]}", tuple(notes))


@dataclass(frozen=True)
class _Columns:
    """What a header says: the class of each further column, or which columns hold labels; else all further ones do."""

    one_hot: tuple[int, ...] | None
    labels: tuple[int, ...] | None


def _is_header(rows: Sequence[list[str]], vocabulary: Vocabulary) -> bool:
    first, others = rows[0], rows[1:_LOOKED_AT]
    if first[0].lower() in _ID_HEADERS:
        return True

    def image(cells: list[str]) -> bool:
        return strip_image_suffix(cells[0]) != cells[0]

    if image(first) or not others or not all(map(image, others)):
        return False
    return not all(vocabulary.knows(name) for cell in first[1:] for name in _names_of(cell, vocabulary))


def _columns(header: tuple[list[str], str], rows: Sequence[list[str]], vocabulary: Vocabulary) -> _Columns:
    """How the columns of a header are to be read.

    Raises:
        InputError: they are neither labels nor classes.
    """
    cells, where = header
    titled = tuple(k for k, name in enumerate(cells) if k and name.lower() in _LABEL_HEADERS)
    if titled or len(cells) < 2:
        return _Columns(None, titled or None)
    flags = all(cell.lower() in _TRUE | _FALSE for row in rows for cell in row[1:])
    if len(cells) == 2 and not flags and not vocabulary.knows(cells[1]):
        return _Columns(None, (1,))
    return _Columns(tuple(vocabulary.index(name, where) for name in cells[1:]), None)


def _names_of(cell: str, vocabulary: Vocabulary) -> list[str]:
    """The labels in a cell: one class, or several separated by commas, semicolons or bars, perhaps in brackets."""
    if vocabulary.knows(cell):
        return [cell]
    inner = cell[1:-1] if cell[:1] + cell[-1:] in {"[]", "()", "{}"} else cell
    names = (name.strip().strip("\"'") for name in re.split(r"[,;|]", inner))
    return [name for name in names if name]


def _labels_of(cell: str, vocabulary: Vocabulary, where: str) -> tuple[int, ...]:
    return vocabulary.indices(_names_of(cell, vocabulary), where)


def _one_hot_row(cells: list[str], columns: tuple[int, ...], where: str) -> list[int]:
    if len(cells) != len(columns):
        raise InputError(f"{where}: {len(cells)} values for {len(columns)} classes")
    present = []
    for cell, class_id in zip(cells, columns, strict=True):
        if cell.lower() not in _TRUE | _FALSE:
            raise InputError(f"{where}: {cell[:80]!r} is neither 0 nor 1")
        if cell.lower() in _TRUE:
            present.append(class_id)
    return present


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file.

    Raises:
        InputError: unreadable or not JSON, with the line.
    """
    return _parse_json(read_text(path, what), path)


def _parse_json(content: str, path: Path, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    try:
        return json.loads(content, object_pairs_hook=hook)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: not valid JSON ({error.msg})") from error
    except RecursionError as error:
        raise InputError(f"{path}: JSON nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON (a number of thousands of digits)") from error


def _read_json(content: str, path: Path, vocabulary: Vocabulary) -> Labels:
    def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:  # JSON readers keep the last one silently
                raise InputError(f"{path}: {key[:80]!r} occurs twice; put its labels into one list")
            found[key] = value
        return found

    data = _parse_json(content, path, each_key_once)
    if label_studio.is_tasks(data):
        pairs: list[tuple[str, Any, str]] = annotated(label_studio.image_labels(data, path), vocabulary)
    elif isinstance(data, dict):
        pairs = [(key, value, f"{path}: {key[:80]!r}") for key, value in data.items()]
    elif isinstance(data, list):
        pairs = [_json_record(item, f"{path}: entry {number}") for number, item in enumerate(data)]
    else:
        raise InputError(f"{path}: labels in JSON are a mapping id -> labels, or a list of records")
    labels: Labels = {}
    for identifier, value, where in pairs:
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, str | int) and not isinstance(entry, bool) for entry in values):
            raise InputError(f"{where}: labels must be class names or indices")
        _add(labels, clean_id(identifier, where), vocabulary.indices(values, where))
    return labels


def annotated(found: Iterable[tuple[str, list[str], str]], vocabulary: Vocabulary) -> list[tuple[str, list[str], str]]:
    """Ids, class names and places out of an annotation tool; labels that mean background or ignored are left out."""
    known = {name.lower() for name in vocabulary.class_names}
    meant = {"background", "ignore"} - known
    return [(key, [name for name in names if name.strip().lower() not in meant], where) for key, names, where in found]


def _json_record(item: Any, where: str) -> tuple[str, Any, str]:
    if isinstance(item, dict) and "labels" in item:
        for key in ("id", "image", "file_name"):
            if isinstance(item.get(key), str):
                return item[key], item["labels"], where
    raise InputError(f"{where}: needs 'labels' and one of 'id', 'image', 'file_name'")


def _read_lines(content: str, path: Path, vocabulary: Vocabulary) -> Labels:
    labels: Labels = {}
    for number, line in enumerate(content.splitlines(), 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            where = f"{path}: line {number}"
            _add(labels, clean_id(words[0], where), vocabulary.indices(words[1:], where))
    return labels
