"""The skeleton of all commands: what is to do, when progress begins, what seconds are, and how a run ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipseed.errors import ImageError, InputError
from clipseed.runtime import run as module
from clipseed.runtime.interrupt import Interrupted
from clipseed.runtime.run import open_engine, run
from clipseed.runtime.stream import BatchSize
from clipseed.runtime.work import Done, Work
from clipseed.store.label_mask_writer import Labelled, LabelMaskWriter
from clipseed.store.shards import WHOLE, Shard

from helpers.samples import samples

IDS = [f"{k:02d}" for k in range(10)]


class Painting(Work[Any, Labelled]):
    """Masks out of nothing."""

    def __init__(self, bad: Sequence[str] = (), stop: str = "") -> None:
        super().__init__()
        self.batch, self.workers, self.ahead = BatchSize(1, 1), 0, 2
        self.bad, self.stop = bad, stop

    def about(self) -> dict[str, Any]:
        return {"device": "canvas"}

    @property
    def loader(self) -> Callable[[Any], Done[Any]]:
        return Done

    def compute(self, items: Sequence[Done[Any]]) -> list[Labelled | ImageError]:
        (item,) = items
        key = item.result.id
        if key == self.stop:
            raise KeyboardInterrupt
        if key in self.bad:
            return [ImageError("broken")]
        return [Labelled(key, np.ones((4, 4), np.uint8), (0,))]


def paint(out: Path, work: Callable[[], Painting] = Painting, shard: Shard = WHOLE, **given: Any) -> Any:
    engine = open_engine(work, None)
    with LabelMaskWriter(
        out, {"kind": "paint", "vocabulary": {"classes": [{"name": "car"}]}}, 3, shard=shard
    ) as writer:
        return run(engine, writer, samples(IDS), shard=shard, **given)


def test_seconds_are_of_computing(tmp_path: Path) -> None:
    """Loading is counted apart, whenever it happens."""

    def slowly() -> Painting:
        time.sleep(0.5)
        return Painting()

    report = paint(tmp_path / "at-once", slowly)
    assert report.loading >= 0.5
    assert report.seconds < report.loading
    engine = open_engine(slowly, None, {"device": "canvas"})  # known before: loaded when there is something to do
    with LabelMaskWriter(tmp_path / "later", {"kind": "paint", "vocabulary": {"classes": []}}, 3) as writer:
        assert engine.loading == 0
        later = run(engine, writer, [], None)
        assert (later.loading, later.total) == (0, 0)
        later = run(engine, writer, samples(IDS))
    assert later.loading >= 0.5
    assert later.seconds < later.loading
    assert later.device == "canvas"


def test_what_is_done_and_what_is_own(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def start(todo: int, done: int) -> Any:
        seen.append((todo, done))
        return lambda count, stats: None

    first = paint(tmp_path / "out", lambda: Painting(bad=["04"]), unusable={"05": "no labels"}, start=start)
    assert first.stats.skipped == [("04", "broken"), ("05", "no labels")]
    again = paint(tmp_path / "out", start=start)
    assert seen == [(9, 0), (2, 8)]
    assert (again.total, again.done_before, again.stats.computed) == (10, 8, 2)
    second = paint(tmp_path / "part", shard=Shard(1, 2))
    assert (second.total, second.stats.computed, second.open_shards) == (4, 4, 1)


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it computes, while progress begins, while it finishes: a hint how to go on, and what is done stays."""
    with pytest.raises(Interrupted, match=r"interrupted; \d of 10 images are safe in .*Run the same command again"):
        paint(tmp_path / "out", lambda: Painting(stop="07"))

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="of 10 images are safe"):
        paint(tmp_path / "out", start=stop)
    with monkeypatch.context() as patch:
        patch.setattr(LabelMaskWriter, "finish", stop)
        with pytest.raises(Interrupted, match="interrupted while finishing .*Run the same command again"):
            paint(tmp_path / "out")
    assert paint(tmp_path / "out").done_before == 10


def test_nothing_but_skipped(tmp_path: Path) -> None:
    """The whole is refused, a shard reports that it is through."""
    with pytest.raises(InputError, match="none of the 10 images could be used; the first, 00: broken"):
        paint(tmp_path / "out", lambda: Painting(bad=IDS))
    report = paint(tmp_path / "allowed", lambda: Painting(bad=IDS), may_be_empty=True)
    assert [key for key, _ in report.stats.skipped] == IDS
    report = paint(tmp_path / "shards", lambda: Painting(bad=IDS), shard=Shard(0, 2))
    assert (report.stats.computed, report.open_shards) == (0, 1)


def test_options_are_checked() -> None:
    with pytest.raises(module.UsageError, match="--batch-size"):
        module.RunOptions(batch_size=0).check()
    with pytest.raises(module.UsageError, match="--workers"):
        module.RunOptions(workers=-1).check()
