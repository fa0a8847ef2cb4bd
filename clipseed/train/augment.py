"""Augmentation for segmentation: random scale, crop and mirror of an image and of all that lies on its pixels.

Made of the functions of ``torchvision.transforms.v2``, not of its classes: those draw from torch's global generator,
and what is drawn here must depend on one seed alone, in whatever process, thread or order samples are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import Image, Mask, TVTensor

from clipseed.types import IGNORE


class Scores(TVTensor):  # type: ignore[misc]
    """Scores ``(K, H, W)`` in [0, 1] that lie on an image: resized smoothly, 0 where there is no image."""


@dataclass(frozen=True)
class Jitter:
    """Random colours of an image, each change with probability 1/2 and drawn evenly from its range (FMA-WSSS's).

    Attributes:
        brightness: Greatest number that is added to all channels, of 255.
        contrast: Range of the factor on them.
        saturation: Range of the factor on the distance from grey.
        hue: Greatest turn of the hue in half degrees, as 8-bit hues are counted.
    """

    brightness: float = 25
    contrast: tuple[float, float] = (0.6, 1.4)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 25

    def __call__(self, pixels: Tensor, dice: torch.Generator) -> Tensor:
        """Change ``(3, H, W)`` uint8."""
        drawn = torch.rand(8, generator=dice).tolist()
        values = [low + (high - low) * share for (low, high), share in zip(self._ranges(), drawn[1::2], strict=True)]
        brightness, contrast, saturation, hue = (
            value if chance < 0.5 else None for value, chance in zip(values, drawn[::2], strict=True)
        )
        if brightness is not None or contrast is not None:
            found = (pixels.float() + (brightness or 0)).clamp(0, 255)
            pixels = (found * (1 if contrast is None else contrast)).round().clamp(0, 255).byte()
        if saturation is not None:
            pixels = functional.adjust_saturation_image(pixels, saturation)
        if hue is not None:
            pixels = functional.adjust_hue_image(pixels, hue / 180)
        return pixels

    def _ranges(self) -> tuple[tuple[float, float], ...]:
        return (-self.brightness, self.brightness), self.contrast, self.saturation, (-self.hue, self.hue)


@dataclass(frozen=True)
class Augmentation:
    """Scale, crop and mirror; colours, too, where it is asked for.

    Attributes:
        crop: Side of what is cut out, in pixels. A smaller image lies somewhere in it, at random.
        scales: Range of the factor on both sides of the image.
        mirror: Probability of being mirrored.
        fill: RGB around a smaller image. Masks are ``IGNORE`` there, scores 0.
        sides: Range of the image's longer side in pixels in place of ``scales``; where the shorter one would be smaller
            than the crop, it is as long as that (FMA-WSSS).
        jitter: Of the image's colours.
    """

    crop: int
    scales: tuple[float, float] = (0.5, 2.0)
    mirror: float = 0.5
    fill: tuple[int, int, int] = (0, 0, 0)
    sides: tuple[int, int] | None = None
    jitter: Jitter | None = None

    def __call__(self, seed: int, *parts: TVTensor) -> tuple[Tensor, ...]:
        """Treat everything that lies on one image alike.

        Args:
            seed: Decides everything that is random, below 2^63.
            parts: Any of ``Image`` ``(3, H, W)`` uint8, ``Mask`` ``(H, W)`` uint8 and ``Scores``.

        Returns:
            Plain tensors in the same order, types and channels, ``crop`` a side.
        """
        dice = torch.Generator().manual_seed(seed)
        height, width = self._scaled((parts[0].shape[-2], parts[0].shape[-1]), dice)
        top, above = self._place(height, dice)
        left, before = self._place(width, dice)
        mirrored = float(torch.rand((), generator=dice)) < self.mirror
        padding = [before, above, max(0, self.crop - width - before), max(0, self.crop - height - above)]
        treated = []
        for part in parts:
            plain = part.as_subclass(Tensor)
            pixels = plain[None] if isinstance(part, Mask) else plain
            pixels = _resize(pixels, [height, width], smooth=not isinstance(part, Mask))
            pixels = functional.crop_image(pixels, top, left, min(self.crop, height), min(self.crop, width))
            if self.jitter is not None and isinstance(part, Image):
                pixels = self.jitter(pixels, dice)
            pixels = functional.pad_image(pixels, padding, fill=self._around(part))
            pixels = functional.horizontal_flip_image(pixels) if mirrored else pixels
            treated.append((pixels[0] if isinstance(part, Mask) else pixels).contiguous())
        return tuple(treated)

    def _scaled(self, size: tuple[int, int], dice: torch.Generator) -> tuple[int, int]:
        """Height and width of the whole image before it is cropped."""
        low, high = self.sides or self.scales
        drawn = low + (high - low) * float(torch.rand((), generator=dice))
        if self.sides is None:
            return max(1, int(size[0] * drawn)), max(1, int(size[1] * drawn))
        factor = max(drawn / max(size), self.crop / min(size))
        return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))

    def _place(self, side: int, dice: torch.Generator) -> tuple[int, int]:
        """Where the crop begins in the image, and how far inside the crop the image begins; one of them is 0."""
        drawn = int(torch.randint(abs(side - self.crop) + 1, (), generator=dice))
        return (drawn, 0) if side >= self.crop else (0, drawn)

    def _around(self, part: TVTensor) -> list[float]:
        if isinstance(part, Image):
            return [float(value) for value in self.fill]
        return [float(IGNORE)] if isinstance(part, Mask) else [0.0]


def _resize(pixels: Tensor, size: list[int], smooth: bool) -> Tensor:
    """Resize ``(C, H, W)``.

    v2 resizes masks with torch's ``nearest``, which takes the pixel at a corner of each new one, up to half a pixel
    beside the image. ``nearest-exact`` takes the one under its centre, as Pillow does.
    """
    # Channels last, as images come from Pillow: of the other order, torch 2.14 fails to make a single pixel.
    pixels = pixels[None].contiguous(memory_format=torch.channels_last)[0]
    mode = InterpolationMode.BILINEAR if smooth else InterpolationMode.NEAREST_EXACT
    resized: Tensor = functional.resize_image(pixels, size, interpolation=mode, antialias=smooth)
    return resized
