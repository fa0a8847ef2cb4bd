"""Hugging Face: an image folder with ``metadata.jsonl`` for ``datasets``, ``id2label.json`` for ``transformers``."""

from __future__ import annotations

import json

from clipseed.formats.png import index_png
from clipseed.formats.writing import SPLIT, Encoded, Item, TextFile, Writer, compact


class HuggingFaceWriter(Writer):
    """``load_dataset("imagefolder", data_dir=...)`` gives ``image``, ``mask`` and ``id``; it turns images by EXIF."""

    turned = True

    def image_path(self, identifier: str, suffix: str) -> str:
        """In the split's ``images``."""
        return f"{SPLIT}/images/{identifier}{suffix}"

    def encode(self, item: Item) -> Encoded:
        """Mask, and line of the metadata."""
        mask = f"{SPLIT}/masks/{item.id}.png"
        row = {
            "file_name": item.image.removeprefix(f"{SPLIT}/"), "mask_file_name": mask.removeprefix(f"{SPLIT}/"),
            "id": item.id,
        }  # fmt: skip
        return Encoded({mask: index_png(item.labels)}, {f"{SPLIT}/metadata.jsonl": (compact(row),)})

    def texts(self) -> list[TextFile]:
        """Metadata and names."""
        names = json.dumps({str(k): name for k, name in enumerate(self.table.with_background)}, indent=1)
        return [TextFile(f"{SPLIT}/metadata.jsonl", ("", "\n"), "\n"), TextFile("id2label.json", (names + "\n",))]
