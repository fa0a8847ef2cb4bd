"""mmsegmentation's folders (mmseg, onedl-mmseg): images, index masks, a list, and the data set's configuration."""

from __future__ import annotations

import pprint

from clipseed.formats.palette import voc_palette
from clipseed.formats.png import index_png
from clipseed.formats.writing import SPLIT, Encoded, Item, TextFile, Writer


class MmsegWriter(Writer):
    """``img_dir``, ``ann_dir``, ``splits`` and ``dataset.py``, which a configuration takes over with ``_base_``.

    The reader puts one suffix behind every id, and reads images with OpenCV, which turns them as their EXIF says.
    """

    placements = ("copy", "link", "reference")
    turned = True
    jpeg = "mixed"

    def image_path(self, identifier: str, suffix: str) -> str:
        """In ``img_dir``."""
        return f"img_dir/{SPLIT}/{identifier}{suffix}"

    def encode(self, item: Item) -> Encoded:
        """Mask, and line of the list."""
        return Encoded({f"ann_dir/{SPLIT}/{item.id}.png": index_png(item.labels)}, {f"splits/{SPLIT}.txt": (item.id,)})

    def texts(self) -> list[TextFile]:
        """The list and the configuration."""
        names = self.table.with_background
        settings = {
            "type": "BaseSegDataset",
            "data_root": ".",
            "data_prefix": {
                "img_path": self.image_root or f"img_dir/{SPLIT}", "seg_map_path": f"ann_dir/{SPLIT}",
            },
            "ann_file": f"splits/{SPLIT}.txt",
            "img_suffix": self.suffix,
            "seg_map_suffix": ".png",
            "metainfo": {"classes": names, "palette": voc_palette()[: len(names)].tolist()},
            "reduce_zero_label": False,
            "ignore_index": 255,
        }  # fmt: skip
        told = pprint.pformat(settings, sort_dicts=False, width=110)
        config = f'"""Data set of mmsegmentation; data_root is this folder."""\n\ntrain_dataset = {told}\n'
        return [TextFile(f"splits/{SPLIT}.txt", ("", "\n"), "\n"), TextFile("dataset.py", (config,))]
