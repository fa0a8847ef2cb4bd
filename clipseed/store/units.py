"""The pieces that a run is made of: consecutive samples that are computed together and stored at once."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TypeVar

from clipseed.data.types import Sample
from clipseed.store.shards import Shard

T = TypeVar("T")


@dataclass(frozen=True)
class Unit:
    """Consecutive samples of the data set's order; ``samples`` are those of them that are still to be done."""

    index: int
    samples: tuple[Sample, ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the samples."""
        return tuple(sample.id for sample in self.samples)


def own_items(items: Sequence[T], size: int, shard: Shard) -> list[T]:
    """Those of a data set's samples, or of their ids, that are in a shard's units of ``size``."""
    return [item for k, unit in enumerate(_cut(items, size)) if shard.takes(k) for item in unit]


def missing_units(samples: Sequence[Sample], size: int, shard: Shard, done: Container[str]) -> list[Unit]:
    """A shard's units without what is done; how samples are cut into units never depends on what is done."""
    found = []
    for index, unit in enumerate(_cut(samples, size)):
        missing = tuple(sample for sample in unit if sample.id not in done) if shard.takes(index) else ()
        if missing:
            found.append(Unit(index, missing))
    return found


def _cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
