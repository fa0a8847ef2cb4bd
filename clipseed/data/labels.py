"""Image-level labels from the files people have: CSV, one-hot CSV, JSON and plain text."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from clipseed.data import cvat_images, label_studio
from clipseed.data.listing import clean_id
from clipseed.data.text_files import read_text
from clipseed.data.vocabulary import Vocabulary
from clipseed.errors import InputError

Labels = dict[str, tuple[int, ...]]
_ID_HEADERS = {"id", "image", "image_id", "imageid", "file", "filename", "file_name", "name", "path"}
_TRUE = {"1", "1.0", "true", "yes"}
_FALSE = {"0", "0.0", "false", "no", "", "-1"}


def read_labels(path: Path, vocabulary: Vocabulary) -> Labels:
    """Read a label file; the suffix decides: ``.csv``/``.tsv``, ``.json``, ``.xml``, anything else plain text.

    - CSV rows ``id,label[,label…]``; an id may have several rows, a cell several labels separated by ``;`` or ``|``.
    - One-hot CSV: the header names the classes, the cells are 0 or 1 (VOC's -1 counts as 0).
    - JSON ``{"id": ["cat", 3], …}``, or a list of ``{"id"|"image"|"file_name": …, "labels": […]}``.
    - What annotation tools export: tasks of Label Studio (``.json``; choices, and labels of regions), "CVAT for images"
      (``.xml``; tags, and labels of shapes).
    - Text ``id label label …``, CLIP-ES's format for COCO; names with blanks are written ``traffic_light``.

    Labels are class names or indices. Ids may carry an image suffix. An id without labels is kept, with none.

    Raises:
        InputError: malformed content, unknown label or unusable id, with the line or key.
    """
    content = read_text(path, "a label file")
    if not content.strip():
        raise InputError(f"{path}: the label file is empty")
    suffix = path.suffix.lower()
    if suffix in {".csv", ".tsv"}:
        first = content.lstrip().split("\n", 1)[0]
        tabs = suffix == ".tsv" or ("\t" in first and "," not in first)
        return _read_csv(content, path, vocabulary, "\t" if tabs else ",")
    if suffix == ".json":
        return _read_json(content, path, vocabulary)
    if suffix == ".xml":
        labels: Labels = {}
        for identifier, names, where in annotated(cvat_images.image_labels(path), vocabulary):
            _add(labels, clean_id(identifier, where), vocabulary.indices(names, where))
        return labels
    return _read_lines(content, path, vocabulary)


def _add(labels: Labels, identifier: str, more: Iterable[int]) -> None:
    labels[identifier] = tuple(dict.fromkeys((*labels.get(identifier, ()), *more)))


def _read_csv(content: str, path: Path, vocabulary: Vocabulary, delimiter: str) -> Labels:
    reader = csv.reader(io.StringIO(content), delimiter=delimiter, strict=True)
    labels: Labels = {}
    one_hot: tuple[int, ...] | None = None
    first = True
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            where = f"{path}: line {reader.line_num}"
            if first and cells[0].lower() in _ID_HEADERS:
                one_hot = _one_hot_columns(cells[1:], vocabulary, where)
            elif one_hot is not None:
                _add(labels, clean_id(cells[0], where), _one_hot_row(cells[1:], one_hot, where))
            else:
                names = [name for cell in cells[1:] for name in re.split(r"[;|]", cell) if name.strip()]
                _add(labels, clean_id(cells[0], where), vocabulary.indices(names, where))
            first = False
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not valid CSV ({error})") from error
    return labels


def _one_hot_columns(header: list[str], vocabulary: Vocabulary, where: str) -> tuple[int, ...] | None:
    """Class of each column when the header names classes; ``None`` when it only titles ``id,label`` rows."""
    if not header or [name.lower() for name in header] in (["label"], ["labels"], ["class"], ["classes"]):
        return None
    return tuple(vocabulary.index(name, where) for name in header)


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
