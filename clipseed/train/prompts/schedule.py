"""The learning rate of prompts: constant and small at first, then half a cosine down to 0."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, steps: int, warm_up: int, warm_factor: float) -> float:
    """Factor on the learning rate in a step from 0: ``warm_factor``, then ``(1 + cos(pi (s - W) / (T - W))) / 2``.

    Args:
        step: Counted from 0; behind the end the factor stays what it was in the last step.
        steps: Of the whole schedule, T.
        warm_up: Steps at the small rate, W.
        warm_factor: In them.
    """
    if step < warm_up:
        return warm_factor
    return (1 + math.cos(math.pi * (min(step, steps - 1) - warm_up) / max(1, steps - warm_up))) / 2
