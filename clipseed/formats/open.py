"""Masks that exist already, in the formats that people have, as proposals by image id."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np

from clipseed.data.labels import read_json
from clipseed.defaults import SegmentFormat
from clipseed.digest import file_sha256
from clipseed.errors import InputError, UsageError
from clipseed.formats.coco import CocoInstances
from clipseed.formats.instance_maps import InstanceMaps
from clipseed.formats.panoptic import CocoPanoptic
from clipseed.formats.png import read_values
from clipseed.formats.sa1b import Sa1b
from clipseed.formats.segment_folders import SegmentFolders
from clipseed.segments import Segments

KINDS: tuple[SegmentFormat, ...] = get_args(SegmentFormat)


class SegmentSource(Protocol):
    """Masks by image id."""

    def ids(self) -> frozenset[str]:
        """Ids of the images that have masks, or are said to have none."""
        ...

    def read(self, identifier: str, size: tuple[int, int]) -> Segments:
        """Masks of an image of this height and width; empty ones are left out, their number may be 0.

        Raises:
            ImageError: no masks for this image, or of another size than the image's, or too many for the memory.
            InputError: a malformed file.
            UsageError: a package is missing that the file needs.
        """
        ...


class ForeignSegments:
    """Segments that another program made, by image id.

    Survives pickling: a copy in another process opens the files for itself, when it first reads.

    Args:
        path: Where they are.
        kind: Their format, see :func:`open_segments`.
    """

    def __init__(self, path: Path, kind: SegmentFormat) -> None:
        self.path, self.kind = path, kind
        self._place = path.absolute()
        self._source: SegmentSource | None = _opened(path, kind)
        self._ids: frozenset[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_source": None, "_ids": None}

    @property
    def source(self) -> SegmentSource:
        """Their reader."""
        if self._source is None:
            self._source = _opened(self._place, self.kind)
        return self._source

    def ids(self) -> frozenset[str]:
        """Ids of the images that have masks, or are said to have none."""
        if self._ids is None:
            self._ids = self.source.ids()
        return self._ids

    def __contains__(self, identifier: object) -> bool:
        return identifier in self.ids()

    def read(self, identifier: str, size: tuple[int, int]) -> Segments:
        """Masks of an image, see :meth:`SegmentSource.read`."""
        return self.source.read(identifier, size)

    def manifest(self) -> dict[str, str]:
        """What a manifest says of them: where they are, their format, and what tells whether they are others.

        That is the digest of a file, or of the names and lengths of the files in a folder, which need not be read for
        it.
        """
        place = {"masks": str(self._place.resolve()), "format": self.kind}
        try:
            if self._place.is_file():
                return {**place, "content": file_sha256(self._place)}
            files = sorted((path.relative_to(self._place).as_posix(), path.stat().st_size)
                           for path in self._place.rglob("*") if path.is_file())  # fmt: skip
        except OSError:
            return place
        listing = "\n".join(f"{size} {name}" for name, size in files)
        return {**place, "content": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()}


def open_segments(source: Path, kind: SegmentFormat = "auto") -> ForeignSegments:
    """Open segments of another program.

    Args:
        source: A JSON file (``coco-instances``, ``coco-panoptic``) or a folder (all but ``coco-instances``).
        kind: ``auto`` looks: at a file's keys; in a folder, JSON files are SA-1B's, colour PNGs panoptic maps, and
            PNGs in folders below that have at most two values, masks of one image per folder.

    Raises:
        InputError: nothing there, or nothing that is one of these formats.
        UsageError: an unknown kind, or a file where a folder belongs or the other way round.
    """
    return ForeignSegments(source, kind)


def _opened(source: Path, kind: SegmentFormat) -> SegmentSource:
    if kind not in KINDS:
        raise UsageError(f"mask format {kind!r}: choose one of {', '.join(KINDS)}")
    if not source.exists():
        raise InputError(f"{source}: no such file or folder of masks")
    known = _recognise(source) if kind == "auto" else kind
    if known == "coco-panoptic":
        return CocoPanoptic(source)
    if known == "coco-instances":
        if source.is_dir():
            raise UsageError(f"{source}: {known} is one JSON file, not a folder")
        return CocoInstances(source)
    if not source.is_dir():
        raise UsageError(f"{source}: {known} is a folder, not a file")
    if known == "instance-maps":
        return InstanceMaps(source)
    return SegmentFolders(source) if known == "mask-folders" else Sa1b(source)


def _recognise(source: Path) -> SegmentFormat:
    if source.is_file():
        return _recognise_file(source)
    if (text := _first(source, ".json")) is not None:
        if text.name.startswith(("instances_", "panoptic_", "person_keypoints_", "captions_")):
            raise InputError(f"{source}: holds COCO's annotation files; name one of them")
        return "sa-1b"
    png = _first(source, ".png")
    if png is None:
        raise InputError(f"{source}: no PNG and no JSON files here; mask formats are {', '.join(KINDS[1:])}")
    values = read_values(png)
    if png.parent != source and len(np.unique(values)) <= 2:
        return "mask-folders"
    return "coco-panoptic" if values.ndim == 3 else "instance-maps"


def _first(folder: Path, suffix: str) -> Path | None:
    """The first file with this suffix, those directly in the folder before those in folders below it."""
    found = (path for path in folder.rglob(f"*{suffix}") if not path.name.startswith("."))
    return min(found, key=lambda path: (path.parent != folder, path), default=None)


def _recognise_file(source: Path) -> SegmentFormat:
    data = read_json(source, "a mask file")
    annotations = data.get("annotations") if isinstance(data, dict) else None
    if not isinstance(annotations, list) or "images" not in data:
        raise InputError(f"{source}: no COCO file ('images' and 'annotations'); for SA-1B name the folder of its files")
    panoptic = any(isinstance(item, dict) and "segments_info" in item for item in annotations)
    return "coco-panoptic" if panoptic else "coco-instances"
