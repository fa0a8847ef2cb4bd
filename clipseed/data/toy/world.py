"""Toy scenes: named objects on named materials, with exact ground truth, each drawn from ``(seed, index)`` alone.

Every object has a plain body in a hue of its own and one part that wears the pattern of its class in the same hue.
A classifier therefore looks at the part, as it looks at faces and wheels in photographs, while the segmentation asks
for the whole body: this gap is what refinement methods exist to close. Classes also prefer a material (boats float on
water), so that a class activation map without competing background words leaks into the surroundings.

A scene is laid out first (sizes, places, occlusion) and painted afterwards, from two independent random streams: the
labels of a scene cost no painting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clipseed.data.toy.shapes import SHAPES, Shape
from clipseed.data.toy.textures import MATERIALS, PATTERNS, hsv_to_rgb, smooth_noise

Rng = np.random.Generator
Floats = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]

MATERIAL_NAMES: tuple[str, ...] = tuple(MATERIALS)
_MIN_VISIBLE = 0.45
"""An object stays in the scene only while this share of its pixels is not hidden by nearer objects."""


@dataclass(frozen=True)
class WorldOptions:
    """What scenes look like. The defaults are the scored world; training moves towards them from easier ones.

    Attributes:
        min_side, max_side: Range of the image's sides in pixels.
        min_objects, max_objects: Range of the number of objects.
        min_radius, max_radius: Range of half an object's height in pixels.
        part_scale: Stretches every part about its centre; at 6 the whole object wears the pattern.
        habitat: Probability that the first object stands on the material its class prefers.
        size: Fixed ``(height, width)`` instead of random sides.
    """

    min_side: int = 160
    max_side: int = 288
    min_objects: int = 1
    max_objects: int = 4
    min_radius: float = 36.0
    max_radius: float = 88.0
    part_scale: float = 1.0
    habitat: float = 0.6
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class ToyObject:
    """One placed object.

    ``across`` and ``down`` are pixel distances from its part's centre along its own axes, inside ``window``;
    ``outline`` and ``part`` are masks there; ``visible`` is what nearer objects leave of it, full size.
    """

    class_id: int
    hue: float
    window: tuple[slice, slice]
    across: Floats
    down: Floats
    outline: Mask
    part: Mask
    visible: Mask

    @property
    def visible_part(self) -> Mask:
        """Full-size mask of the part where it is not hidden."""
        full = np.zeros_like(self.visible)
        full[self.window] = self.part
        return full & self.visible


@dataclass(frozen=True)
class Scene:
    """A laid-out scene: ``size`` is ``(H, W)``, ``objects`` are ordered back to front."""

    seed: int
    index: int
    size: tuple[int, int]
    objects: tuple[ToyObject, ...]
    materials: tuple[str, ...]

    @property
    def labels(self) -> tuple[int, ...]:
        """Classes present, ascending, each once."""
        return tuple(sorted({item.class_id for item in self.objects}))

    def mask(self) -> npt.NDArray[np.uint8]:
        """Ground truth (H, W): 0 background, class index + 1 on objects."""
        mask = np.zeros(self.size, np.uint8)
        for item in self.objects:
            mask[item.visible] = item.class_id + 1
        return mask

    def image(self) -> npt.NDArray[np.uint8]:
        """Paint the scene: (H, W, 3) RGB."""
        return self.paint()[0]

    def paint(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """The image (H, W, 3) RGB, and which of ``materials`` lies, or would lie, at each pixel (H, W).

        The border between two materials comes out of the painter's random stream, hence both at once.
        """
        rng = np.random.default_rng([self.seed, self.index, 1])
        canvas, ground = _background(rng, self.size, self.materials)
        for item in self.objects:
            _paint(rng, canvas[item.window], item)
        return _develop(rng, canvas), ground


def lay_out(seed: int, index: int, options: WorldOptions | None = None) -> Scene:
    """Scene ``index`` of the world ``seed``; the same arguments always give the same scene."""
    options = options or WorldOptions()
    rng = np.random.default_rng([seed, index, 0])
    size = options.size or _canvas(rng, options)
    classes = _pick_classes(rng, options)
    materials = _pick_materials(rng, SHAPES[classes[0]], options)
    depth = np.full(size, -1, np.int32)
    placed: list[tuple[int, float, _Pose]] = []
    for class_id in classes:
        pose = _place(rng, SHAPES[class_id], depth, options)
        if pose is not None:
            depth[pose.window][pose.outline] = len(placed)
            placed.append((class_id, _distinct_hue(rng, [hue for _, hue, _ in placed]), pose))
    objects = tuple(
        ToyObject(class_id, hue, pose.window, pose.across, pose.down, pose.outline, pose.part, depth == order)
        for order, (class_id, hue, pose) in enumerate(placed)
    )
    return Scene(seed, index, size, objects, materials)


def _canvas(rng: Rng, options: WorldOptions) -> tuple[int, int]:
    height, width = options.min_side + (rng.random(2) * (options.max_side - options.min_side + 1)).astype(int)
    return int(height), int(width)


def _shuffled(rng: Rng, count: int) -> list[int]:
    """A permutation made of plain uniform draws, whose stream NumPy keeps stable across versions."""
    return [int(k) for k in np.argsort(rng.random(count), kind="stable")]


def _pick_classes(rng: Rng, options: WorldOptions) -> list[int]:
    count = options.min_objects + int(rng.random() * (options.max_objects - options.min_objects + 1))
    picked = _shuffled(rng, len(SHAPES))[:count]
    if count > 2 and rng.random() < 0.3:
        picked[-1] = picked[0]
    return picked


def _pick_materials(rng: Rng, shape: Shape, options: WorldOptions) -> tuple[str, ...]:
    order = [MATERIAL_NAMES[k] for k in _shuffled(rng, len(MATERIAL_NAMES))]
    first = shape.habitat if rng.random() < options.habitat else order[0]
    if rng.random() < 0.5:
        return (first,)
    return (first, next(name for name in order if name != first))


@dataclass(frozen=True)
class _Pose:
    window: tuple[slice, slice]
    across: Floats
    down: Floats
    outline: Mask
    part: Mask


def _place(rng: Rng, shape: Shape, depth: npt.NDArray[np.int32], options: WorldOptions) -> _Pose | None:
    """Find room for one object; ``None`` when a dozen tries would each hide an earlier one too much."""
    areas = np.bincount(depth[depth >= 0]) if (depth >= 0).any() else np.zeros(0, int)
    for _ in range(12):
        pose = _pose(rng, shape, depth.shape, options)
        if pose.outline.sum() < 500 or pose.part.sum() < 90:
            continue
        covered = depth[pose.window][pose.outline]
        hidden = np.bincount(covered[covered >= 0], minlength=len(areas))
        if (areas - hidden >= _MIN_VISIBLE * areas).all():
            return pose
    return None


def _pose(rng: Rng, shape: Shape, size: tuple[int, ...], options: WorldOptions) -> _Pose:
    height, width = size
    radius = options.min_radius + rng.random() * (options.max_radius - options.min_radius)
    radius = min(radius, 0.45 * min(height, width))
    stretch = 0.85 + 0.3 * rng.random()
    angle = (rng.random() - 0.5) * 0.7
    mirror = 1.0 if rng.random() < 0.5 else -1.0
    cy, cx = height * (0.12 + 0.76 * rng.random()), width * (0.12 + 0.76 * rng.random())
    top, bottom = max(0, int(cy - 1.5 * radius)), min(height, int(cy + 1.5 * radius) + 1)
    left, right = max(0, int(cx - 1.5 * radius)), min(width, int(cx + 1.5 * radius) + 1)
    y = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(cy)
    x = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(cx)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    across, down = (cos * x + sin * y) * np.float32(mirror), cos * y - sin * x
    u, v = across / np.float32(radius * stretch), down / np.float32(radius)
    outline = shape.outline(u, v)
    cu, cv, ru, rv = shape.part
    part = outline & (((u - cu) / ru) ** 2 + ((v - cv) / rv) ** 2 < options.part_scale**2)
    across, down = across - np.float32(cu * radius * stretch), down - np.float32(cv * radius)
    return _Pose((slice(top, bottom), slice(left, right)), across, down, outline, part)


def _distinct_hue(rng: Rng, taken: list[float]) -> float:
    """A hue at least 40 degrees from the other objects' hues where a few tries find one."""
    for _ in range(20):
        hue = float(rng.random())
        if all(abs((hue - other + 0.5) % 1.0 - 0.5) > 40 / 360 for other in taken):
            break
    return hue


def _background(rng: Rng, size: tuple[int, int], materials: tuple[str, ...]) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """One material, or two that meet at a wavy border; and the index of the material at each pixel."""
    height, width = size
    canvas = MATERIALS[materials[0]](rng, height, width)
    if len(materials) == 1:
        return canvas, np.zeros(size, np.uint8)
    other = MATERIALS[materials[1]](rng, height, width)
    upright = rng.random() < 0.3
    along, across = (height, width) if upright else (width, height)
    level = across * (0.3 + 0.4 * rng.random())
    border = level + 0.15 * across * (smooth_noise(rng, 1, along, 48)[0] - 0.5)
    beyond = np.arange(across)[:, None] > border[None, :]
    beyond = beyond.T if upright else beyond
    return np.where(beyond[..., None], other, canvas).astype(np.float32), beyond.astype(np.uint8)


def _paint(rng: Rng, target: Floats, item: ToyObject) -> None:
    """Colour one object in place: plain body, patterned part in a dark and a light tone of the same hue."""
    saturation, value = 0.65 + 0.3 * rng.random(), 0.65 + 0.25 * rng.random()
    body = hsv_to_rgb(item.hue, saturation, value)
    dark = hsv_to_rgb(item.hue, saturation, 0.38 * value)
    pale = hsv_to_rgb(item.hue, 0.45 * saturation, min(1.0, 1.2 * value))
    height, width = item.outline.shape
    slope = (rng.random(2).astype(np.float32) - np.float32(0.5)) * np.float32(0.35)
    rows, columns = np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
    shade = 1 + slope[0] * rows[:, None] + slope[1] * columns[None, :]
    weight = PATTERNS[SHAPES[item.class_id].pattern](item.across, item.down)[..., None]
    colour = np.where(item.part[..., None], dark + weight * (pale - dark), body) * shade[..., None]
    target[item.outline] = colour[item.outline]


def _develop(rng: Rng, canvas: Floats) -> npt.NDArray[np.uint8]:
    """Slight blur and sensor noise, then 8 bits."""
    padded = np.pad(canvas, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    soft = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
    noise = (rng.random(canvas.shape).astype(np.float32) - np.float32(0.5)) * np.float32(0.06)
    return (np.clip(soft + noise, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)
