"""The smallest pieces of a self-contained page: escaped text, numbers, pictures as data URIs."""

from __future__ import annotations

import base64
import html
import io
import math

import numpy as np
from PIL import Image

from clipseed.store.masks import voc_palette
from clipseed.types import LabelMask

THUMBNAIL = 360
"""Longer side of the pictures in a page, in pixels."""


def text(value: object) -> str:
    """Escape anything for HTML text and quoted attributes.

    Characters that do not print (control, surrogates of undecodable ids, direction marks that would turn the text
    around them) become U+FFFD; line breaks stay.
    """
    shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(value))
    return html.escape(shown, quote=True)


def shortened(value: str, length: int) -> str:
    """A name cut to ``length`` characters, with an ellipsis; not escaped yet."""
    return value if len(value) <= length else f"{value[: length - 1]}…"


def percent(fraction: float, digits: int = 2) -> str:
    """``0.4567`` to ``45.67``; no value to a dash."""
    return "–" if math.isnan(fraction) else f"{100 * fraction:.{digits}f}"


def mask_uri(labels: LabelMask) -> str:
    """A mask ``(H, W)`` in VOC colours as a PNG data URI."""
    image = Image.fromarray(labels)
    image.putpalette(voc_palette().tobytes())
    return _uri(image, "PNG", optimize=True)


def photo_uri(picture: Image.Image) -> str:
    """A picture as a JPEG data URI, shrunk to :data:`THUMBNAIL`."""
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return _uri(small, "JPEG", quality=85)


def shrunk(labels: LabelMask) -> LabelMask:
    """A mask no larger than :data:`THUMBNAIL`, by nearest neighbour."""
    height, width = labels.shape
    scale = THUMBNAIL / max(height, width)
    if scale >= 1:
        return labels.copy()
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


def colour(label: int) -> str:
    """VOC colour of a label as CSS."""
    red, green, blue = voc_palette()[label].tolist()
    return f"#{red:02x}{green:02x}{blue:02x}"


def _uri(image: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
