"""Patterns worn by the parts of toy objects, and the materials of toy backgrounds.

Patterns return a weight in [0, 1] per pixel (0 dark tone, 1 light tone); materials return linear RGB in [0, 1].
Distances are in pixels, so a pattern keeps its scale whatever the size of the object, as fur or brickwork does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Rng = np.random.Generator


def _wave(x: Array, period: float) -> Array:
    """Square-ish wave of the given period with soft edges, in [0, 1]."""
    wave: Array = np.clip(0.5 + 2.0 * np.sin(x * np.float32(2 * np.pi / period)), 0, 1)
    return wave


def _cell(x: Array, period: float) -> Array:
    """Position within its cell, in [-period/2, period/2)."""
    offset: Array = x - np.floor(x / np.float32(period) + np.float32(0.5)) * np.float32(period)
    return offset


def _stripes(x: Array, y: Array) -> Array:
    return _wave(y, 7.0)


def _bars(x: Array, y: Array) -> Array:
    return _wave(x, 7.0)


def _checks(x: Array, y: Array) -> Array:
    a, b = _wave(x, 12.0), _wave(y, 12.0)
    return np.asarray(a * b + (1 - a) * (1 - b))


def _dots(x: Array, y: Array) -> Array:
    return np.clip(3.2 - np.hypot(_cell(x, 9.0), _cell(y, 9.0)) + 0.5, 0, 1)


def _crosses(x: Array, y: Array) -> Array:
    a, b = np.abs(_cell(x, 11.0)), np.abs(_cell(y, 11.0))
    return np.asarray(np.clip(4.5 - np.maximum(a, b), 0, 1) * np.clip(2.0 - np.minimum(a, b), 0, 1))


def _rings(x: Array, y: Array) -> Array:
    return _wave(np.hypot(x, y), 8.0)


def _zigzag(x: Array, y: Array) -> Array:
    return _wave(y + 0.9 * np.abs(_cell(x, 12.0)), 9.0)


def _scales(x: Array, y: Array) -> Array:
    row = np.floor(y / 6.0)
    shifted = x + 5.0 * np.mod(row, 2)
    return np.asarray(np.clip(np.abs(np.hypot(_cell(shifted, 10.0), y - 6.0 * row - 1.0) - 4.5) - 0.8, 0, 1))


def _grid(x: Array, y: Array) -> Array:
    return np.clip(np.minimum(np.abs(_cell(x, 9.0)), np.abs(_cell(y, 9.0))) - 1.0, 0, 1)


def _rays(x: Array, y: Array) -> Array:
    return np.clip(0.5 + 2.0 * np.sin(9.0 * np.arctan2(y, x)), 0, 1)


PATTERNS: dict[str, Callable[[Array, Array], Array]] = {
    "stripes": _stripes, "bars": _bars, "checks": _checks, "dots": _dots, "crosses": _crosses,
    "rings": _rings, "zigzag": _zigzag, "scales": _scales, "grid": _grid, "rays": _rays,
}  # fmt: skip


def hsv_to_rgb(hue: float, saturation: float, value: float) -> Array:
    """One colour, each component in [0, 1]; hue 0 is red, 1/3 green, 2/3 blue."""
    k = (np.array([5.0, 3.0, 1.0]) + 6.0 * hue) % 6.0
    return (value - value * saturation * np.clip(np.minimum(k, 4.0 - k), 0, 1)).astype(np.float32)


def smooth_noise(rng: Rng, height: int, width: int, cell: float, stretch: float = 1.0) -> Array:
    """Bilinear value noise in [0, 1]; one random value every ``cell`` pixels down, ``cell * stretch`` across."""
    rows, cols = int(height / cell) + 2, int(width / (cell * stretch)) + 2
    knots = rng.random((rows, cols)).astype(np.float32)
    y = np.arange(height, dtype=np.float32) / np.float32(cell)
    x = np.arange(width, dtype=np.float32) / np.float32(cell * stretch)
    y0, x0 = y.astype(np.int64), x.astype(np.int64)
    fy, fx = (y - y0)[:, None], (x - x0)[None, :]
    vertical = knots[y0] * (1 - fy) + knots[y0 + 1] * fy
    return np.asarray(vertical[:, x0] * (1 - fx) + vertical[:, x0 + 1] * fx)


def _mix(weight: Array, low: tuple[float, float, float], high: tuple[float, float, float]) -> Array:
    a, b = np.array(low, np.float32), np.array(high, np.float32)
    return a + weight[..., None] * (b - a)


def _xy(height: int, width: int, rng: Rng) -> tuple[Array, Array]:
    shift = rng.random(2).astype(np.float32) * 64
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return y + shift[0], x + shift[1]


def _grass(rng: Rng, height: int, width: int) -> Array:
    blades = 0.6 * smooth_noise(rng, height, width, 5, 0.35) + 0.4 * smooth_noise(rng, height, width, 24)
    return _mix(blades, (0.16, 0.28, 0.10), (0.46, 0.56, 0.28))


def _sand(rng: Rng, height: int, width: int) -> Array:
    grains = 0.5 * smooth_noise(rng, height, width, 1.5) + 0.5 * smooth_noise(rng, height, width, 30, 2)
    return _mix(grains, (0.62, 0.54, 0.40), (0.88, 0.80, 0.66))


def _water(rng: Rng, height: int, width: int) -> Array:
    y, _ = _xy(height, width, rng)
    ripple = _wave(y + 3.0 * smooth_noise(rng, height, width, 10, 2), 11.0)
    return _mix(0.3 * ripple + 0.7 * smooth_noise(rng, height, width, 16, 3), (0.14, 0.28, 0.40), (0.46, 0.60, 0.68))


def _sky(rng: Rng, height: int, width: int) -> Array:
    clouds = np.clip(1.8 * smooth_noise(rng, height, width, 36, 1.6) - 0.5, 0, 1)
    return _mix(clouds, (0.56, 0.70, 0.86), (0.94, 0.95, 0.97))


def _wall(rng: Rng, height: int, width: int) -> Array:
    y, x = _xy(height, width, rng)
    row = np.floor(y / 12.0)
    joint = (np.abs(_cell(y - 6.0, 12.0)) < 1.2) | (np.abs(_cell(x + 12.0 * np.mod(row, 2), 24.0)) < 1.2)
    brick = _mix(smooth_noise(rng, height, width, 9), (0.44, 0.28, 0.24), (0.60, 0.42, 0.36))
    return np.where(joint[..., None], np.float32(0.68), brick).astype(np.float32)


def _wood(rng: Rng, height: int, width: int) -> Array:
    y, _ = _xy(height, width, rng)
    grain = _wave(y + 10.0 * smooth_noise(rng, height, width, 14, 6), 9.0)
    return _mix(0.35 * grain + 0.65 * smooth_noise(rng, height, width, 3, 16), (0.36, 0.26, 0.17), (0.66, 0.52, 0.38))


def _snow(rng: Rng, height: int, width: int) -> Array:
    drift = 0.8 * smooth_noise(rng, height, width, 40, 1.5) + 0.2 * smooth_noise(rng, height, width, 2)
    return _mix(drift, (0.78, 0.81, 0.86), (0.98, 0.98, 0.99))


def _road(rng: Rng, height: int, width: int) -> Array:
    asphalt = 0.6 * smooth_noise(rng, height, width, 1.2) + 0.4 * smooth_noise(rng, height, width, 28)
    return _mix(asphalt, (0.24, 0.24, 0.26), (0.50, 0.50, 0.50))


MATERIALS: dict[str, Callable[[Rng, int, int], Array]] = {
    "grass": _grass, "sand": _sand, "water": _water, "sky": _sky,
    "wall": _wall, "wood": _wood, "snow": _snow, "road": _road,
}  # fmt: skip
