"""What Python users get: label masks and CAMs that can be shown and saved."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipseed.report.overlay import label_overlay, maps_overlay, outlined
from clipseed.store.cam_records import Cam
from clipseed.store.files import replacing
from clipseed.store.label_masks import LabelMaskNote, write_label_mask
from clipseed.types import IGNORE, LabelMask

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImageCam(Cam):
    """Class activation maps of an image: a :class:`clipseed.Cam` that knows its image and the names of its classes.

    Attributes:
        names: ``(K,)`` what the maps are of.
        image: ``(H, W, 3)`` uint8.
    """

    names: tuple[str, ...] = ()
    image: Pixels = field(default_factory=lambda: np.zeros((0, 0, 3), np.uint8), repr=False)

    def overlay(self) -> Image.Image:
        """The maps over the image, each in its class's colour."""
        return Image.fromarray(maps_overlay(self.image, self.upsampled(), self.classes))

    def save(self, path: str | Path) -> None:
        """Write the overlay as a PNG.

        Raises:
            StoreError: it cannot be written.
        """
        with replacing(Path(path)) as temporary:
            self.overlay().save(temporary, format="PNG")

    def _repr_png_(self) -> bytes:
        return _png(self.overlay())


@dataclass(frozen=True)
class PseudoLabel:
    """The label mask of an image.

    Attributes:
        mask: ``(H, W)`` uint8: 0 background, position in ``classes`` + 1, 255 where nothing is sure.
        classes: Names of all classes; ``labels``: of those that the image was said to show.
        confidence: ``(H, W)`` float32 in [0, 1], how probable each label is; ``None`` where the recipe has none.
        image: ``(H, W, 3)`` uint8.
        cam: The maps that it was made from.
    """

    mask: LabelMask = field(repr=False)
    classes: tuple[str, ...]
    labels: tuple[str, ...]
    confidence: npt.NDArray[np.float32] | None = field(repr=False)
    image: Pixels = field(repr=False)
    cam: ImageCam = field(repr=False)

    @property
    def coverage(self) -> float:
        """Share of pixels that are labelled, not 255."""
        return float((self.mask != IGNORE).mean())

    def overlay(self) -> Image.Image:
        """The labels over the image, in VOC's colours, outlined."""
        return Image.fromarray(outlined(label_overlay(self.image, self.mask), self.mask))

    def save(self, path: str | Path) -> None:
        """Write the label mask as a palette PNG, as ``clipseed label`` does.

        Raises:
            StoreError: it cannot be written.
        """
        write_label_mask(Path(path), self.mask, LabelMaskNote(tuple(self.cam.classes.tolist())))

    def _repr_png_(self) -> bytes:
        return _png(self.overlay())


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
