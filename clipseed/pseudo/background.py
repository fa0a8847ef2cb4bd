"""The one background rule: what the background scores beside class scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Background:
    """What the background scores, next to class scores in [0, 1].

    Attributes:
        kind: ``power``: ``(1 - strongest class) ^ value`` (CLIP-ES, FMA-WSSS); ``threshold``: ``value`` everywhere;
            ``given``: the scores' first row, raised to ``value``, for scores that come with a background of their own.
        value: See there. Of a power, the larger, the more foreground.
    """

    kind: Literal["power", "threshold", "given"] = "power"
    value: float = 1.0

    def score(self, strongest: Scores) -> Scores:
        """Its score where the strongest class scores so (``power``, ``threshold``): same shape, same type.

        Half precision stays half precision: that rounding is part of CLIP-ES's published numbers.
        """
        if self.kind == "threshold":
            return np.full_like(strongest, self.value)
        score: Scores = (1 - np.clip(strongest, 0, 1)) ** self.value
        return score

    def apart(self, scores: Scores) -> tuple[Scores | None, Scores]:
        """The background's own scores ``(…)``, where they are ``given``, and those of the classes ``(K, …)``."""
        return (scores[0] ** self.value, scores[1:]) if self.kind == "given" else (None, scores)

    def add_to(self, scores: Scores) -> Scores:
        """Class scores ``(K, …)`` (``given``: with background ``(1 + K, …)``) to ``(1 + K, …)``, background first."""
        own, classes = self.apart(scores)
        ground = self.score(classes.max(axis=0, initial=0)) if own is None else own
        return np.concatenate([ground[None], classes])
