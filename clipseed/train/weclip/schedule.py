"""The learning rate: a linear warm-up, then down to 0."""

from __future__ import annotations

WARM_UP_START = 1e-6


def learning_rate_factor(step: int, steps: int, warm_up: int) -> float:
    """Factor on the learning rate in a step s from 0: ``1 - (1 - s / warm_up) (1 - 1e-6)``, then ``1 - s / steps``.

    The two do not meet: the second is as if there had been no warm-up. Behind the end it stays what it was in the last
    step.
    """
    if step < warm_up:
        return 1 - (1 - step / warm_up) * (1 - WARM_UP_START)
    return 1 - min(step, steps - 1) / steps
