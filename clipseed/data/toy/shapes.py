"""The ten object classes of the toy world: one outline and one telling part each.

Coordinates are those of the object's own frame: ``u`` to the right, ``v`` downwards, the outline inside
``[-1, 1] x [-1, 1]``. An outline is a boolean function of ``(u, v)``; a part is an ellipse-like region given by its
centre and half-axes, inside which the object wears its class's pattern. Everything is closed-form NumPy, so that the
same seed draws the same pixels everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Shape:
    """An object class: its name, outline, part (centre and half-axes), pattern and usual surroundings."""

    name: str
    outline: Callable[[Array, Array], Mask]
    part: tuple[float, float, float, float]
    pattern: str
    habitat: str


def _ellipse(u: Array, v: Array, cu: float, cv: float, ru: float, rv: float) -> Mask:
    return ((u - cu) / ru) ** 2 + ((v - cv) / rv) ** 2 < 1


def _box(u: Array, v: Array, left: float, top: float, right: float, bottom: float) -> Mask:
    return (u > left) & (u < right) & (v > top) & (v < bottom)


def _boat(u: Array, v: Array) -> Mask:
    hull = (v > 0.2) & (v < 0.8) & (np.abs(u) < 1.0 - 0.55 * (v - 0.2))
    sail = (v > -0.95) & (v <= 0.2) & (u > -0.1 - 0.5 * (v + 0.95)) & (u < 0.05 + 0.55 * (v + 0.95))
    return np.asarray(hull | sail)


def _bottle(u: Array, v: Array) -> Mask:
    body = _box(u, v, -0.45, -0.2, 0.45, 1.0)
    shoulder = _ellipse(u, v, 0, -0.2, 0.45, 0.3)
    neck = _box(u, v, -0.2, -1.0, 0.2, -0.2)
    return body | shoulder | neck


def _cactus(u: Array, v: Array) -> Mask:
    trunk = _box(u, v, -0.3, -0.75, 0.3, 1.0) | _ellipse(u, v, 0, -0.7, 0.3, 0.3)
    left = _box(u, v, -0.95, -0.05, -0.2, 0.3) | _box(u, v, -0.95, -0.5, -0.6, 0.3)
    right = _box(u, v, 0.2, 0.1, 0.95, 0.45) | _box(u, v, 0.6, -0.35, 0.95, 0.45)
    return trunk | left | right


def _car(u: Array, v: Array) -> Mask:
    body = _box(u, v, -1.0, -0.1, 1.0, 0.45)
    cabin = (v > -0.6) & (v <= -0.1) & (np.abs(u + 0.05) < 0.75 + 0.35 * v)
    wheels = _ellipse(u, v, -0.55, 0.45, 0.25, 0.25) | _ellipse(u, v, 0.55, 0.45, 0.25, 0.25)
    return np.asarray(body | cabin | wheels)


def _cup(u: Array, v: Array) -> Mask:
    bowl = (np.abs(v) < 0.8) & (np.abs(u + 0.15) < 0.72 - 0.14 * v)
    ring = _ellipse(u, v, 0.6, -0.05, 0.4, 0.5) & ~_ellipse(u, v, 0.6, -0.05, 0.2, 0.28)
    return np.asarray(bowl | ring)


def _fish(u: Array, v: Array) -> Mask:
    body = _ellipse(u, v, -0.2, 0, 0.78, 0.55)
    tail = (u > 0.35) & (u < 1.0) & (np.abs(v) < 0.1 + 0.85 * (u - 0.35))
    return body | tail


def _house(u: Array, v: Array) -> Mask:
    walls = _box(u, v, -0.75, -0.1, 0.75, 0.9)
    roof = (v > -0.95) & (v <= -0.1) & (np.abs(u) < 1.1 * (v + 0.95))
    return walls | roof


def _kite(u: Array, v: Array) -> Mask:
    upper = (v <= -0.25) & (np.abs(u) < 0.75 * (v + 1.0) / 0.75)
    lower = (v > -0.25) & (np.abs(u) < 0.75 * (1.0 - v) / 1.25)
    return upper | lower


def _mushroom(u: Array, v: Array) -> Mask:
    cap = _ellipse(u, v, 0, 0.05, 0.95, 0.9) & (v < 0.1)
    stem = (v >= 0.1) & (v < 0.95) & (np.abs(u) < 0.3 + 0.12 * (v - 0.1))
    return cap | stem


def _star(u: Array, v: Array) -> Mask:
    radius = np.hypot(u, v)
    # Distance to the nearest of the five tips, folded into one tenth of the turn.
    turn = np.arctan2(u, -v) / (2 * np.pi / 5)
    fold = np.abs(turn - np.rint(turn)) * (2 * np.pi / 5)
    inner, tip = 0.48, 1.0
    # The edge runs from the tip (angle 0, radius `tip`) to the notch (angle pi/5, radius `inner`).
    du, dv = inner * np.sin(np.pi / 5), inner * np.cos(np.pi / 5) - tip
    x, y = radius * np.sin(fold), radius * np.cos(fold) - tip
    return np.asarray(du * y - dv * x < 0)


SHAPES: tuple[Shape, ...] = (
    Shape("boat", _boat, (0.0, 0.5, 0.42, 0.34), "stripes", "water"),
    Shape("bottle", _bottle, (0.0, 0.35, 0.45, 0.34), "checks", "wood"),
    Shape("cactus", _cactus, (0.0, -0.6, 0.36, 0.42), "crosses", "sand"),
    Shape("car", _car, (0.55, 0.15, 0.46, 0.36), "rings", "road"),
    Shape("cup", _cup, (-0.15, 0.3, 0.5, 0.36), "zigzag", "wood"),
    Shape("fish", _fish, (-0.6, 0.0, 0.4, 0.5), "scales", "water"),
    Shape("house", _house, (0.25, 0.45, 0.42, 0.4), "grid", "grass"),
    Shape("kite", _kite, (0.0, -0.35, 0.4, 0.38), "rays", "sky"),
    Shape("mushroom", _mushroom, (-0.3, -0.4, 0.46, 0.4), "dots", "grass"),
    Shape("star", _star, (0.0, 0.1, 0.36, 0.36), "bars", "sky"),
)

CLASS_NAMES: tuple[str, ...] = tuple(shape.name for shape in SHAPES)
