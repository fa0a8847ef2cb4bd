"""Train the tiny SAM that ships with clipseed: ``python -m tools.toy.train_sam --out runs/toy-sam``.

segment_anything's own modules with small sizes, taught on scenes that are drawn as they are needed. A picture's number
fixes the picture and its prompts, so a run that was interrupted goes on where its last checkpoint stands, and no
picture is seen twice. docs/toy.md describes the recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipseed.sam.architecture import SamConfig, save_sam
from clipseed.toy.world import lay_out
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
        batch: Pictures per step.
        rate: Learning rate; it rises over ``warm_up`` steps, stays, and falls to 0 over the last 60 % of them.
        points, others: Prompts per picture: single points, and either several points each or boxes.
        kinship, cells: Weight of the kinship loss at the start, from where it falls to 0; cells per picture for it.
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
    """Training picture ``number`` and what is asked about it."""
    rng = np.random.default_rng([FIRST_SEED, number, 3])
    shown = view(lay_out(FIRST_SEED, number), config.image_size, rng)
    other = several_points if rng.random() < 0.35 else boxes
    prompts = (single_points(shown, rng, plan.points), other(shown, rng, plan.others))
    return Lesson(shown, prompts, some_cells(shown, rng, plan.cells, config.patch_size))


def train(folder: Path, plan: Plan, config: SamConfig = CONFIG, keep_every: int = 100) -> Any:
    """Train, or go on with the checkpoint in ``folder``; progress goes to stderr and ``curve.jsonl``."""
    sam = build(config)
    head = CellHead(config.out_chans)
    learned = [*sam.parameters(), *head.parameters()]
    decayed = [value for value in learned if value.ndim >= 2]
    others = [value for value in learned if value.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.98))
    kept = folder / "checkpoint.pt"
    first = 0
    if kept.exists():
        saved = torch.load(kept, weights_only=True)
        sam.load_state_dict(saved["state"])
        head.load_state_dict(saved["head"])
        optimiser.load_state_dict(saved["optimiser"])
        first = saved["step"]
    recent: list[dict[str, float]] = []
    began = time.perf_counter()
    for step in range(first, plan.steps):
        for group in optimiser.param_groups:
            group["lr"] = plan.rate_at(step)
        numbers = range(step * plan.batch, (step + 1) * plan.batch)
        balance = plan.balance_at(step)
        found = step_losses(sam, head, [lesson(number, config, plan) for number in numbers], balance)
        optimiser.zero_grad(set_to_none=True)
        total = found["cross"] + (1 - balance) * found["dice"] + found["iou"] + plan.kinship_at(step) * found["kinship"]
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        recent.append({name: value.item() for name, value in found.items()})
        done = step + 1
        if done % keep_every == 0 or done == plan.steps:
            row: dict[str, Any] = {"step": done, "of": plan.steps}
            row["images_per_second"] = round(plan.batch * (done - first) / (time.perf_counter() - began), 2)
            row |= {name: round(float(np.mean([one[name] for one in recent])), 4) for name in recent[0]}
            _record(folder, row)
            recent = []
            states = {"state": sam.state_dict(), "head": head.state_dict(), "optimiser": optimiser.state_dict()}
            _keep(kept, {**states, "step": done})
    return sam


def _record(folder: Path, row: dict[str, Any]) -> None:
    with (folder / "curve.jsonl").open("a") as curve:
        curve.write(json.dumps(row) + "\n")
    sys.stderr.write(" ".join(f"{key}={value}" for key, value in row.items()) + "\n")


def _keep(path: Path, saved: dict[str, Any]) -> None:
    """Write a checkpoint so that an interruption leaves the old one or the new one."""
    fresh = path.with_suffix(".new")
    torch.save(saved, fresh)
    fresh.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and write ``sam.npz``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Plan.steps, help="optimiser steps, to try it out")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    sam = train(chosen.out, Plan(steps=chosen.steps))
    save_sam(chosen.out / "sam.npz", sharpen(sam), CONFIG)


if __name__ == "__main__":
    main()
