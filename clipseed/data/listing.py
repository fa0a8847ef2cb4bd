"""Finding files: image folders, split lists, and the places where a data set may lie."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from clipseed.data.paths import CAMERA_SUFFIXES, IMAGE_SUFFIXES, is_file, is_folder
from clipseed.data.text_files import read_text
from clipseed.data.types import check_id
from clipseed.errors import InputError


def list_images(folder: Path) -> dict[str, Path]:
    """All images below a folder as ``id -> path``, sorted by id. Links are followed, loops are not.

    Raises:
        InputError: no such folder, no image in it, or two files with the same id.
    """
    return list_photos(folder)[0]


def list_photos(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """As :func:`list_images`, with a note about photographs that are in no format that is read."""
    if is_file(folder):
        raise InputError(f"{folder}: is a file; name the folder with the images")
    if not is_folder(folder):
        raise InputError(f"{folder}: no such image folder")
    found: dict[str, Path] = {}
    unread: list[str] = []
    for path in _walk(folder, set()):
        if path.suffix.lower() in CAMERA_SUFFIXES:
            unread.append(path.name)
            continue
        identifier = path.relative_to(folder).with_suffix("").as_posix()
        check_id(identifier, str(folder))
        if identifier in found:
            raise InputError(
                f"{found[identifier]} and {path.name}: two images with the id {identifier!r}; rename one of them"
            )
        found[identifier] = path
    notes: tuple[str, ...] = ()
    if unread:
        some = ", ".join(unread[:3]) + (", …" if len(unread) > 3 else "")
        are, formats = ("file is", "a format") if len(unread) == 1 else ("files are", "formats")
        notes = (f"{len(unread)} {are} in {formats} not read here and passed over ({some}); convert to JPEG or PNG",)
    if not found:
        raise InputError("; ".join([f"{folder}: no images here (looked for {' '.join(IMAGE_SUFFIXES)})", *notes]))
    return dict(sorted(found.items())), notes


def _walk(folder: Path, visited: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield files of photographs depth first; a directory reached twice through links is entered once."""
    try:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror})") from error
    for entry in entries:
        try:
            is_folder = entry.is_dir()
        except OSError:
            continue  # A link that points to itself is neither a folder nor an image.
        if is_folder:
            if not entry.name.startswith("."):
                yield from _walk(Path(entry.path), visited)
        elif entry.name.lower().endswith((*IMAGE_SUFFIXES, *CAMERA_SUFFIXES)) and not entry.name.startswith("."):
            yield Path(entry.path)


def ids_below(folder: Path, suffix: str) -> frozenset[str]:
    """Paths without suffix of all files below a folder that have this suffix, hidden ones left out."""
    found = (path.relative_to(folder) for path in folder.rglob(f"*{suffix}"))
    return frozenset(path.with_suffix("").as_posix() for path in found if not path.name.startswith("."))


def strip_image_suffix(name: str) -> str:
    """``a/b.JPG`` to ``a/b``; names without an image suffix stay as they are."""
    for suffix in IMAGE_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def clean_id(raw: str, where: str) -> str:
    """An id as people write it (``./a.jpg``, ``JPEGImages/x.jpg``) to a sample id, checked."""
    text = strip_image_suffix(raw.strip())
    while text.startswith("./"):
        text = text[2:]
    return check_id(text, where)


def read_split(path: Path, folders: Iterable[str] = ()) -> list[str]:
    """Ids of a split file, in its order.

    Each line holds an id or an image path, optionally followed by further columns (``/JPEGImages/a.jpg /masks/a.png``
    is common); a leading folder named in ``folders`` is dropped.

    Raises:
        InputError: unreadable, empty, an unusable id, or an id listed twice.
    """
    ids: dict[str, int] = {}
    for number, line in enumerate(read_text(path, "a split list").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"{path}: line {number}"
        text = words[0].lstrip("/") if folders else words[0]
        for folder in folders:
            text = text.removeprefix(f"{folder}/")
        identifier = clean_id(text, where)
        if identifier in ids:
            raise InputError(f"{where}: {identifier!r} is already on line {ids[identifier]}")
        ids[identifier] = number
    if not ids:
        raise InputError(f"{path}: the split list is empty")
    return list(ids)
