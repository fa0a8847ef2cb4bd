"""The training loop: what it learns, what it keeps, and that nothing but seed and step decides the outcome."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clipseed.errors import ImageError, StoreError, UsageError, WeightsError
from clipseed.runtime.interrupt import Interrupted
from clipseed.train import checkpoint as checkpoints
from clipseed.train.checkpoint import read_checkpoint, read_weights
from clipseed.train.loop import BEST, CHECKPOINT, Status, TrainingError, train
from clipseed.train.metrics import METRICS, read_metrics

from helpers import tiny_training
from helpers.program import environment
from helpers.tiny_training import IMAGES, TinyData, TinyTrainer, options, quiet, run

SCRIPT = Path(tiny_training.__file__)


def content(folder: Path) -> dict[str, bytes]:
    """All that a run keeps, but its lock."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "lock"}


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    line = [sys.executable, str(SCRIPT), str(folder), *words]
    return subprocess.Popen(line, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(folder / METRICS)) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_learns_and_records_every_step(tmp_path: Path) -> None:
    seen: list[Status] = []
    trainer = TinyTrainer(60)
    train(trainer, TinyData(), options(tmp_path, steps=60, report_every=10, keep_every=25), {}, report=seen.append)
    rows = read_metrics(tmp_path / METRICS)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert np.mean([row["loss"] for row in rows[-10:]]) < 0.45 * np.mean([row["loss"] for row in rows[:10]])
    assert rows[0]["lr"] == 0.02
    assert rows[59]["lr"] == pytest.approx(0.02 / 60, rel=1e-5)
    assert all(row["gradient"] > 0 for row in rows)
    assert [status.step for status in seen] == [10, 20, 25, 35, 45, 50, 60]
    assert seen[-1].losses["loss"] == pytest.approx(np.mean([row["loss"] for row in rows[50:]]))
    assert re.fullmatch(
        r"step 10/60, loss \d\.\d{4}, right \d\.\d{4}, [\d.]+ images/s, \d:\d\d:\d\d left", str(seen[0])
    )
    assert "left" not in str(seen[-1])
    kept = read_checkpoint(tmp_path / CHECKPOINT)
    assert kept.step == 60
    assert all(torch.equal(value, kept.weights[name]) for name, value in trainer.module.state_dict().items())


def test_steps_equal_a_plain_loop(tmp_path: Path) -> None:
    """The oracle: the same steps by hand, without dropout; with and without clipping."""
    for clip in (None, 0.05):
        folder = tmp_path / str(clip)
        module = run(folder, dropout=0.0, clip=clip, steps=6)
        expected = TinyTrainer(6, dropout=0.0)
        optimizer = torch.optim.AdamW(expected.module.parameters(), 0.02)
        from clipseed.train.sampler import image_at, seed_at

        for step in range(6):
            pairs = [TinyData().sample(image_at(k, IMAGES, 0), seed_at(k, 0)) for k in range(4 * step, 4 * step + 4)]
            batch = (torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs]))
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 6)
            optimizer.zero_grad()
            expected.losses(batch, step)["loss"].backward()
            if clip:
                nn.utils.clip_grad_norm_(expected.module.parameters(), clip)
            optimizer.step()
        for name, value in expected.module.state_dict().items():
            assert torch.equal(module.state_dict()[name], value), name
        assert torch.equal(module.unused, torch.ones(2))  # without a gradient there is no weight decay either


def test_parts_of_a_batch_are_averaged(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", dropout=0.0, batch=8)
    parts = run(tmp_path / "parts", dropout=0.0, batch=8, accumulate=4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    rows = [read_metrics(tmp_path / name / METRICS) for name in ("whole", "parts")]
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["gradient"] == pytest.approx(other["gradient"], rel=1e-2)


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path) -> None:
    run(tmp_path / "here")
    run(tmp_path / "there", workers=2)
    assert content(tmp_path / "here") == content(tmp_path / "there")


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", seed=1)
    run(tmp_path / "c")
    assert content(tmp_path / "a") == content(tmp_path / "c")
    assert content(tmp_path / "a")[METRICS] != content(tmp_path / "b")[METRICS]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL at 25 random moments; checkpoint and metrics are those of an undisturbed run, to the byte."""
    line = [sys.executable, "-m", "helpers.killing_training", str(tmp_path), "25", "7"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = done.stdout.splitlines()[:-1]
    assert len(kills) == 25
    assert len({line.split(": ")[1] for line in kills}) >= 5, done.stdout  # they hit all over the run


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_says_how_to_go_on(tmp_path: Path, number: int, code: int) -> None:
    process = start(tmp_path / "out", "steps=4000", "keep_every=5", "report_every=1", "pause=0.01")
    wait_for_rows(tmp_path / "out", 6, process)
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == code
    (line,) = told.splitlines()
    assert re.fullmatch(r"error: interrupted; \S+ holds step \d+: the same command goes on there", line)
    first = start(tmp_path / "other", "steps=4000", "report_every=1", "pause=0.01")
    wait_for_rows(tmp_path / "other", 2, first)
    first.send_signal(number)
    assert "no checkpoint was written yet: the same command begins anew" in first.communicate(timeout=60)[1]


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, steps=5)
    before = content(tmp_path)
    with pytest.raises(StoreError, match="made with other settings") as caught:
        run(tmp_path, rate=0.5, steps=10, seed=2, clip=1.0)
    for difference in ("rate 0.02 -> 0.5", "steps 5 -> 10", "seed 0 -> 2", "clip null -> 1.0"):
        assert difference in str(caught.value)
    assert "batch" not in str(caught.value)
    assert content(tmp_path) == before
    run(tmp_path, steps=5, keep_every=2, report_every=3, workers=0)  # what decides nothing may change
    run(tmp_path, rate=0.5, steps=7, overwrite=True)
    assert read_checkpoint(tmp_path / CHECKPOINT).step == 7
    assert len(read_metrics(tmp_path / METRICS)) == 7


def test_starting_from_weights_is_not_going_on(tmp_path: Path) -> None:
    first = run(tmp_path / "first")
    init = tmp_path / "first" / CHECKPOINT
    second = run(tmp_path / "second", init=init, rate=1e-9)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=1e-6)
    assert [row["step"] for row in read_metrics(tmp_path / "second" / METRICS)] == list(range(1, 21))
    with pytest.raises(StoreError, match=r"init [0-9a-f]+ -> null"):
        run(tmp_path / "second", rate=1e-9)
    run(tmp_path / "second", init=init, rate=1e-9)  # the same command
    with pytest.raises(WeightsError, match=r"nowhere: no such weights file"):
        run(tmp_path / "third", init=tmp_path / "nowhere")
    trainer = TinyTrainer(20)
    trainer.module = nn.Linear(8, 3)
    with pytest.raises(WeightsError, match=r"weights of another model \(lacks bias; lacks weight; also has 0.bias"):
        train(trainer, TinyData(), options(tmp_path / "fourth", init=init), {}, report=quiet)


def test_an_infinite_loss_stops_before_it_is_kept(tmp_path: Path) -> None:
    trainer = TinyTrainer(20, poison=12)
    with pytest.raises(TrainingError) as caught:
        train(trainer, TinyData(), options(tmp_path), {}, report=quiet)
    text = str(caught.value)
    assert text.startswith("step 13: loss is inf, gradient is nan; ")
    assert f"{tmp_path / CHECKPOINT} holds step 10" in text
    assert "try a lower --lr" in text
    kept = read_checkpoint(tmp_path / CHECKPOINT)
    assert all(torch.isfinite(value).all() for value in kept.weights.values())
    assert len(read_metrics(tmp_path / METRICS)) == 10


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    class Rooted(TinyTrainer):
        def losses(self, batch: Any, step: int) -> Any:
            found = super().losses(batch, step)
            return {"loss": found["loss"] + (0 * self.module[0].weight.sum()).sqrt()}

    with pytest.raises(TrainingError, match=r"step 1: gradient is nan"):
        train(Rooted(20), TinyData(), options(tmp_path, keep_every=1), {}, report=quiet)
    assert not (tmp_path / CHECKPOINT).exists()


def test_losses_are_float32(tmp_path: Path) -> None:
    class Half(TinyTrainer):
        def losses(self, batch: Any, step: int) -> Any:
            assert self.module[0](batch[0]).dtype == torch.bfloat16  # autocast is on
            return {"loss": super().losses(batch, step)["loss"].bfloat16()}

    with pytest.raises(TypeError, match=r"\.float\(\)"):
        train(Half(20), TinyData(), options(tmp_path / "half", bfloat16=True), {}, report=quiet)
    run(tmp_path / "mixed", bfloat16=True, steps=60)
    rows = read_metrics(tmp_path / "mixed" / METRICS)
    assert np.mean([row["loss"] for row in rows[-10:]]) < 0.45 * np.mean([row["loss"] for row in rows[:10]])


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    scores = {4: 0.2, 8: 0.9, 12: 0.5, 16: 0.9, 20: 0.1}
    trainer = TinyTrainer(20)
    at: dict[int, dict[str, torch.Tensor]] = {}

    def validate(step: int) -> dict[str, float]:
        trainer.module.eval()
        at[step] = {name: value.clone() for name, value in trainer.module.state_dict().items()}
        return {"score": scores[step], "pixels": 0.5}

    chosen = options(tmp_path, validate_every=4, keep_every=100)
    best = train(trainer, TinyData(), chosen, {}, validate, report=quiet)
    assert best == {"step": 8, "score": 0.9}
    weights, about = read_weights(tmp_path / BEST)
    assert about["step"] == 8
    assert all(torch.equal(value, at[8][name]) for name, value in weights.items())
    rows = {row["step"]: row for row in read_metrics(tmp_path / METRICS)}
    assert {step for step, row in rows.items() if "validation" in row} == set(scores)
    assert rows[12]["validation"] == {"score": 0.5, "pixels": 0.5}
    # Validation leaves no trace in what is learned, and a resumed run remembers the best.
    assert content(tmp_path)[METRICS] != b""
    undisturbed = run(tmp_path / "undisturbed")
    for name, value in trainer.module.state_dict().items():
        assert torch.equal(undisturbed.state_dict()[name], value)
    assert train(TinyTrainer(20), TinyData(), chosen, {}, validate, report=quiet) == best


def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    folder = tmp_path / "full"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        writes: list[Path] = []
        write = Path.write_bytes

        def third_fails(path: Path, data: bytes) -> int:
            writes.append(path)
            if len(writes) == 3:
                write(path, data[: len(data) // 2])
                full()
            return write(path, data)

        patched.setattr(Path, "write_bytes", third_fails)
        with pytest.raises(StoreError, match=rf"{CHECKPOINT}: the disk is full; free some space and run the same"):
            run(folder)
    assert read_checkpoint(folder / CHECKPOINT).step == 10
    assert not list(folder.glob(".tmp-*"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="the disk is full"):
            run(folder)
    resumed = run(folder)
    assert content(folder) == content(tmp_path / "whole")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    run(tmp_path, steps=5)
    path = tmp_path / CHECKPOINT
    good = path.read_bytes()
    chance = random.Random(0)
    for _ in range(40):
        place, bit = chance.randrange(len(good)), chance.randrange(8)
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
        with pytest.raises(StoreError, match=r"no checkpoint that training can go on from .*; delete it to begin anew"):
            run(tmp_path, steps=5)
    for wrong in (b"", good[:-1], good[:100], b"PK\3\4" * 50):
        path.write_bytes(wrong)
        with pytest.raises(StoreError, match="delete it to begin anew"):
            run(tmp_path, steps=5)
    path.write_bytes(good)
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 9}\n{"st')
    run(tmp_path, steps=5)
    assert (tmp_path / METRICS).read_text() == '{"step": 1}\n'


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    for module, name in ((torch, "save"), (torch, "load"), (pickle, "load"), (pickle, "dump")):
        monkeypatch.setattr(module, name, refused)
    run(tmp_path, steps=5)
    run(tmp_path, steps=5)
    with (tmp_path / CHECKPOINT).open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    assert json.loads(header["__metadata__"]["clipseed"])["step"] == 5
    assert {"weights/0.weight", "optimizer/exp_avg/0.weight", "optimizer/step/3.bias"} <= header.keys()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named(tmp_path: Path, workers: int) -> None:
    with pytest.raises(ImageError, match=r"^image-7.jpg: cannot be read$"):
        train(TinyTrainer(20), TinyData(broken=7), options(tmp_path, workers=workers), {}, report=quiet)


def test_one_run_in_a_folder(tmp_path: Path) -> None:
    process = start(tmp_path, "steps=4000", "report_every=1", "pause=0.01")
    wait_for_rows(tmp_path, 1, process)
    with pytest.raises(StoreError, match="another run is writing it"):
        run(tmp_path)
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "--steps 0: at least 1"),
        ({"batch": 0}, "--batch-size 0: at least 1"),
        ({"accumulate": 3}, "--batch-size 4: cannot be shared by 1 x 3 parts evenly"),
    ],
)
def test_impossible_options(tmp_path: Path, given: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    """Two processes under torchrun, with gloo, against one with the same total batch; and two that go on after one."""
    words = ("steps=20", "batch=8", "dropout=0.0")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    two, one = tmp_path / "two", tmp_path / "one"
    mixed = tmp_path / "mixed"

    class Stopping(TinyTrainer):
        def losses(self, batch: Any, step: int) -> Any:
            if step == 12:
                raise KeyboardInterrupt
            return super().losses(batch, step)

    with pytest.raises(Interrupted, match="holds step 10"):
        train(Stopping(20, dropout=0.0), TinyData(), options(mixed, batch=8), {"rate": 0.02}, report=quiet)
    run(one, batch=8, dropout=0.0)
    alone = read_metrics(one / METRICS)
    for folder in (two, mixed):
        line = [*torchrun, str(SCRIPT), str(folder), *words]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        together = read_metrics(folder / METRICS)
        assert [row["step"] for row in together] == list(range(1, 21))
        for expected, row in zip(alone, together, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
            assert row["right"] == pytest.approx(expected["right"], abs=1e-5)
            assert row["gradient"] == pytest.approx(expected["gradient"], rel=1e-3)
        weights = read_checkpoint(folder / CHECKPOINT).weights
        for name, value in read_checkpoint(one / CHECKPOINT).weights.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
    assert done.stderr.count("going on after step 10 of 20") == 1  # one process talks
    line[-3:] = ["steps=20", "batch=7", "dropout=0.0"]
    refused = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert "--batch-size 7: cannot be shared by 2 processes evenly" in refused.stderr


def test_memory_formats_survive(tmp_path: Path) -> None:
    """Channels-last weights and their optimiser state come back laid out as they were, for the same rounding."""
    path = tmp_path / CHECKPOINT
    modules = [nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    optimizers = [torch.optim.AdamW(module.parameters()) for module in modules]
    modules[0](torch.randn(1, 3, 9, 9)).sum().backward()
    optimizers[0].step()
    checkpoints.save_checkpoint(path, 1, {}, None, modules[0], optimizers[0])
    checkpoints.restore(read_checkpoint(path), modules[1], optimizers[1], path)
    for key, value in optimizers[0].state[modules[0].weight].items():
        again = optimizers[1].state[modules[1].weight][key]
        assert torch.equal(again, value)
        assert again.stride() == value.stride()
    assert modules[1].weight.stride() == modules[0].weight.stride()


def test_leftovers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "predictions").mkdir(parents=True)
    for path in (tmp_path / ".tmp-1-checkpoint.safetensors", tmp_path / "predictions" / ".tmp-1-a.png"):
        path.touch()
    run(tmp_path)
    assert [path.name for path in tmp_path.rglob(".tmp-*")] == [".tmp-1-a.png"]  # not the loop's
