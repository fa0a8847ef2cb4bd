"""Which image stands where in training: a pure function of seed and position, so that resuming needs no state.

Training reads one endless row of images, one permutation of the data set behind the other. Step ``s`` with batches of
``B`` takes positions ``s B`` to ``(s + 1) B - 1``, whatever the number of processes or parts that share the batch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

_SHUFFLE, _VARY = 1, 2
"""Streams of randomness that have nothing in common although they start from one seed."""


def image_at(position: int, images: int, seed: int) -> int:
    """Index below ``images`` of the image at a position. Every image comes once before any comes again."""
    epoch, place = divmod(position, images)
    return int(_permutation(images, seed, epoch)[place])


def seed_at(position: int, seed: int) -> int:
    """Seed below 2^63 of everything random about the sample at a position, its augmentation above all."""
    return mixed(seed, position, _VARY)


def mixed(*numbers: int) -> int:
    """One seed below 2^63 out of several numbers, each of which changes it beyond recognition."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@lru_cache(maxsize=2)  # a batch may reach from one permutation into the next
def _permutation(images: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch, _SHUFFLE]).permutation(images)
