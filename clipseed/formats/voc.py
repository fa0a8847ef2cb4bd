"""PASCAL VOC's layout, for torchvision's ``VOCSegmentation`` and everything else that reads VOC 2012."""

from __future__ import annotations

from collections.abc import Mapping

from clipseed.formats.palette import voc_palette
from clipseed.formats.png import index_png
from clipseed.formats.writing import SPLIT, Encoded, Item, TextFile, Writer

LABEL_MAP = "labelmap.txt"
_ROOT = "VOCdevkit/VOC2012"


class VocWriter(Writer):
    """``VOCdevkit/VOC2012`` with ``JPEGImages``, ``SegmentationClass`` and the list ``train``.

    Readers put ``.jpg`` behind every id, so all images are JPEG.
    """

    jpeg = "always"

    def image_path(self, identifier: str, suffix: str) -> str:
        """In ``JPEGImages``."""
        return f"{_ROOT}/JPEGImages/{identifier}{suffix}"

    def encode(self, item: Item) -> Encoded:
        """Mask, and line of the list."""
        return Encoded(
            {f"{_ROOT}/SegmentationClass/{item.id}.png": index_png(item.labels)},
            {f"{_ROOT}/ImageSets/Segmentation/{SPLIT}.txt": (item.id,)},
        )

    def texts(self) -> list[TextFile]:
        """The list; and for readers of other classes than VOC's, such as datumaro, what the colors mean."""
        texts = [TextFile(f"{_ROOT}/ImageSets/Segmentation/{SPLIT}.txt", ("", "\n"), "\n")]
        if all(map(fits_label_map, self.table.annotated.values())):
            texts.append(TextFile(f"{_ROOT}/{LABEL_MAP}", (label_map(self.table.annotated),)))
        return texts


def label_map(names: Mapping[int, str]) -> str:
    """``labelmap.txt``: the VOC color of each value's name."""
    lines = (f"{name}:{','.join(map(str, voc_palette()[value].tolist()))}::\n" for value, name in names.items())
    return "# label:color_rgb:parts:actions\n" + "".join(lines)


def fits_label_map(name: str) -> bool:
    """Whether a name can stand in a label map, whose fields end in colons and whose comments begin with "#"."""
    return ":" not in name and not name.startswith("#")
