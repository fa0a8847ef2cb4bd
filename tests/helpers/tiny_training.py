"""A training run that takes milliseconds, for the tests of the loop; run as a script, it is a program of its own.

``tiny_training.py FOLDER [name=value ...]`` trains into FOLDER, the values being those of ``LoopOptions``; besides
``rate``, and ``pause``: seconds that each step takes. It ends as the command line does: one line, and the exit code.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipseed.errors import ClipseedError, ImageError
from clipseed.train.data import Stacked
from clipseed.train.loop import LoopOptions, Status, say, train

IMAGES = 23


@dataclass
class TinyData(Stacked):
    """Vectors with a class, varied by the sample's seed."""

    broken: int | None = None

    def __len__(self) -> int:
        return IMAGES

    def sample(self, index: int, seed: int) -> tuple[Tensor, Tensor]:
        if index == self.broken:
            raise ImageError(f"image-{index}.jpg: cannot be read")
        target = index % 3
        noise = torch.randn(8, generator=torch.Generator().manual_seed(seed))
        return F.one_hot(torch.tensor(target), 8) + 0.3 * noise, torch.tensor(target)


class TinyTrainer:
    """Two layers with dropout, so that a step needs random numbers, and an unused parameter."""

    def __init__(self, steps: int, rate: float = 0.02, pause: float = 0.0, dropout: float = 0.2, poison: int = -1):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))
        self.module.register_parameter("unused", nn.Parameter(torch.ones(2)))
        self._steps, self._rate, self._pause, self._poison = steps, rate, pause, poison

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.module.parameters(), self._rate)

    def schedule(self, step: int) -> float:
        return 1 - step / self._steps

    def losses(self, batch: Any, step: int) -> dict[str, Tensor]:
        time.sleep(self._pause)
        vectors, targets = batch
        logits = self.module(vectors).float()
        loss = F.cross_entropy(logits, targets)
        if step == self._poison:
            loss = loss / 0
        return {"loss": loss, "right": (logits.argmax(dim=1) == targets).float().mean()}


def options(folder: Path, **given: Any) -> LoopOptions:
    return LoopOptions(folder, **{"steps": 20, "batch": 4, "keep_every": 5, **given})


def run(folder: Path, rate: float = 0.02, pause: float = 0.0, dropout: float = 0.2, **given: Any) -> nn.Module:
    """Train; returns the module."""
    chosen = options(folder, **given)
    trainer = TinyTrainer(chosen.steps, rate, pause, dropout)
    train(trainer, TinyData(), chosen, {"rate": rate}, report=quiet)
    return trainer.module


def quiet(_: Status) -> None:
    """No progress."""


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    given: dict[str, Any] = {}
    for word in words[1:]:
        name, value = word.split("=")
        given[name] = float(value) if "." in value else int(value)
    try:
        run(Path(words[0]), **given)
    except ClipseedError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
