"""Train the tiny SAM that ships with clipseed: ``python -m tools.toy.train_sam --out runs/toy-sam``.

segment_anything's own modules with small sizes, taught on scenes that are drawn as they are needed. An image's number
fixes the image and its prompts, so a run that was interrupted goes on where its last checkpoint stands, and no
image is seen twice. docs/toy.md describes the recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipseed.data.toy.world import lay_out
from clipseed.sam.architecture import SamConfig, save_sam
from clipseed.train import loop
from clipseed.train.loop import LoopOptions
from tools.toy.sam_objective import Lesson, some_cells, step_losses
from tools.toy.sam_start import CONFIG, CellHead, build, sharpen
from tools.toy.sam_targets import boxes, several_points, single_points, view

FIRST_SEED = 5000
"""Training scenes come from this seed; the scored ones from seed 0, those of the tiny CLIP from 1000 to 1005."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn.

    Attributes:
        steps: Optimiser steps.
        batch: Images per step.
        rate: Learning rate; it rises over ``warm_up`` steps, stays, and falls to 0 over the last 60 % of them.
        points, others: Prompts per image: single points, and either several points each or boxes.
        kinship, cells: Weight of the kinship loss at the start, from where it falls to 0; cells per image for it.
        balanced: Steps with balanced cross-entropy alone; over as many again, plain cross-entropy and dice replace it.
    """

    steps: int = 3700
    batch: int = 4
    rate: float = 1e-3
    warm_up: int = 50
    points: int = 4
    others: int = 4
    kinship: float = 1.0
    cells: int = 480
    balanced: int = 300

    def rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        return self.rate * min(1.0, (step + 1) / self.warm_up, (self.steps - step) / (0.6 * self.steps))

    def balance_at(self, step: int) -> float:
        """How far the cross-entropy is balanced at a step; the weight of dice is what is missing to 1."""
        return min(1.0, max(0.0, 2 - step / self.balanced))

    def kinship_at(self, step: int) -> float:
        """Weight of the kinship loss at a step."""
        return self.kinship * (1 - step / self.steps)


def lesson(number: int, config: SamConfig, plan: Plan) -> Lesson:
    """Training image ``number`` and what is asked about it."""
    rng = np.random.default_rng([FIRST_SEED, number, 3])
    shown = view(lay_out(FIRST_SEED, number), config.image_size, rng)
    other = several_points if rng.random() < 0.35 else boxes
    prompts = (single_points(shown, rng, plan.points), other(shown, rng, plan.others))
    return Lesson(shown, prompts, some_cells(shown, rng, plan.cells, config.patch_size))


class Lessons:
    """All training images, drawn when they are asked for. Each has a number of its own and is seen once."""

    def __init__(self, config: SamConfig, plan: Plan) -> None:
        self._config, self._plan = config, plan

    def __len__(self) -> int:
        return self._plan.steps * self._plan.batch

    def sample(self, index: int, seed: int) -> Lesson:
        """Image ``index``; its number alone decides it."""
        return lesson(index, self._config, self._plan)

    def collate(self, samples: Sequence[Lesson]) -> list[Lesson]:
        """Images differ in size, so a batch is a list."""
        return list(samples)


class SamTrainer:
    """The model, and a head that only training has."""

    def __init__(self, config: SamConfig, plan: Plan) -> None:
        self._plan = plan
        self.sam, self._head = build(config), CellHead(config.out_chans)
        self.module = torch.nn.ModuleDict({"sam": self.sam, "head": self._head})

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW; only matrices decay."""
        learned = list(self.module.parameters())
        decayed = [value for value in learned if value.ndim >= 2]
        others = [value for value in learned if value.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self._plan.rate, betas=(0.9, 0.98))

    def schedule(self, step: int) -> float:
        """See :class:`Plan`."""
        return self._plan.rate_at(step) / self._plan.rate

    def losses(self, batch: list[Lesson], step: int) -> dict[str, Tensor]:
        """Masks, their IoU, and kinship, weighted by how far training is."""
        balance = self._plan.balance_at(step)
        found = step_losses(self.sam, self._head, batch, balance)
        kinship = self._plan.kinship_at(step) * found["kinship"]
        return {"loss": found["cross"] + (1 - balance) * found["dice"] + found["iou"] + kinship, **found}


def train(folder: Path, plan: Plan, config: SamConfig = CONFIG, keep_every: int = 100) -> Any:
    """Train, or go on with the checkpoint in ``folder``; returns the model."""
    trainer = SamTrainer(config, plan)
    options = LoopOptions(
        folder, plan.steps, plan.batch, clip=1.0, keep_every=keep_every, report_every=100, seed=FIRST_SEED
    )
    loop.train(trainer, Lessons(config, plan), options, {"plan": asdict(plan), "config": asdict(config)})
    return trainer.sam


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and write ``sam.npz``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Plan.steps, help="optimiser steps, to try it out")
    chosen = parser.parse_args(arguments)
    sam = train(chosen.out, Plan(steps=chosen.steps))
    save_sam(chosen.out / "sam.npz", sharpen(sam), CONFIG)


if __name__ == "__main__":
    main()
