"""FiftyOne's ``ImageSegmentationDirectory``: images, masks of the same name, and what their values mean."""

from __future__ import annotations

import json

from clipseed.formats.png import index_png
from clipseed.formats.writing import Encoded, Item, TextFile, Writer


class FiftyoneWriter(Writer):
    """``data``, ``labels`` and ``mask_targets.json``."""

    placements = ("copy", "link", "reference")

    def image_path(self, identifier: str, suffix: str) -> str:
        """In ``data``."""
        return f"data/{identifier}{suffix}"

    def encode(self, item: Item) -> Encoded:
        """Mask."""
        return Encoded({f"labels/{item.id}.png": index_png(item.labels)})

    def texts(self) -> list[TextFile]:
        """The mask targets, by value."""
        targets = {0: self.table.with_background[0], **self.table.annotated}
        return [TextFile("mask_targets.json", (json.dumps(targets, indent=1) + "\n",))]
