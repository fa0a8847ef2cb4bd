"""Samples and items for the streaming engine, without images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipseed.data.types import Sample
from clipseed.errors import ImageError


@dataclass(frozen=True)
class Item:
    number: int
    key: int
    cost: int = 10


def samples(count: int) -> tuple[Sample, ...]:
    return tuple(Sample(str(k), Path(f"{k}.png"), ()) for k in range(count))


def load(sample: Sample) -> Item:
    """Stands in for decoding; ids ending in 7 are unreadable."""
    number = int(sample.id)
    if number % 10 == 7:
        raise ImageError(f"{sample.path}: unreadable")
    return Item(number, number % 3)
