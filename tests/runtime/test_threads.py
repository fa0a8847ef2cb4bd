"""Threads on a CPU: how they wait, and images computed one by one, several at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence, Sized
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clipseed.data.dataset import DatasetOptions
from clipseed.data.types import Sample
from clipseed.errors import ImageError
from clipseed.jobs.cam import CamOptions, run_cam
from clipseed.jobs.crf import CrfOptions, run_crf
from clipseed.jobs.refine import RefineOptions, run_refine
from clipseed.jobs.sam_masks import SamMasksOptions, run_sam_masks
from clipseed.runtime.decode import DecodePool
from clipseed.runtime.images import one_by_one
from clipseed.runtime.stream import BatchSize, StreamStats, run_stream
from clipseed.runtime.threads import OneByOne, let_waiting_threads_sleep, single_threads
from clipseed.runtime.work import Work
from clipseed.sam.options import FMA
from clipseed.store.cams import CamSet
from clipseed.store.segments import SegmentSet
from clipseed.store.units import Unit

from helpers.stream import Item, load, samples


def sleepers(monkeypatch: pytest.MonkeyPatch, **given: str) -> str | None:
    """OMP_WAIT_POLICY afterwards, where the user has set what is given."""
    environment = {name: os.environ[name] for name in ("PATH",)} | given
    monkeypatch.setattr(os, "environ", environment)
    let_waiting_threads_sleep()
    return environment.get("OMP_WAIT_POLICY")


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sleepers(monkeypatch) == "PASSIVE"
    assert sleepers(monkeypatch, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
    assert sleepers(monkeypatch, GOMP_SPINCOUNT="1000") is None
    assert sleepers(monkeypatch, KMP_BLOCKTIME="1") is None


def test_the_program_says_so_before_torch_is_loaded() -> None:
    """OpenMP reads it once, when torch loads it."""
    code = """if True:
        import os, sys
        import clipseed.cli.main as main
        assert "torch" not in sys.modules
        main.main = lambda: print(os.environ["OMP_WAIT_POLICY"], "torch" in sys.modules)
        main.run()
    """
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["PASSIVE", "False"]


@pytest.fixture
def three_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def seen_by(start: Callable[[Callable[[], None]], None]) -> int:
    found: list[int] = []
    start(lambda: found.append(torch.get_num_threads()))
    return found[0]


@pytest.mark.usefixtures("three_threads")
def test_single_threads_change_no_other_thread() -> None:
    def new_thread(work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with single_threads(2) as pool:
        together = threading.Barrier(2)  # each call in a thread of its own

        def threads_here() -> int:
            together.wait(20)
            return torch.get_num_threads()

        assert [future.result() for future in [pool.submit(threads_here) for _ in range(2)]] == [1, 1]
        assert torch.get_num_threads() == 3
        assert seen_by(new_thread) == 3
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_how_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert one_by_one(torch.device("cpu"), 5) == OneByOne(3, 5)  # as many as torch was told
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert one_by_one(torch.device("cpu"), 5) == OneByOne(2, 5)  # as this one of four processes may use
    assert one_by_one(torch.device("cuda"), 5) is None


class Together:
    """Computes numbers, and knows how many it was asked for at the same time."""

    def __init__(self, refuse: Callable[[Item, int], None] = lambda item, beside: None) -> None:
        self.lock, self.running, self.most = threading.Lock(), 0, 0
        self.written: list[tuple[int, list[int]]] = []
        self._refuse = refuse

    def compute(self, items: Sequence[Item]) -> list[int | ImageError]:
        (item,) = items
        with self.lock:
            self.running += 1
            beside = self.running
            self.most = max(self.most, beside)
        try:
            self._refuse(item, beside)
            return [ImageError("odd one")] if item.number == 3 else [item.number * 100]
        finally:
            with self.lock:
                self.running -= 1

    def write(self, task: Unit, results: Sequence[int]) -> None:
        self.written.append((task.index, list(results)))

    def run(self, tasks: Sequence[Unit], threads: int = 2, largest: int = 10, loader: object = load) -> StreamStats:
        with DecodePool(loader, 0, ahead=4) as pool:  # type: ignore[arg-type]
            how = OneByOne(threads, largest)
            return run_stream(tasks, pool, self.compute, self.write, BatchSize(4, 1), one_by_one=how)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_order_and_skipping_are_those_of_the_samples(threads: int) -> None:
    work = Together()
    everything = samples(20)
    stats = work.run([Unit(4, everything[:12]), Unit(9, everything[12:])], threads)
    assert work.written == [
        (4, [k * 100 for k in range(12) if k not in (3, 7)]),
        (9, [k * 100 for k in range(12, 20) if k != 17]),
    ]
    assert [key for key, _ in stats.skipped] == ["3", "7", "17"]
    assert stats.computed == 17
    assert work.most <= threads


def test_they_run_at_the_same_time() -> None:
    pairs = threading.Barrier(2)

    def in_pairs(item: Item, beside: int) -> None:
        pairs.wait(20)  # fails where no second one comes

    work = Together(in_pairs)
    work.run([Unit(0, samples(6))])
    assert work.written == [(0, [0, 100, 200, 400, 500])]
    assert work.most == 2


def test_a_large_one_runs_alone() -> None:
    """On all cores: in the thread of the run, with no other beside it."""

    def large_fourth(sample: Sample) -> Item:
        return Item(int(sample.id), 0, 99 if sample.id == "4" else 10)

    where: list[tuple[int, str]] = []

    def note(item: Item, beside: int) -> None:
        if item.number == 4:
            where.append((beside, threading.current_thread().name))

    work = Together(note)
    work.run([Unit(0, samples(7))], loader=large_fourth)
    assert work.written == [(0, [0, 100, 200, 400, 500, 600])]
    assert where == [(1, threading.current_thread().name)]


def test_out_of_memory_is_tried_again_alone() -> None:
    def crowded(item: Item, beside: int) -> None:
        if threading.current_thread().name.startswith("compute") and item.number == 2:
            raise MemoryError
        if item.number == 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    work = Together(crowded)
    stats = work.run([Unit(0, samples(7))])
    assert work.written == [(0, [0, 100, 200, 400, 600])]
    assert stats.out_of_memory == (2, 1)
    assert [key for key, _ in stats.skipped] == ["3", "5"]


def test_other_errors_end_the_run() -> None:
    def faulty(item: Item, beside: int) -> None:
        if item.number == 4:
            raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        Together(faulty).run([Unit(0, samples(7))])


class Counting(Work[Item, int]):
    def __init__(self) -> None:
        super().__init__()
        self.batch, self.workers, self.ahead = BatchSize(1, 1), 0, 8
        self.one_by_one = OneByOne(3, 10)

    @property
    def loader(self) -> Callable[[Sample], Item]:
        return lambda sample: Item(int(sample.id), 0)

    def compute(self, items: Sequence[Item]) -> list[int]:
        for _ in range(200):
            self.counters["steps"] += 1
        return [item.number for item in items]

    def about(self) -> dict[str, object]:
        return {}


def test_counts_of_all_threads_add_up_run_by_run() -> None:
    work = Counting()
    for _ in range(2):
        stats = work.run([Unit(0, samples(40))], lambda task, results: None)
        assert stats.counters == {"steps": 8000}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pseudo-sam") / "cams.h5"
    run_cam(CamOptions(data=DatasetOptions(dataset="toy", limit=4), out=out))
    return out


def crf_bytes(seeds: Path, folder: Path) -> Sized:
    run_crf(CrfOptions(seeds, folder / "masks", soft=folder / "soft.h5"))
    with CamSet(folder / "soft.h5") as soft:
        masks = {path.name: path.read_bytes() for path in (folder / "masks").glob("*.png")}
        return masks, {key: soft[key].maps.tobytes() for key in soft}


def par_bytes(seeds: Path, folder: Path) -> Sized:
    run_refine(RefineOptions("par", seeds, folder / "par.h5"))
    with CamSet(folder / "par.h5") as found:
        return {key: found[key].maps.tobytes() for key in found}


def segment_bytes(seeds: Path, folder: Path) -> Sized:
    proposals = replace(FMA, points_per_side=6, crop_layers=0)
    run_sam_masks(SamMasksOptions(folder / "segments.h5", cams=seeds, proposals=proposals))
    with SegmentSet(folder / "segments.h5") as found:
        return {key: (found[key].rle.tobytes(), found[key].iou.tobytes()) for key in found}


@pytest.mark.slow
@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("work", [crf_bytes, par_bytes, segment_bytes])
def test_results_do_not_depend_on_the_number_of_threads(
    work: Callable[[Path, Path], Sized], seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        folder = tmp_path / str(threads)
        folder.mkdir()
        found.append(work(seeds, folder))
    assert len(found[0])
    assert found[0] == found[1]
