"""Overlays of class activation maps on their images."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from clipseed.pseudo.pixels import label_values, strongest

Pixels = npt.NDArray[np.uint8]
SHEET_HEIGHT = 200
"""Of the images in a contact sheet, in pixels."""
_CAPTION = 18
_GAP = 6


def heat_overlay(image: Pixels, heat: npt.NDArray[np.float32], strength: float = 0.55) -> Pixels:
    """Blend a map ``(H, W)`` in [0, 1], coloured from blue to red, over an image ``(H, W, 3)``."""
    import cv2

    coloured = cv2.applyColorMap((heat.clip(0, 1) * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    return (image * (1 - strength) + coloured * strength + 0.5).astype(np.uint8)


def label_overlay(image: Pixels, labels: Pixels, strength: float = 0.6) -> Pixels:
    """Blend a mask ``(H, W)`` in VOC colours over an image; the background stays as it is."""
    from clipseed.formats.palette import voc_palette

    blended = image * (1 - strength) + voc_palette()[labels] * strength + 0.5
    return np.where((labels > 0)[..., None], blended, image).astype(np.uint8)


def outlined(image: Pixels, labels: Pixels) -> Pixels:
    """Draw a white line around what a mask ``(H, W)`` shows in an image ``(H, W, 3)``, on the inside of each area."""
    padded = np.pad(labels, 1, mode="edge")
    around = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    edge = (labels > 0) & np.any([labels != beside for beside in around], axis=0)
    return np.where(edge[..., None], np.uint8(255), image)


def maps_overlay(
    image: Pixels, maps: npt.NDArray[np.float32], classes: npt.NDArray[np.int32], strength: float = 0.85
) -> Pixels:
    """Blend maps ``(K, H, W)`` in [0, 1] over an image, each in its class's colour, the stronger the more.

    ``classes`` ``(K,)`` are class indices; colours are those of :func:`label_overlay`.
    """
    from clipseed.formats.palette import voc_palette

    if not len(maps):
        return image
    row, score = strongest(maps)
    colour = voc_palette()[label_values(classes)[1:][row]]
    weight = strength * score.clip(0, 1)[..., None]
    blended: Pixels = (image * (1 - weight) + colour * weight + 0.5).astype(np.uint8)
    return blended


def map_caption(name: str, heat: npt.NDArray[np.float32]) -> str:
    """What stands above a map: its class, and that it is empty where no value is positive."""
    return name if (heat > 0).any() else f"{name} (empty)"


def fitted(image: Pixels, height: int = SHEET_HEIGHT) -> Pixels:
    """An image ``(H, W, 3)`` no higher than a sheet shows it: overlays of large photos are drawn at that size only."""
    return image if len(image) <= height else np.asarray(_to_height(image, height))


def contact_sheet(rows: Sequence[Sequence[tuple[str, Pixels]]], height: int = SHEET_HEIGHT) -> Image.Image:
    """Lay captioned images out in rows, all scaled to one height."""
    font, drawable = _font()
    scaled = [[(caption, _to_height(pixels, height)) for caption, pixels in row] for row in rows]
    width = max(sum(tile.width + _GAP for _, tile in row) for row in scaled) + _GAP
    sheet = Image.new("RGB", (width, len(scaled) * (height + _CAPTION + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(scaled):
        top, left = _GAP + number * (height + _CAPTION + _GAP), _GAP
        for caption, tile in row:
            draw.text((left, top), _shortened(drawable(caption), tile.width, font), fill="black", font=font)
            sheet.paste(tile, (left, top + _CAPTION))
            left += tile.width + _GAP
    return sheet


_SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "arial.ttf", "Arial Unicode.ttf")


def _font() -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, Callable[[str], str]]:
    """A font for captions, and what makes a text drawable with it: Pillow's own knows ASCII alone."""
    for name in _SYSTEM_FONTS:
        try:
            return ImageFont.truetype(name, 13), lambda text: text
        except OSError:
            continue
    return ImageFont.load_default(13), _plain


def _plain(text: str) -> str:
    """``föté`` to ``fote``; letters that have no plain form to ``?``."""
    bare = unicodedata.normalize("NFKD", text)
    return "".join(c if c.isascii() else "?" for c in bare if not unicodedata.combining(c))


def _to_height(pixels: Pixels, height: int) -> Image.Image:
    image = Image.fromarray(pixels)
    width = min(max(1, round(image.width * height / image.height)), 4 * height)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten a caption to the width of its tile."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
