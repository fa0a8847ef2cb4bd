"""CVAT's "Segmentation mask 1.1": masks in colors and ``labelmap.txt``, which says what each color is."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from clipseed.data.listing import ids_below
from clipseed.data.paths import is_file, is_folder
from clipseed.data.text_files import read_text
from clipseed.data.types import check_id
from clipseed.data.vocabulary import Vocabulary
from clipseed.errors import ImageError, InputError, UsageError
from clipseed.formats.palette import css_color, voc_palette
from clipseed.formats.png import color_png, read_colors
from clipseed.formats.values import value_of
from clipseed.formats.voc import LABEL_MAP, fits_label_map, label_map
from clipseed.formats.writing import Encoded, Item, TextFile, Writer, compact
from clipseed.types import LabelMask

_MASKS = "SegmentationClass"
_LIST = "ImageSets/Segmentation/default.txt"


class CvatWriter(Writer):
    """``labelmap.txt``, a list, masks in RGB, and ``labels.json`` for the project's constructor of labels.

    Images are uploaded to the task; CVAT turns them as their EXIF says. Every color that occurs is declared: CVAT takes
    an undeclared one for an error.
    """

    placements = ("reference", "copy", "link")
    turned = True

    def encode(self, item: Item) -> Encoded:
        """Mask, and line of the list."""
        return Encoded({f"{_MASKS}/{item.id}.png": color_png(item.labels, voc_palette())}, {_LIST: (item.id,)})

    def texts(self) -> list[TextFile]:
        """Label map, list and labels.

        Raises:
            UsageError: a class's name cannot stand in a label map.
        """
        declared = self.table.annotated
        unfit = [name for name in declared.values() if not fits_label_map(name)]
        if unfit:
            raise UsageError(f"class {unfit[0]!r}: {LABEL_MAP} has no names with ':' or '#' in front; rename it")
        labels = [
            {"name": name, "color": css_color(value), "attributes": []} for value, name in declared.items() if value
        ]
        return [
            TextFile(LABEL_MAP, (label_map(declared),)),
            TextFile(_LIST, ("", "\n"), "\n"),
            TextFile("labels.json", (compact(labels) + "\n",)),
        ]


def is_cvat_folder(folder: Path) -> bool:
    """Whether a folder is an unpacked "Segmentation mask 1.1"."""
    return is_file(folder / LABEL_MAP) and is_folder(folder / _MASKS)


class CvatMasks:
    """Label masks by image id out of an unpacked "Segmentation mask 1.1".

    Args:
        folder: With ``labelmap.txt`` and ``SegmentationClass``.
        vocabulary: Classes that the label map's names are.

    Raises:
        InputError: no such folder, or a malformed label map; names that are no class count only where they occur.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        self.folder, self.name, self._vocabulary = folder, str(folder), vocabulary
        self._names = _read_label_map(folder / LABEL_MAP)

    def ids(self) -> frozenset[str]:
        """Ids of all masks."""
        return ids_below(self.folder / _MASKS, ".png")

    def has(self, identifier: str) -> bool:
        """Whether the mask is there."""
        return is_file(self._path(identifier))

    def _path(self, identifier: str) -> Path:
        return self.folder / _MASKS / f"{check_id(identifier, self.name)}.png"

    def read(self, identifier: str) -> LabelMask:
        """The mask ``(H, W)``.

        Raises:
            InputError: it cannot be read, or has a color that the label map does not name, or a name that is no class.
        """
        path = self._path(identifier)
        try:
            colors = read_colors(path)
        except ImageError as error:
            raise InputError(str(error)) from error
        wide = colors.astype(np.int32)
        found, place = np.unique(wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2], return_inverse=True)
        values = np.array([self._value(int(color), path) for color in found], np.uint8)
        mask: LabelMask = values[place.reshape(colors.shape[:2])]
        return mask

    def _value(self, color: int, path: Path) -> int:
        if color not in self._names:
            told = (color >> 16, color >> 8 & 255, color & 255)
            raise InputError(f"{path}: holds the color {told}, which {self.folder / LABEL_MAP} does not name")
        return value_of(self._names[color], self._vocabulary, f"{self.folder / LABEL_MAP}")

    def content(self, identifier: str) -> bytes:
        """The bytes of the mask's file, and the label map."""
        try:
            return self._path(identifier).read_bytes() + self._map
        except OSError as error:
            raise InputError(f"{self._path(identifier)}: cannot be read ({error.strerror})") from error

    @cached_property
    def _map(self) -> bytes:
        return repr(sorted(self._names.items())).encode()


def _read_label_map(path: Path) -> dict[int, str]:
    """Names by color (R << 16 | G << 8 | B)."""
    names: dict[int, str] = {}
    for number, line in enumerate(read_text(path, "a label map").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        parts = rest.split(":")[0].split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) < 256 for part in parts):
            raise InputError(f"{path}: line {number}: not 'name:red,green,blue::'")
        red, green, blue = (int(part) for part in parts)
        color = red << 16 | green << 8 | blue
        if names.setdefault(color, name.strip()) != name.strip():
            raise InputError(f"{path}: line {number}: {name.strip()!r} has the color of {names[color]!r}")
    return names
