"""What learned prompts are worth on the built-in world: writes docs/results-prompts.md.

``make results-prompts``, or ``python tools/results_prompts.py``. Hand-written words, prompts learned from labels, and
prompts learned from coarse pseudo-labels: each as CAM, after FMA-WSSS's CAA, and after seeding by SAM's segments.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clipseed.data.dataset import DatasetOptions
from clipseed.data.toy.dataset import TRAIN_SEED
from clipseed.data.toy.shapes import CLASS_NAMES
from clipseed.data.toy.world import lay_out
from clipseed.data.vocabulary import load_vocabulary
from clipseed.defaults import PromptTask
from clipseed.jobs.cam import CamOptions, run_cam
from clipseed.jobs.evaluate import EvaluateOptions, evaluate
from clipseed.jobs.refine import RefineOptions, run_refine
from clipseed.jobs.sam_masks import SamMasksOptions, run_sam_masks
from clipseed.jobs.sam_seed import SamSeedOptions, run_sam_seed
from clipseed.jobs.train_prompts import TrainPromptsOptions, run_train_prompts
from clipseed.pseudo.rules import RuleOptions
from clipseed.runtime.run import RunOptions
from clipseed.sam.options import FMA
from clipseed.store.toy_devkit import save_devkit

ROOT = Path(__file__).resolve().parent.parent
CPU = RunOptions(device="cpu", overwrite=True)
UNREAD = {
    "boat": "barque", "bottle": "phial", "cactus": "succulent", "car": "lorry", "cup": "beaker", "fish": "perch",
    "house": "barn", "kite": "dragon", "mushroom": "fungus", "star": "pentagram",
}  # fmt: skip
"""Words that are in no caption of the toy's training."""
LENGTH, RATE, FINE = 4, 0.01, 0.003
STAGES = ("CAM", "CAA", "segments")


@dataclass(frozen=True)
class Study:
    """Learns, makes seeds, and scores them."""

    folder: Path
    scenes: int
    held_out: int
    steps: int
    points: int

    def classes(self, known: bool) -> str:
        """A class list."""
        if known:
            return "toy"
        path = self.folder / "unread.yaml"
        words = [{"name": name, "text": UNREAD[name]} for name in CLASS_NAMES]
        background = list(load_vocabulary("toy").background)
        path.write_text(json.dumps({"name": "toy", "classes": words, "background": background}), encoding="utf-8")
        return str(path)

    def data(self, known: bool, split: str, limit: int) -> DatasetOptions:
        """Scenes of a split."""
        return DatasetOptions("toy", split=split, limit=limit, classes=self.classes(known))

    def segments(self, split: str, limit: int) -> Path:
        """SAM's segments, made once."""
        out = self.folder / f"segments-{split}.h5"
        if not out.exists():
            grid = replace(FMA, points_per_side=self.points, crop_layers=0)
            run_sam_masks(SamMasksOptions(out, self.data(True, split, limit), proposals=grid, run=CPU))
            log(f"{out}")
        return out

    def learn(self, name: str, task: PromptTask, data: DatasetOptions, rate: float, seed: int, **given: Any) -> Path:
        """Learned prompts."""
        out = self.folder / f"{name}.safetensors"
        constants = {
            "sharing": "class", "position": "end", "length": LENGTH, "nameless": None, "lr": rate, "warm_up": 5,
            "deviation": 0.015, "relative": task == "segmentation",
        }  # fmt: skip
        run_train_prompts(
            TrainPromptsOptions(
                data=data, out=out, task=task, steps=self.steps, cache=True, constants=constants, seed=seed,
                context_seed=seed, weights="toy", overwrite=True, **given,
            ),
            lambda status: None, lambda line: None,
        )  # fmt: skip
        return out

    def seeds(self, name: str, known: bool, split: str, prompts: Path | None, stage: str) -> dict[str, float]:
        """mIoU of CAM, CAA and segment seeds of a split; the last are left in ``NAME-SPLIT``."""
        limit = self.scenes if split == "train" else self.held_out
        cams, refined, out = (self.folder / f"{name}-{split}{end}" for end in (".h5", "-caa.h5", ""))
        data = self.data(known, split, limit)
        if prompts is not None:
            data = DatasetOptions("toy", split=split, limit=limit)
        run_cam(CamOptions(data, cams, prompts=prompts, raw=True, run=CPU))
        preset: Any = f"fma-voc-{stage}"
        run_refine(RefineOptions("caa", cams, refined, preset=preset, run=CPU))
        rules = RuleOptions("fma", preset=f"voc-{stage}")  # type: ignore[arg-type]
        run_sam_seed(SamSeedOptions(refined, self.segments(split, limit), out, rules=rules, run=CPU))
        places = dict(zip(STAGES, (cams, refined, out), strict=True))
        return {stage: 100 * evaluate(EvaluateOptions(path)).scores.miou for stage, path in places.items()}

    def chain(self, known: bool, seed: int) -> dict[str, dict[str, float]]:
        """Words, prompts from labels, prompts from coarse seeds."""
        tag = f"{'known' if known else 'unread'}-{seed}"
        train = self.data(known, "train", self.scenes)
        coarse = self.learn(f"{tag}-coarse", "classification", train, RATE, seed)
        found = {"learned from labels": self.seeds(f"{tag}-coarse", known, "held-out", coarse, "coarse")}
        self.seeds(f"{tag}-coarse", known, "train", coarse, "coarse")
        masks = str(self.folder / f"{tag}-coarse-train")
        fine = self.learn(f"{tag}-fine", "segmentation", train, FINE, seed, seeds=masks, init=coarse)
        found["learned from coarse seeds"] = self.seeds(f"{tag}-fine", known, "held-out", fine, "fine")
        return found

    def cam_score(self, name: str, prompts: Path) -> float:
        """mIoU of CAMs of the held-out scenes."""
        out = self.folder / f"{name}-cam.h5"
        run_cam(CamOptions(DatasetOptions("toy", limit=self.held_out), out, prompts=prompts, run=CPU))
        return 100 * evaluate(EvaluateOptions(out)).scores.miou

    def scrambled(self, seed: int) -> float:
        """Prompts from labels that were dealt to other scenes."""
        kit = self.folder / "kit"
        if not kit.exists():
            save_devkit(kit, TRAIN_SEED, self.scenes)
        rows = [lay_out(TRAIN_SEED, k).labels for k in range(self.scenes)]
        random.Random(seed).shuffle(rows)
        path = self.folder / f"scrambled-{seed}.json"
        names = {f"toy_{k:06d}": [CLASS_NAMES[label] for label in row] for k, row in enumerate(rows)}
        path.write_text(json.dumps(names), encoding="utf-8")
        data = DatasetOptions("folder", images=kit / "JPEGImages", labels=path, classes=self.classes(False))
        return self.cam_score(f"scrambled-{seed}", self.learn(f"scrambled-{seed}", "classification", data, RATE, seed))


def log(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def spread(values: Sequence[float]) -> str:
    """Mean, and the range over seeds."""
    mean = statistics.mean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})"


def table(study: Study, known: bool, seeds: int) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Rows of a class list, and their means."""
    name = f"{'known' if known else 'unread'}-words"
    runs = {"hand-written words": [study.seeds(name, known, "held-out", None, "coarse")]}
    for seed in range(seeds):
        for row, found in study.chain(known, seed).items():
            runs.setdefault(row, []).append(found)
        log(f"{name}, seed {seed}: {runs}")
    lines = [f"| prompts | {' | '.join(STAGES)} |", "| --- | --- | --- | --- |"]
    for row, found in runs.items():
        lines.append(f"| {row} | {' | '.join(spread([scores[stage] for scores in found]) for stage in STAGES)} |")
    means = {row: {s: statistics.mean(one[s] for one in found) for s in STAGES} for row, found in runs.items()}
    return lines, means


def gates(means: dict[str, dict[str, float]], title: str) -> list[str]:
    """What was to hold, and whether it does."""
    words, coarse, fine = means.values()
    lines = []
    for stage in STAGES:
        holds = fine[stage] >= coarse[stage] >= words[stage]
        values = f"{fine[stage]:.1f}, {coarse[stage]:.1f}, {words[stage]:.1f}"
        lines.append(f"- {title}, {stage}: fine >= coarse >= words: {'holds' if holds else 'FAILS'} ({values})")
    gain = fine["CAM"] - words["CAM"]
    lines.append(f"- {title}, CAM: fine >= words + 2: {'holds' if gain >= 2 else 'FAILS'} ({gain:+.1f})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/results-prompts"), help="working folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where results-prompts.md goes")
    parser.add_argument("--scenes", type=int, default=200, help="of the train split")
    parser.add_argument("--labels", type=int, default=2000, help="scenes with the most labels")
    parser.add_argument("--points", type=int, default=12, help="of SAM's grid along a side")
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.work.mkdir(parents=True, exist_ok=True)
    study = Study(chosen.work.resolve(), chosen.scenes, chosen.held_out, chosen.steps, chosen.points)
    unknown, means = table(study, False, chosen.seeds)
    counts = sorted({min(count, chosen.labels) for count in (50, 200, chosen.labels)})
    rows = ["| labels of | CAM |", "| --- | --- |"]
    for count in counts:
        data = study.data(False, "train", count)
        scores = [
            study.cam_score(f"labels-{count}", study.learn(f"labels-{count}", "classification", data, RATE, seed))
            for seed in range(chosen.seeds)
        ]
        rows.append(f"| {count} scenes | {spread(scores)} |")
        log(rows[-1])
    scrambled = [study.scrambled(seed) for seed in range(chosen.seeds)]
    rows.append(f"| {chosen.scenes} scenes, scrambled | {spread(scrambled)} |")
    log(rows[-1])
    known, own = table(study, True, chosen.seeds)
    helped = statistics.mean(scrambled) - means["hand-written words"]["CAM"]
    judged = [
        *gates(means, "unread words"), *gates(own, "own words"),
        f"- scrambled labels do not help: {'holds' if helped <= 2 else 'FAILS'} ({helped:+.1f} beside the words)",
    ]  # fmt: skip
    text = (Path(__file__).parent / "results-prompts.in.md").read_text(encoding="utf-8")
    sections: dict[str, Sequence[str]] = {
        "UNKNOWN": unknown, "KNOWN": known, "LABELS": rows, "GATES": judged, "LENGTH": [str(LENGTH)],
        "RATE": [str(RATE)], "FINE": [str(FINE)], "STEPS": [str(chosen.steps)], "SCENES": [str(chosen.scenes)],
        "POINTS": [str(chosen.points)], "HELD": [str(chosen.held_out)], "SEEDS": [str(chosen.seeds)],
    }  # fmt: skip
    for key, lines in sections.items():
        text = text.replace(f"@{key}@", "\n".join(lines))
    (chosen.out / "results-prompts.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
