"""Ultralytics: semantic segmentation with index masks, and the polygons of its older segmentation models.

Written from its documentation and by its rules; its code (AGPL) is neither used nor imported.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from clipseed.formats.png import index_png
from clipseed.formats.writing import SPLIT, Encoded, Item, TextFile, Writer, regions


class _UltralyticsWriter(Writer):
    """Images in ``images/train``; where masks or polygons are follows from that path.

    Ultralytics repairs images where they lie, so they are copied; it compares masks with the turned image, and refuses
    images of less than 10 pixels.
    """

    placements = ("copy",)
    turned = True
    smallest = 10

    def image_path(self, identifier: str, suffix: str) -> str:
        """In ``images/train``."""
        return f"images/{SPLIT}/{identifier}{suffix}"

    def problem(self, identifier: str) -> str | None:
        """A folder ``images`` inside of an id would be taken for the one that masks are found by."""
        if "images" in PurePosixPath(identifier).parts[:-1]:
            return "a folder called 'images' in its id hides its labels from Ultralytics; rename the folder"
        return None


class UltralyticsWriter(_UltralyticsWriter):
    """``data.yaml`` with ``masks_dir``; 255 is ignored, the background is an ordinary class."""

    def encode(self, item: Item) -> Encoded:
        """Mask."""
        return Encoded({f"masks/{SPLIT}/{item.id}.png": index_png(item.labels)})

    def texts(self) -> list[TextFile]:
        """``data.yaml``."""
        return [_data({"masks_dir": "masks"}, dict(enumerate(self.table.with_background)))]


class YoloPolygonsWriter(_UltralyticsWriter):
    """``labels/train/<id>.txt``: a class and the outline of a region per line, corners as shares of the sides."""

    ignores = ("drop", "background")
    background = None
    lost = "holes are filled, and what is ignored becomes background: polygons can say neither"

    def encode(self, item: Item) -> Encoded:
        """Outlines of the connected regions of each class."""
        lines = [
            " ".join([str(self._classes[value]), *(f"{share:.6f}" for share in outline.ravel())])
            for value, _, pixels in regions(item.labels, self.table)
            for outline in outlines(pixels)
        ]
        return Encoded({f"labels/{SPLIT}/{item.id}.txt": "".join(f"{line}\n" for line in lines).encode()})

    @property
    def _classes(self) -> dict[int, int]:
        """Class number by value: classes from 0, the background, where it is one, behind them."""
        return {**{value: value - 1 for value in range(1, len(self.table.names) + 1)}, 0: len(self.table.names)}

    def texts(self) -> list[TextFile]:
        """``data.yaml``."""
        named = {self._classes[value]: name for value, name in self.table.annotated.items()}
        return [_data({}, dict(sorted(named.items())))]


def outlines(pixels: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.float64]]:
    """Outlines of the connected regions of a mask ``(H, W)``, largest first: ``(N, 2)`` x and y in (0, 1), N >= 3.

    A corner is the center of a pixel, so that scaling up and cutting off the fraction gives that pixel again.
    """
    found, _ = cv2.findContours(pixels.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    scale = np.array([pixels.shape[1], pixels.shape[0]], np.float64)
    corners = [contour[:, 0].astype(np.float64) for contour in sorted(found, key=cv2.contourArea, reverse=True)]
    # One or two pixels have fewer corners than a polygon needs.
    whole = [np.concatenate([line, *[line[-1:]] * max(0, 3 - len(line))]) for line in corners]
    return [(line + 0.5) / scale for line in whole]


def _data(more: dict[str, Any], names: dict[int, str]) -> TextFile:
    import yaml

    data = {"train": f"images/{SPLIT}", "val": f"images/{SPLIT}", **more, "names": names}
    hint = "# 'val' names the same images: give it a folder of your own.\n"
    return TextFile("data.yaml", (hint + yaml.safe_dump(data, sort_keys=False, allow_unicode=True),))
