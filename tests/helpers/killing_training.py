"""Kills a training run at random moments, again and again; run by test_loop.py in a process of its own.

Everything is imported once and each run is a fork of that state, so that kills hit the run and not its imports. Usage:
``-m helpers.killing_training FOLDER KILLS SEED``. Prints one line per kill: the step of the checkpoint that it left.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

import safetensors.torch  # noqa: E402, F401
from torch.utils.data import DataLoader  # noqa: E402

from clipseed.train.checkpoint import read_checkpoint  # noqa: E402
from clipseed.train.loop import CHECKPOINT  # noqa: E402
from clipseed.train.metrics import METRICS, read_metrics  # noqa: E402

from helpers.tiny_training import main  # noqa: E402

WORDS = ("steps=60", "keep_every=7", "report_every=3", "pause=0.004")


def fork(folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os._exit(main([str(folder), *WORDS]))


def finished(child: int) -> bool:
    done, status = os.waitpid(child, os.WNOHANG)
    assert not done or os.waitstatus_to_exitcode(status) == 0
    return bool(done)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "lock"}


def import_all() -> None:
    """Make torch load what it loads late, short of a backward pass, after which it must not be forked."""
    value = torch.nn.Parameter(torch.zeros(1))
    value.grad = torch.zeros(1)
    torch.nn.utils.clip_grad_norm_([value], 1.0)
    torch.optim.AdamW([value]).step()
    next(iter(DataLoader([1])))


if __name__ == "__main__":
    import_all()
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    whole, broken = folder / "whole", folder / "broken"
    os.waitpid(fork(whole), 0)
    expected = content(whole)
    chance = random.Random(seed)
    count = rounds = 0
    while count < kills:
        # Moments are chosen by what the run has done, because a busy machine makes any clock meaningless.
        goal = len(read_metrics(broken / METRICS)) + chance.choice((-9, 0, 1, 3, 6, 12))
        child = fork(broken)
        ended = False
        while not (ended := finished(child)) and len(read_metrics(broken / METRICS)) < goal:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        if ended or finished(child):
            assert content(broken) == expected
            for path in broken.iterdir():
                path.unlink()
            rounds += 1
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        count += 1
        kept = broken / CHECKPOINT
        print(f"kill {count}: {read_checkpoint(kept).step if kept.exists() else 0}")
    os.waitpid(fork(broken), 0)
    assert content(broken) == expected
    assert [row["step"] for row in read_metrics(broken / METRICS)] == list(range(1, 61))
    print(f"{kills} kills in {rounds + 1} runs")
