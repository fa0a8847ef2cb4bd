"""The streaming engine: order, grouping, skipping, dying workers, out of memory, failing writers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from clipseed.data.types import Sample
from clipseed.runtime.decode import DecodePool
from clipseed.runtime.stream import BatchSize, StreamStats, run_stream
from clipseed.store.units import Unit

from helpers.stream import Item, load, samples


def dying_load(sample: Sample) -> Item:
    """A decoder whose native code crashes on one image."""
    if sample.id == "5":
        os._exit(11)
    return load(sample)


class CountingLoader:
    """Counts what it loads; a copy of it begins anew."""

    def __init__(self) -> None:
        self.calls = 0

    def __getstate__(self) -> dict[str, int]:
        return {"calls": 0}

    def __call__(self, sample: Sample) -> Item:
        self.calls += 1
        return Item(self.calls, 0)


class Recorder:
    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.written: list[tuple[int, list[int]]] = []
        self.threads: set[str] = set()

    def compute(self, items: Sequence[Item]) -> list[int]:
        assert len({item.key for item in items}) == 1
        self.batches.append([item.number for item in items])
        return [item.number * 100 for item in items]

    def write(self, task: Unit, results: Sequence[int]) -> None:
        self.threads.add(threading.current_thread().name)
        self.written.append((task.index, list(results)))


def run(recorder: Recorder, tasks: Sequence[Unit], batch: BatchSize, workers: int = 0, loader=load) -> StreamStats:  # type: ignore[no-untyped-def]
    with DecodePool(loader, workers, ahead=6) as pool:
        return run_stream(tasks, pool, recorder.compute, recorder.write, batch)


def test_a_worker_gets_the_loader_once_and_keeps_it() -> None:
    """So that what a loader opens stays open."""
    with DecodePool(CountingLoader(), 1, ahead=2) as pool:
        numbers = [item.number for _, item in pool.stream(samples(5)) if isinstance(item, Item)]
    assert numbers == [1, 2, 3, 4, 5]


def test_order_grouping_and_skipping() -> None:
    recorder = Recorder()
    everything = samples(20)
    tasks = [Unit(4, everything[:12]), Unit(9, everything[12:])]
    progress: list[int] = []
    with DecodePool(load, 0, ahead=3) as pool:
        stats = run_stream(
            tasks, pool, recorder.compute, recorder.write, BatchSize(2, 1), lambda count, _: progress.append(count)
        )
    assert recorder.written == [
        (4, [k * 100 for k in range(12) if k != 7]),
        (9, [k * 100 for k in range(12, 20) if k != 17]),
    ]
    assert all(len(batch) <= 2 for batch in recorder.batches)
    assert stats.skipped == [("7", "7.png: unreadable"), ("17", "17.png: unreadable")]
    assert stats.computed == 18
    assert sum(progress) == 20
    assert recorder.threads == {"write_0"}


def test_batches_do_not_depend_on_what_was_done_before() -> None:
    """A resumed run repeats the batches of the units it still has to do."""
    everything = samples(30)
    tasks = [Unit(0, everything[:10]), Unit(1, everything[10:20]), Unit(2, everything[20:])]
    whole, rest = Recorder(), Recorder()
    run(whole, tasks, BatchSize(4, 1))
    run(rest, tasks[1:], BatchSize(4, 1))
    assert whole.batches[-len(rest.batches) :] == rest.batches


def test_token_budget() -> None:
    batch = BatchSize(None, 1000)
    assert batch.limit(10) == 100
    assert batch.limit(769) == 1
    assert batch.limit(5000) == 1
    assert BatchSize(7, 1000).limit(5000) == 7


@pytest.mark.parametrize("batch", [BatchSize(8, 1), BatchSize(None, 80)])
def test_out_of_memory_halves_the_batch(batch: BatchSize) -> None:
    class Small(Recorder):
        def compute(self, items: Sequence[Item]) -> list[int]:
            if len(items) > 3:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return super().compute(items)

    recorder = Small()
    everything = tuple(Sample(str(3 * k), Path("x"), ()) for k in range(16) if 3 * k % 10 != 7)
    stats = run(recorder, [Unit(0, everything)], batch)
    assert recorder.written == [(0, [int(sample.id) * 100 for sample in everything])]
    assert batch.limit(10) <= 3
    assert stats.out_of_memory == (8, 2)


def test_an_image_that_never_fits_is_skipped() -> None:
    class Tiny(Recorder):
        def compute(self, items: Sequence[Item]) -> list[int]:
            if any(item.number == 3 for item in items):
                raise MemoryError
            return super().compute(items)

    recorder = Tiny()
    stats = run(recorder, [Unit(0, samples(7))], BatchSize(4, 1))
    assert recorder.written == [(0, [0, 100, 200, 400, 500, 600])]
    assert stats.skipped == [("3", "does not fit into the device's memory even alone; lower --max-side")]


def test_other_errors_end_the_run() -> None:
    class Faulty(Recorder):
        def compute(self, items: Sequence[Item]) -> list[int]:
            raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(Faulty(), [Unit(0, samples(3))], BatchSize(4, 1))


def test_a_failing_writer_ends_the_run() -> None:
    class Full(Recorder):
        def write(self, task: Unit, results: Sequence[int]) -> None:
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        run(Full(), [Unit(k, samples(3)) for k in range(4)], BatchSize(4, 1))


def test_writing_overlaps_computing() -> None:
    class Slow(Recorder):
        def compute(self, items: Sequence[Item]) -> list[int]:
            time.sleep(0.05)
            return super().compute(items)

        def write(self, task: Unit, results: Sequence[int]) -> None:
            time.sleep(0.15)
            super().write(task, results)

    recorder = Slow()
    started = time.perf_counter()
    stats = run(recorder, [Unit(k, samples(6)) for k in range(6)], BatchSize(2, 1))
    assert time.perf_counter() - started < 6 * (0.15 + 0.15) * 0.85
    assert [index for index, _ in recorder.written] == list(range(6))
    assert stats.bottleneck == "device"


@pytest.mark.slow
def test_processes_give_the_same(tmp_path: Path) -> None:
    one, two = Recorder(), Recorder()
    tasks = [Unit(0, samples(12)), Unit(1, samples(9))]
    first = run(one, tasks, BatchSize(3, 1))
    second = run(two, tasks, BatchSize(3, 1), workers=2)
    assert (one.written, one.batches) == (two.written, two.batches)
    assert first.skipped == second.skipped


@pytest.mark.slow
def test_a_dying_worker_costs_one_image() -> None:
    recorder = Recorder()
    stats = run(recorder, [Unit(0, samples(12))], BatchSize(3, 1), workers=2, loader=dying_load)
    assert recorder.written == [(0, [k * 100 for k in range(12) if k not in (5, 7)])]
    assert stats.skipped == [("5", "5.png: the decoder crashed on it"), ("7", "7.png: unreadable")]


@pytest.mark.slow
def test_a_worker_that_dies_between_two_looks() -> None:
    """The pool is known to be broken before the next sample is handed to it."""
    with DecodePool(dying_load, 1, ahead=2) as pool:
        stream = pool.stream(iter(samples(9)[4:]))
        assert isinstance(next(stream)[1], Item)
        deadline = time.monotonic() + 60
        while not pool._executor._broken:  # type: ignore[attr-defined]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        outcomes = [(sample.id, isinstance(outcome, Item)) for sample, outcome in stream]
    assert outcomes == [("5", False), ("6", True), ("7", False), ("8", True)]


def test_decoding_stays_a_bounded_number_ahead() -> None:
    loaded: list[str] = []

    def watch(sample: Sample) -> Item:
        loaded.append(sample.id)
        return Item(0, 0)

    with DecodePool(watch, 0, ahead=4) as pool:
        stream = pool.stream(iter(samples(1000)))
        for _ in range(10):
            next(stream)
        time.sleep(0.1)
        assert len(loaded) <= 14


def test_batches_in_flight_are_those_of_one_after_the_other() -> None:
    everything = samples(40)
    tasks = [Unit(0, everything[:25]), Unit(1, everything[25:])]
    plain, ahead = Recorder(), Recorder()
    run(plain, tasks, BatchSize(3, 1))
    running, most = 0, 0
    lock = threading.Lock()

    def compute(items: Sequence[Item]) -> list[int]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01 * (items[0].number % 3))  # so that batches end in another order than they began
        with lock:
            running -= 1
        return ahead.compute(items)

    with DecodePool(load, 0, ahead=6) as pool:
        stats = run_stream(tasks, pool, compute, ahead.write, BatchSize(3, 1), queue=2, lanes=2)
    assert ahead.written == plain.written
    assert sorted(ahead.batches) == sorted(plain.batches)
    assert most <= 2
    assert stats.computed == 36
    assert [key for key, _ in stats.skipped] == ["7", "17", "27", "37"]


def test_what_fails_in_flight_is_raised_and_smaller_batches_are_tried() -> None:
    recorder = Recorder()

    def cramped(items: Sequence[Item]) -> list[int]:
        if len(items) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return recorder.compute(items)

    with DecodePool(load, 0, ahead=6) as pool:
        stats = run_stream([Unit(0, samples(30))], pool, cramped, recorder.write, BatchSize(4, 1), queue=2, lanes=2)
    assert recorder.written == [(0, [k * 100 for k in range(30) if k % 10 != 7])]
    assert stats.out_of_memory == (4, 2)

    def failing(items: Sequence[Item]) -> list[int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with DecodePool(load, 0, ahead=6) as pool, pytest.raises(RuntimeError, match="illegal memory access"):
        run_stream([Unit(0, samples(30))], pool, failing, recorder.write, BatchSize(4, 1), queue=2, lanes=2)
