"""CVAT's export "CVAT for images 1.1" (XML): the image-level labels in it."""

from __future__ import annotations

from pathlib import Path
from xml.parsers import expat

from clipseed.data.text_files import read_text
from clipseed.errors import InputError


def image_labels(path: Path) -> list[tuple[str, list[str], str]]:
    """Name, class names and place of every image: its tags, and the labels of its shapes.

    Raises:
        InputError: not well-formed, no such export, or with a document type (entities can blow up or read files).
    """
    found: list[tuple[str, list[str], str]] = []
    depth: list[str] = []
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise InputError(f"{path}: annotation files must not contain a document type or entities")

    def start(tag: str, attributes: dict[str, str]) -> None:
        depth.append(tag)
        if depth == ["annotations", "image"]:
            name = attributes.get("name", "")
            found.append((name, [], f"{path}: line {parser.CurrentLineNumber}: image {name[:80]!r}"))
        elif depth[:2] == ["annotations", "image"] and len(depth) == 3 and "label" in attributes:
            found[-1][1].append(attributes["label"])

    def end(_: str) -> None:
        depth.pop()

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    try:
        parser.Parse(read_text(path, "an annotation file"), True)
    except expat.ExpatError as error:
        raise InputError(f"{path}: line {error.lineno}: not valid XML ({expat.ErrorString(error.code)})") from error
    if not found:
        raise InputError(f"{path}: no images of CVAT in it; export as 'CVAT for images 1.1'")
    return found
