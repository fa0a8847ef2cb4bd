"""LightlyTrain's semantic segmentation: folders of images and masks, and the mapping that its training takes."""

from __future__ import annotations

from clipseed.formats.png import index_png
from clipseed.formats.writing import SPLIT, Encoded, Item, TextFile, Writer
from clipseed.types import IGNORE


class LightlyWriter(Writer):
    """``train/images``, ``train/masks`` and ``data.yaml``; every value is a class, and 255 one that is ignored."""

    placements = ("copy", "link", "reference")

    def image_path(self, identifier: str, suffix: str) -> str:
        """In the split's ``images``."""
        return f"{SPLIT}/images/{identifier}{suffix}"

    def encode(self, item: Item) -> Encoded:
        """Mask."""
        return Encoded({f"{SPLIT}/masks/{item.id}.png": index_png(item.labels)})

    def texts(self) -> list[TextFile]:
        """What ``train_semantic_segmentation`` takes as ``data``."""
        import yaml

        part = {"images": self.image_root or f"{SPLIT}/images", "masks": f"{SPLIT}/masks"}
        data = {
            "train": part, "val": dict(part), "classes": self.table.annotated,
            "ignore_classes": [IGNORE] if self.table.ignore else [],
        }  # fmt: skip
        hint = "# Paths start from this folder. 'val' names the same images: give it folders of your own.\n"
        return [TextFile("data.yaml", (hint + yaml.safe_dump(data, sort_keys=False, allow_unicode=True),))]
