"""What the tiny SAM is asked about a scene, and the right answers.

SAM gives three masks for a prompt. Here their meanings are fixed: *whole* is the object under the prompt as far as it
is visible, or everything of the material there; *part* is the surface, that is the patterned part or the plain body
(a material has one surface); *sub-part* is the connected piece of that surface.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipseed.data.toy.world import Scene
from clipseed.segments import PART, SUB_PART, WHOLE

Rng = np.random.Generator
_ZOOMED = 0.35
"""Share of views that show only a window of the scene, as the crops of a mask generator do."""


@dataclass(frozen=True)
class View:
    """A scene, or a window of one, as the encoder sees it.

    Attributes:
        pixels: ``(h, w, 3)`` RGB, the longer side at the encoder's size.
        labels: ``(3, h, w)`` uint8: for each level, pixels of equal number belong to one mask.
        objects: Numbers of the objects in the map of wholes; other numbers there are materials.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    objects: tuple[int, ...]

    def answer(self, columns: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """``(3, h, w)`` masks, one a level, of what lies under any of these pixels."""
        return np.stack([np.isin(level, level[rows, columns]) for level in self.labels])


@dataclass(frozen=True)
class Prompts:
    """Prompts of one form for a view, and their masks.

    Attributes:
        points: ``(P, N, 2)`` float32: x, y in pixels of the view; N is 0 with boxes.
        marks: ``(P, N)`` float32: 1 on what is meant, 0 beside it.
        boxes: ``(P, 4)`` float32: left, top, right, bottom; ``None`` with points.
        targets: ``(P, 3, h, w)`` bool: the masks by level.
    """

    points: npt.NDArray[np.float32]
    marks: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32] | None
    targets: npt.NDArray[np.bool_]


def view(scene: Scene, side: int, rng: Rng | None = None) -> View:
    """The scene at the encoder's scale; with ``rng``, sometimes mirrored or a window of it."""
    from segment_anything.utils.transforms import ResizeLongestSide

    image, ground = scene.paint()
    count = len(scene.objects)
    # Surfaces: body and part of each object in turn, then the materials.
    surface = (ground + 2 * count).astype(np.uint8)
    for number, item in enumerate(scene.objects):
        surface[item.visible] = 2 * number
        surface[item.visible_part] = 2 * number + 1
    if rng is not None:
        image, surface = _vary(rng, image, surface)
    fitting = ResizeLongestSide(side)
    pixels = fitting.apply_image(np.ascontiguousarray(image))
    labels = _levels(_nearest(surface, pixels.shape[:2]), count)
    present = np.unique(labels[WHOLE])
    return View(pixels, labels, tuple(int(number) for number in present if number < count))


def _vary(
    rng: Rng, image: npt.NDArray[np.uint8], surface: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    if rng.random() < _ZOOMED:
        window = []
        for length in surface.shape:
            kept = int(length * (0.5 + 0.5 * rng.random()))
            start = int(rng.random() * (length - kept + 1))
            window.append(slice(start, start + kept))
        image, surface = image[tuple(window)], surface[tuple(window)]
    if rng.random() < 0.5:
        image, surface = image[:, ::-1], surface[:, ::-1]
    return image, surface


def _nearest(labels: npt.NDArray[np.uint8], size: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Resize a map of numbers: the pixel under each new pixel's centre."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, labels.shape, strict=True)
    )
    resized: npt.NDArray[np.uint8] = labels[rows[:, None], columns[None, :]]
    return resized


def _levels(surface: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.uint8]:
    """Maps of pieces, surfaces and wholes ``(3, h, w)`` out of that of surfaces."""
    import cv2

    labels = np.zeros((3, *surface.shape), np.uint8)
    labels[PART] = surface
    labels[WHOLE] = np.where(surface < 2 * count, surface // 2, surface - count)
    found = 0
    for number in np.unique(surface):
        pieces, piece = cv2.connectedComponents((surface == number).astype(np.uint8))
        inside = piece > 0
        # Beyond 255 (never seen) the numbers would wrap; the last pieces then share one.
        labels[SUB_PART][inside] = np.minimum(piece[inside] + found, 255)
        found += pieces - 1
    return labels


def single_points(shown: View, rng: Rng, count: int) -> Prompts:
    """One point each: half anywhere, half on a surface drawn first, so that small ones are asked about too."""
    surface = shown.labels[PART]
    numbers = np.unique(surface)
    points = np.empty((count, 1, 2), np.float32)
    targets = []
    for index in range(count):
        anywhere = index % 2 == 0
        number = numbers[int(rng.random() * len(numbers))]
        columns, rows = _pixels(rng, np.ones_like(surface, bool) if anywhere else surface == number, 1)
        points[index, 0] = columns[0], rows[0]
        targets.append(shown.answer(columns, rows))
    return Prompts(points, np.ones((count, 1), np.float32), None, np.stack(targets))


def several_points(shown: View, rng: Rng, count: int) -> Prompts:
    """Two to four points on one thing, sometimes with a point beside it."""
    on, beside = 2 + int(rng.random() * 3), int(rng.random() * 2)
    points = np.empty((count, on + beside, 2), np.float32)
    marks = np.tile(np.array([1] * on + [0] * beside, np.float32), (count, 1))
    targets = []
    for index in range(count):
        thing = shown.labels[WHOLE] == _thing(shown, rng)
        columns, rows = _pixels(rng, thing, on)
        targets.append(shown.answer(columns, rows))
        if beside:
            outside = _pixels(rng, ~thing if not thing.all() else thing, beside)
            marks[index, on:] = 0 if not thing.all() else 1
            columns, rows = np.append(columns, outside[0]), np.append(rows, outside[1])
        points[index] = np.stack([columns, rows], axis=1)
    return Prompts(points, marks, None, np.stack(targets))


def boxes(shown: View, rng: Rng, count: int) -> Prompts:
    """Boxes of things, each side off by some per cent; a box means the whole, on every level."""
    height, width = shown.labels.shape[1:]
    found = np.empty((count, 4), np.float32)
    targets = []
    for index in range(count):
        thing = shown.labels[WHOLE] == _thing(shown, rng)
        rows, columns = np.flatnonzero(thing.any(axis=1)), np.flatnonzero(thing.any(axis=0))
        box = np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)
        extent = np.tile(box[2:] - box[:2], 2)
        box += (rng.random(4).astype(np.float32) - np.float32(0.5)) * np.float32(0.2) * extent
        found[index] = np.clip(box, 0, np.array([width, height, width, height], np.float32) - 1)
        targets.append(np.stack([thing] * 3))
    nothing = np.zeros((count, 0), np.float32)
    return Prompts(nothing[..., None].repeat(2, axis=2), nothing, found, np.stack(targets))


def _thing(shown: View, rng: Rng) -> int:
    """An object where there is one (three times of four), else whatever lies at a random pixel."""
    if shown.objects and rng.random() < 0.75:
        return shown.objects[int(rng.random() * len(shown.objects))]
    columns, rows = _pixels(rng, np.ones(shown.labels.shape[1:], bool), 1)
    return int(shown.labels[WHOLE][rows[0], columns[0]])


def _pixels(rng: Rng, where: npt.NDArray[np.bool_], count: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """``count`` pixels of a mask, drawn independently: columns, rows."""
    candidates = np.flatnonzero(where)
    chosen = candidates[(rng.random(count) * len(candidates)).astype(int)]
    rows, columns = np.divmod(chosen, where.shape[1])
    return columns, rows
