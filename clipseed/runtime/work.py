"""What a command does with images, apart from where it runs: here, or in the workers of a cluster."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from clipseed.data.types import Sample
from clipseed.errors import ImageError, StoreError
from clipseed.runtime.decode import DecodePool
from clipseed.runtime.stream import Advance, BatchSize, Loaded, StreamStats, run_stream
from clipseed.runtime.threads import OneByOne
from clipseed.store.units import Unit

T = TypeVar("T", bound=Loaded)
R = TypeVar("R")
Result_co = TypeVar("Result_co", covariant=True)


class _Counters(threading.local):
    """A counter for each thread, made when it first counts."""

    def __init__(self, everyone: list[Counter[str]]) -> None:
        self.mine: Counter[str] = Counter()
        everyone.append(self.mine)


class Work(ABC, Generic[T, R]):
    """A model, loaded, and what to do with it.

    Attributes:
        batch: Batch-size policy.
        workers: Decoding processes; 0 decodes in a thread.
        ahead: Samples to decode ahead.
        one_by_one: Samples are computed one by one, in several threads at once; ``None``: in batches on all cores.
        queue: Batches in flight, see :func:`~clipseed.runtime.stream.run_stream`.
        lanes: How many of them :meth:`compute` may be called with at once, by threads.
    """

    batch: BatchSize
    workers: int
    ahead: int
    one_by_one: OneByOne | None = None
    queue: int = 0
    lanes: int = 1

    def __init__(self) -> None:
        self._start_counting()

    def _start_counting(self) -> None:
        self._counted: list[Counter[str]] = []
        self._counters = _Counters(self._counted)

    @property
    def counters(self) -> Counter[str]:
        """What the run is to report, added to by :meth:`compute`; each thread has its own part of it."""
        return self._counters.mine

    @property
    @abstractmethod
    def loader(self) -> Callable[[Sample], T]:
        """Decodes a sample; must survive pickling, because it runs in worker processes."""

    @abstractmethod
    def compute(self, items: Sequence[T]) -> Sequence[R | ImageError]:
        """Results of a batch of samples with equal keys, in the batch's order; an ImageError skips its sample."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What all workers of a run must have in common, for the manifest: plain values only."""

    def run(
        self, units: Sequence[Unit], write: Callable[[Unit, Sequence[R]], None], advance: Advance | None = None
    ) -> StreamStats:
        """Run all units in this process; ``write`` gets each one's results, in a thread of its own."""
        with DecodePool(self.loader, self.workers, self.ahead) as pool:
            stats = run_stream(
                units, pool, self.compute, write, self.batch, advance or (lambda count, stats: None),
                self.one_by_one, self.queue, self.lanes,
            )  # fmt: skip
        stats.counters = sum(self._counted, Counter())
        self._start_counting()
        return stats


def results_of(work: Work[Any, R], samples: Sequence[Sample]) -> list[R]:
    """Results of a few samples, in their order, kept in memory and computed as one unit.

    Raises:
        ImageError: one of them cannot be read, or used.
    """
    found: list[R] = []
    stats = work.run([Unit(0, tuple(samples))], lambda _, results: found.extend(results))
    if stats.skipped:
        raise ImageError(stats.skipped[0][1])
    return found


@dataclass(frozen=True)
class Done(Generic[Result_co]):
    """What a loader gives that did all the work itself: nothing is computed together with anything else any more."""

    result: Result_co
    key: tuple[int, ...] = ()
    cost: int = 1


Recipe = Callable[[], Work[Any, R]]
"""Loads the model and makes the work; must survive pickling, because it travels to the workers of a cluster."""


class Engine(Protocol[Result_co]):
    """Where work runs."""

    @property
    def about(self) -> dict[str, Any]:
        """See :meth:`Work.about`."""
        ...

    @property
    def hands(self) -> int:
        """Units that are in work at once."""
        ...

    def run(
        self, units: Sequence[Unit], write: Callable[[Unit, Sequence[Result_co]], None], advance: Advance | None = None
    ) -> StreamStats:
        """Run all units, in any order; ``write`` is never called twice at once."""
        ...

    def close(self) -> None:
        """Let go of workers."""
        ...


class Deferred(Generic[R]):
    """An engine that is opened when there is something to run, if what it would say about itself is known before.

    Args:
        start: Opens the engine: loads a model, starts workers.
        about: What it is going to say of itself; ``None`` opens it at once.

    Raises:
        StoreError: on opening, it says something else.
    """

    def __init__(self, start: Callable[[], Engine[R]], about: dict[str, Any] | None) -> None:
        self._start, self._about = start, about
        self._engine: Engine[R] | None = None
        self.loading = 0.0
        """Seconds that opening took."""
        if about is None:
            self._open()

    def _open(self) -> Engine[R]:
        began = time.perf_counter()
        self._engine = self._start()
        self.loading += time.perf_counter() - began
        return self._engine

    @property
    def about(self) -> dict[str, Any]:
        """See :meth:`Work.about`."""
        return self._about if self._about is not None else self.engine.about

    @property
    def hands(self) -> int:
        """Units that are in work at once; one where nothing is opened yet."""
        return 1 if self._engine is None else self._engine.hands

    @property
    def opened(self) -> Engine[R] | None:
        """The engine, if there was reason to open it."""
        return self._engine

    @property
    def engine(self) -> Engine[R]:
        """The engine, opened."""
        if self._engine is not None:
            return self._engine
        engine = self._open()
        if self._about is not None and engine.about != self._about:
            raise StoreError(
                f"the model is another one than the output was made with: {engine.about}, not {self._about}; "
                "choose another output, or start again with --overwrite"
            )
        return engine

    def run(
        self, units: Sequence[Unit], write: Callable[[Unit, Sequence[R]], None], advance: Advance | None = None
    ) -> StreamStats:
        """Run all units; without any, nothing is opened."""
        return self.engine.run(units, write, advance) if units else StreamStats()

    def close(self) -> None:
        """Let go of workers, if there are any."""
        if self._engine is not None:
            self._engine.close()


class LocalEngine(Generic[R]):
    """The engine that runs work in this process."""

    hands = 1

    def __init__(self, recipe: Recipe[R]) -> None:
        self.work = recipe()
        self.about = self.work.about()

    def run(
        self, units: Sequence[Unit], write: Callable[[Unit, Sequence[R]], None], advance: Advance | None = None
    ) -> StreamStats:
        """Run all units in order."""
        return self.work.run(units, write, advance)

    def close(self) -> None:
        """Nothing to do."""
