"""Label Studio's export (JSON): tasks with their annotations, and the image-level labels in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from clipseed.data.listing import clean_id
from clipseed.errors import InputError

REGION_KINDS = ("brushlabels", "polygonlabels", "rectanglelabels")
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")
"""What Label Studio puts before the name of a file that was uploaded."""


@dataclass(frozen=True)
class Task:
    """One image.

    Attributes:
        id: As the image's id in clipseed.
        results: What was annotated; ``None``: nobody has annotated it yet.
        where: What messages call it.
    """

    id: str
    results: list[dict[str, Any]] | None
    where: str


def is_tasks(data: Any) -> bool:
    """Whether plain data look like tasks."""
    return (
        isinstance(data, list)
        and bool(data)
        and all(isinstance(item, dict) and isinstance(item.get("data"), dict) for item in data)
    )


def read_tasks(data: Any, path: Path) -> Iterator[Task]:
    """The tasks of an export. Of several annotations of a task the one that was changed last counts.

    The id is ``data.id``, which ``clipseed export`` writes; else the image's path below the storage, without suffix; of
    an uploaded image its name without what Label Studio put before it.

    Raises:
        InputError: not such an export.
    """
    if not is_tasks(data):
        raise InputError(f"{path}: no tasks of Label Studio ('data' and 'annotations'); export as JSON, not JSON-MIN")
    for number, item in enumerate(data):
        where = f"{path}: task {item.get('id', number)}"
        found = item.get("annotations", [])
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise InputError(f"{where}: 'annotations' is not a list of mappings")
        kept = [entry for entry in found if not entry.get("was_cancelled")]
        results = None
        if kept:
            last = max(enumerate(kept), key=lambda pair: (str(pair[1].get("updated_at") or ""), pair[0]))[1]
            results = last.get("result", [])
            if not isinstance(results, list) or not all(isinstance(entry, dict) for entry in results):
                raise InputError(f"{where}: 'result' is not a list of mappings")
        yield Task(_id_of(item["data"], where), results, where)


def _id_of(data: dict[str, Any], where: str) -> str:
    if isinstance(data.get("id"), str):
        return clean_id(data["id"], where)
    address = data.get("image")
    if not isinstance(address, str):
        raise InputError(f"{where}: its data name neither 'id' nor 'image'")
    parts = urlsplit(address)
    if parts.query.startswith("d="):
        return clean_id(unquote(parts.query[2:]).lstrip("/").removeprefix("images/"), where)
    return clean_id(_UPLOADED.sub("", PurePosixPath(unquote(parts.path)).name), where)


def names_of(value: Any, kind: str, where: str) -> list[str]:
    """The labels in a result's value.

    Raises:
        InputError: they are no texts.
    """
    found = value.get(kind) if isinstance(value, dict) else None
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{where}: '{kind}' is not a list of names")
    return found


def image_labels(data: Any, path: Path) -> list[tuple[str, list[str], str]]:
    """Id, class names and place of every annotated task: its choices, and the labels of its regions.

    Raises:
        InputError: not such an export.
    """
    return [
        (
            task.id,
            [
                name
                for result in task.results
                for kind in ("choices", *REGION_KINDS)
                if result.get("type") == kind
                for name in names_of(result.get("value"), kind, task.where)
            ],
            task.where,
        )
        for task in read_tasks(data, path)
        if task.results is not None
    ]
