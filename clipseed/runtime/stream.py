"""The streaming engine that every command uses: units of samples in, units of results out, nothing kept in between.

Samples are decoded ahead (:mod:`clipseed.runtime.decode`), grouped into batches that the device can take in one piece,
computed, and written by a thread of their own while the next batch runs. A unit's grouping depends only on the data
set's order, so an interrupted run repeats exactly the batches that an uninterrupted one would have made. Work made of
small operations goes image by image instead, several at once (:class:`~clipseed.runtime.threads.OneByOne`).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch

from clipseed.data.types import Sample
from clipseed.device import is_out_of_memory
from clipseed.errors import ImageError
from clipseed.runtime.decode import DecodePool
from clipseed.runtime.threads import OneByOne, single_threads
from clipseed.store.units import Unit


class Loaded(Protocol):
    """A decoded sample: ``key`` says with which others it can share a batch, ``cost`` is its size in tokens."""

    @property
    def key(self) -> Hashable: ...  # noqa: D102
    @property
    def cost(self) -> int: ...  # noqa: D102


T = TypeVar("T", bound=Loaded)
R = TypeVar("R")


@dataclass
class StreamStats:
    """What a run did, and where its main thread waited (seconds)."""

    computed: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    out_of_memory: tuple[int, int] | None = None
    """Batch size that did not fit, and the one it was lowered to."""
    waits: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "device": 0.0, "write": 0.0})
    counters: Counter[str] = field(default_factory=Counter)
    """What else the work counted."""

    @property
    def bottleneck(self) -> str:
        """The stage that the run waited for most."""
        return max(self.waits, key=lambda stage: self.waits[stage])

    def add(self, other: StreamStats) -> None:
        """Take over what another worker of the same run did."""
        self.computed += other.computed
        self.skipped += other.skipped
        self.out_of_memory = self.out_of_memory or other.out_of_memory
        for stage, seconds in other.waits.items():
            self.waits[stage] += seconds
        self.counters += other.counters


Advance = Callable[[int, StreamStats], None]
"""Called with the number of samples finished, for progress."""


class BatchSize:
    """How many samples share a batch: a fixed number, or as many as a token budget holds; halved on out-of-memory."""

    def __init__(self, fixed: int | None, token_budget: int) -> None:
        self._fixed, self._budget = fixed, token_budget

    def limit(self, cost: int) -> int:
        """Batch size for samples of ``cost`` tokens."""
        return max(1, self._fixed if self._fixed is not None else self._budget // max(1, cost))

    def halve(self, size: int, cost: int) -> None:
        """Stay at half of ``size`` from now on, for samples of this cost."""
        if self._fixed is not None:
            self._fixed = max(1, size // 2)
        else:
            self._budget = max(1, size // 2) * max(1, cost)


def run_stream(
    units: Sequence[Unit],
    pool: DecodePool[T],
    compute: Callable[[Sequence[T]], Sequence[R | ImageError]],
    write: Callable[[Unit, Sequence[R]], None],
    batch: BatchSize,
    advance: Advance = lambda count, stats: None,
    one_by_one: OneByOne | None = None,
    queue: int = 0,
    lanes: int = 1,
) -> StreamStats:
    """Run all units.

    Args:
        units: Units in order.
        pool: Decodes their samples.
        compute: Results of a batch of samples with equal keys, in the batch's order; an ImageError skips its sample.
        write: Stores a unit's results, in the order of its samples; runs in a thread of its own.
        batch: Batch-size policy.
        advance: Called with the number of samples finished, for progress.
        one_by_one: Batches are of one sample and ``compute`` is called in several threads at once.
        queue: Batches that wait for or are in ``compute``, in threads of their own, while the next one is collected:
            2 keep a GPU busy. 0: each is computed before the next sample is looked at. Batches are the same.
        lanes: Threads that compute them; with 2, one uploads and unpacks while the GPU works for the other.

    Raises:
        Whatever ``compute`` or ``write`` raise; samples that cannot be decoded are skipped and reported.
    """
    stats = StreamStats()
    outcomes = pool.stream(sample for unit in units for sample in unit.samples)
    compute = _without_gradients(compute)
    with ExitStack() as stack:
        writer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="write"))
        computer = stack.enter_context(ThreadPoolExecutor(lanes, thread_name_prefix="compute")) if queue else None
        single: Iterator[tuple[Sample, R | ImageError]] | None = None
        if one_by_one is not None:
            threads = stack.enter_context(single_threads(one_by_one.threads))
            single = _one_by_one(outcomes, compute, threads, one_by_one, stats)
        pending: Future[None] | None = None
        for unit in units:
            if single is not None:
                results = _collect(unit, single, stats, advance)
            else:
                results = _run_task(unit, outcomes, compute, batch, stats, advance, computer, queue)
            _await(pending, stats)
            pending = writer.submit(write, unit, results)
        _await(pending, stats)
    return stats


def _run_task(
    unit: Unit,
    outcomes: Iterator[tuple[Sample, T | ImageError]],
    compute: Callable[[Sequence[T]], Sequence[R | ImageError]],
    batch: BatchSize,
    stats: StreamStats,
    advance: Advance,
    computer: Executor | None,
    queue: int,
) -> list[R]:
    buckets: dict[Hashable, _Bucket[T]] = {}
    results: dict[int, R] = {}
    waiting: deque[tuple[list[int], Future[list[R | ImageError]]]] = deque()

    def take(positions: list[int], found: Callable[[], list[R | ImageError]]) -> None:
        started = time.perf_counter()
        for position, result in zip(positions, found(), strict=True):
            if isinstance(result, ImageError):
                stats.skipped.append((unit.samples[position].id, str(result)))
            else:
                results[position] = result
                stats.computed += 1
        stats.waits["device"] += time.perf_counter() - started
        advance(len(positions), stats)

    def flush(bucket: _Bucket[T]) -> None:
        work = partial(_compute, bucket.items, compute, batch, stats)
        if computer is None:
            take(bucket.positions, work)
        else:
            waiting.append((bucket.positions, computer.submit(work)))
            if len(waiting) > queue - 1:
                take_oldest()
        bucket.clear()

    def take_oldest() -> None:
        positions, future = waiting.popleft()
        take(positions, future.result)

    for position in range(len(unit.samples)):
        started = time.perf_counter()
        sample, outcome = next(outcomes)
        stats.waits["decode"] += time.perf_counter() - started
        if isinstance(outcome, ImageError):
            stats.skipped.append((sample.id, str(outcome)))
            advance(1, stats)
            continue
        bucket = buckets.setdefault(outcome.key, _Bucket())
        bucket.add(position, outcome)
        if len(bucket.items) >= batch.limit(outcome.cost):
            flush(bucket)
    for bucket in buckets.values():
        if bucket.items:
            flush(bucket)
    while waiting:
        take_oldest()
    return [results[position] for position in sorted(results)]


def _collect(
    unit: Unit, computed: Iterator[tuple[Sample, R | ImageError]], stats: StreamStats, advance: Advance
) -> list[R]:
    """Results of a unit out of those that come in the order of the samples."""
    results: list[R] = []
    for _ in unit.samples:
        sample, result = next(computed)
        if isinstance(result, ImageError):
            stats.skipped.append((sample.id, str(result)))
        else:
            results.append(result)
            stats.computed += 1
        advance(1, stats)
    return results


def _one_by_one(
    outcomes: Iterator[tuple[Sample, T | ImageError]],
    compute: Callable[[Sequence[T]], Sequence[R | ImageError]],
    threads: ThreadPoolExecutor,
    how: OneByOne,
    stats: StreamStats,
) -> Iterator[tuple[Sample, R | ImageError]]:
    """Results in the order of the samples, a bounded number ahead of whoever takes them."""
    ahead = 2 * how.threads
    waiting: deque[tuple[Sample, ImageError | tuple[T, Future[Sequence[R | ImageError]]]]] = deque()

    def alone(item: T) -> R | ImageError:
        wait([entry[1] for _, entry in waiting if not isinstance(entry, ImageError)])
        return _compute([item], compute, BatchSize(1, 1), stats)[0]

    def oldest() -> tuple[Sample, R | ImageError]:
        nonlocal ahead
        sample, entry = waiting.popleft()
        if isinstance(entry, ImageError):
            return sample, entry
        item, future = entry
        started = time.perf_counter()
        try:
            result = future.result()[0]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            stats.out_of_memory, ahead = stats.out_of_memory or (how.threads, 1), 0
            result = alone(item)
        stats.waits["device"] += time.perf_counter() - started
        return sample, result

    while True:
        started = time.perf_counter()
        sample, outcome = next(outcomes, (None, None))
        stats.waits["decode"] += time.perf_counter() - started
        if sample is None or outcome is None:
            break
        if isinstance(outcome, ImageError):
            waiting.append((sample, outcome))
        elif outcome.cost <= how.largest:
            waiting.append((sample, (outcome, threads.submit(compute, [outcome]))))
        else:
            while waiting:
                yield oldest()
            started = time.perf_counter()
            result = alone(outcome)
            stats.waits["device"] += time.perf_counter() - started
            yield sample, result
        while len(waiting) > ahead:
            yield oldest()
    while waiting:
        yield oldest()


class _Bucket(Generic[T]):
    def __init__(self) -> None:
        self.positions: list[int] = []
        self.items: list[T] = []

    def add(self, position: int, item: T) -> None:
        self.positions.append(position)
        self.items.append(item)

    def clear(self) -> None:
        self.positions, self.items = [], []


def _without_gradients(
    compute: Callable[[Sequence[T]], Sequence[R | ImageError]],
) -> Callable[[Sequence[T]], Sequence[R | ImageError]]:
    """The functions that compute leave this to their caller; it holds for the thread that calls."""

    def run(items: Sequence[T]) -> Sequence[R | ImageError]:
        with torch.inference_mode():
            return compute(items)

    return run


def _compute(
    items: Sequence[T], compute: Callable[[Sequence[T]], Sequence[R | ImageError]], batch: BatchSize, stats: StreamStats
) -> list[R | ImageError]:
    """Compute a batch, in smaller ones from the moment it does not fit into the device's memory."""
    results: list[R | ImageError] = []
    cost = items[0].cost
    while len(results) < len(items):
        part = items[len(results) : len(results) + batch.limit(cost)]
        try:
            results.extend(compute(part))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                results.append(ImageError("does not fit into the device's memory even alone; lower --max-side"))
            else:
                batch.halve(len(part), cost)
                first = stats.out_of_memory[0] if stats.out_of_memory else len(part)
                stats.out_of_memory = (first, batch.limit(cost))
    return results


def _await(pending: Future[None] | None, stats: StreamStats) -> None:
    if pending is not None:
        started = time.perf_counter()
        pending.result()
        stats.waits["write"] += time.perf_counter() - started
