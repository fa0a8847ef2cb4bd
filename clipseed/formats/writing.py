"""What the writers of foreign formats have in common: what they are given, what they give, and what they allow.

A writer is pure: it turns one image's labels into the bytes of files and the lines of lists, and knows the texts around
those lists. Whoever calls it writes the files, image after image, so that nothing but a few lines stays in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from clipseed.defaults import IgnoreExport, ImagePlacement
from clipseed.types import IGNORE, LabelMask

IGNORE_NAME = "ignore"
SPLIT = "train"
"""The split that an exported folder calls itself, where its format has such names."""


@dataclass(frozen=True)
class ClassTable:
    """What the values of masks mean in a foreign format.

    Attributes:
        names: Of the classes; the first has the value 1.
        background: What the value 0 is called; ``None``: it is what nobody annotated.
        ignore: Whether 255 occurs, as a class of its own or as what the format ignores.
    """

    names: tuple[str, ...]
    background: str | None
    ignore: bool

    @cached_property
    def annotated(self) -> dict[int, str]:
        """Name by value of all that a region may be, ascending."""
        found = {} if self.background is None else {0: self.background}
        found |= dict(enumerate(self.names, 1))
        return found | ({IGNORE: IGNORE_NAME} if self.ignore else {})

    @property
    def with_background(self) -> tuple[str, ...]:
        """Names by value, from 0 on; 255 is not among them."""
        return (self.background or "background", *self.names)


@dataclass(frozen=True)
class Item:
    """One image to be written.

    Attributes:
        id: Of the image.
        number: Its place in the data set, from 1; the same whenever it is written.
        image: The image file as lists name it: relative to the export, or where it lies.
        labels: Its mask ``(H, W)`` with the values of the :class:`ClassTable`.
        cam: For formats of CAMs: classes ``(K,)`` and maps ``(K, H, W)`` in [0, 1].
    """

    id: str
    number: int
    image: str
    labels: LabelMask
    cam: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.labels.shape[0], self.labels.shape[1]


@dataclass(frozen=True)
class Encoded:
    """What one image becomes: whole files, and by list file one line (or several) for each list in it."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    lines: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class TextFile:
    """A text of the whole data set: ``parts`` stand around its lists, whose lines are joined by ``between``."""

    path: str
    parts: tuple[str, ...]
    between: str = ",\n"


class Writer:
    """A format; subclasses say what they allow and how they write.

    Attributes:
        placements: What may be done with images, the default first.
        turned: The reader compares masks with images turned as their EXIF says.
        ignores: What may become of 255, the default first. ``drop``: no region; it is then what nobody annotated.
        background: What 0 is called unless the user says otherwise; ``None``: it is not annotated.
        smallest: Sides below this are refused by the reader.
        jpeg: Every image must be a JPEG (``always``), or all must have one suffix (``mixed``: JPEG where they do not).
        addresses: Images are named by address, with the whole path of those that stay where they are.
        cams: Holds CAMs, and neither masks nor images.
        lost: What the format cannot say.
    """

    placements: ClassVar[tuple[ImagePlacement, ...]] = ("copy", "link")
    turned: ClassVar[bool] = False
    ignores: ClassVar[tuple[IgnoreExport, ...]] = ("keep", "background")
    background: ClassVar[str | None] = "background"
    smallest: ClassVar[int] = 1
    jpeg: ClassVar[Literal["never", "mixed", "always"]] = "never"
    addresses: ClassVar[bool] = False
    cams: ClassVar[bool] = False
    lost: ClassVar[str] = ""

    def __init__(self, table: ClassTable, image_root: str | None = None, suffix: str = "", url: str = "") -> None:
        """Begin a data set.

        Args:
            table: What values mean.
            image_root: Folder of images that are only named; ``None``: they lie in the export.
            suffix: Of all images, where they have one.
            url: What stands before an image's path, for formats that name images by address.
        """
        self.table, self.image_root, self.suffix, self.url = table, image_root, suffix, url

    def image_path(self, identifier: str, suffix: str) -> str:
        """Where an image goes, relative to the export."""
        return f"images/{identifier}{suffix}"

    def problem(self, identifier: str) -> str | None:
        """Why the reader could not take an image of this id."""
        return None

    def encode(self, item: Item) -> Encoded:
        """What an image becomes."""
        raise NotImplementedError

    def texts(self) -> Sequence[TextFile]:
        """The texts of the whole data set; every list of them is named in :attr:`Encoded.lines`."""
        return ()


def regions(labels: LabelMask, table: ClassTable) -> Iterator[tuple[int, str, npt.NDArray[np.bool_]]]:
    """Value, name and pixels ``(H, W)`` of each class that a mask has, ascending; what nobody annotates is left out."""
    there = np.bincount(labels.ravel(), minlength=256)
    for value, name in table.annotated.items():
        if there[value]:
            yield value, name, labels == value


def compact(data: Any) -> str:
    """JSON in one line."""
    return json.dumps(data, ensure_ascii=True, separators=(",", ":"))
