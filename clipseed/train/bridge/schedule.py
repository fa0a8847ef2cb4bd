"""The learning rate: a linear warm-up times a polynomial that ends at a least rate (DenseCLIP's settings)."""

from __future__ import annotations

POWER = 0.9
WARM_UP_START = 1e-6


def poly_factor(step: int, steps: int, warm_up: int, least: float) -> float:
    """Factor on the learning rate in a step s from 0.

    ``(1 - least) (1 - s / steps)^0.9 + least``, times ``1 - (1 - s / warm_up) (1 - 1e-6)`` while s < warm_up.

    Args:
        step: From 0.
        steps: Of the run.
        warm_up: Steps.
        least: Where it ends, as a share of the full rate.
    """
    factor: float = (1 - least) * (1 - min(step, steps) / steps) ** POWER + least
    if step < warm_up:
        factor *= 1 - (1 - step / warm_up) * (1 - WARM_UP_START)
    return factor
