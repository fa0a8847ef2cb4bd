"""Small images inside a page: photos, masks and overlays as data URIs, and the colours of labels."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from clipseed.formats.palette import css_color
from clipseed.formats.png import index_image
from clipseed.report.overlay import Pixels
from clipseed.types import LabelMask

THUMBNAIL = 360
"""Longer side of the images in a page, in pixels."""


def shrunk(labels: LabelMask) -> LabelMask:
    """A mask no larger than :data:`THUMBNAIL`, by nearest neighbour."""
    height, width = labels.shape
    scale = THUMBNAIL / max(height, width)
    if scale >= 1:
        return labels.copy()
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


def photo_pixels(photo: Image.Image, like: LabelMask) -> Pixels:
    """A photo as ``(H, W, 3)``, of the size of a (shrunk) mask ``(H, W)``."""
    height, width = like.shape
    return np.asarray(photo.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))


def greyed(pixels: Pixels) -> Pixels:
    """Pixels ``(H, W, 3)`` without their colours."""
    return np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"))


def photo_uri(pixels: Pixels) -> str:
    """Pixels ``(H, W, 3)`` as a JPEG data URI."""
    return _uri(Image.fromarray(pixels), "JPEG", quality=85)


def mask_uri(labels: LabelMask) -> str:
    """A mask ``(H, W)`` in VOC colours as a PNG data URI."""
    return _uri(index_image(labels), "PNG", optimize=True)


def colour(label: int) -> str:
    """VOC colour of a label as CSS."""
    return css_color(label)


def _uri(image: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
