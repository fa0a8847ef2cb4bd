"""PASCAL VOC's layout, for torchvision's ``VOCSegmentation`` and everything else that reads VOC 2012."""

from __future__ import annotations

from clipseed.formats.png import index_png
from clipseed.formats.writing import SPLIT, Encoded, Item, TextFile, Writer

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
        """The list."""
        return [TextFile(f"{_ROOT}/ImageSets/Segmentation/{SPLIT}.txt", ("", "\n"), "\n")]
