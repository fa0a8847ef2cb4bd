"""What WeCLIP learns on the built-in world, and what its parts are worth: writes docs/results-weclip.md.

``make results-weclip``, or ``python tools/results_weclip.py``. Everything is trained on the first scenes of the toy's
``train`` split, for equally many steps, and scored on the 300 held-out scenes. Runs are kept: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.data.toy.dataset import TRAIN_SEED, toy_mask
from clipseed.evaluate.confusion import confusion, score
from clipseed.jobs.cam import CamOptions, run_cam
from clipseed.jobs.crf import CrfOptions, run_crf
from clipseed.jobs.evaluate import EvaluateOptions, evaluate
from clipseed.jobs.predict import PredictOptions, run_predict
from clipseed.jobs.refine import RefineOptions, run_refine
from clipseed.jobs.train_weclip import TrainWeclipOptions, run_train_weclip
from clipseed.runtime.run import RunOptions
from clipseed.store.toy_devkit import save_devkit
from clipseed.train.checkpoint import read_checkpoint
from clipseed.train.inference import ViewOptions, shown
from clipseed.train.loop import CHECKPOINT, Status
from clipseed.train.metrics import read_metrics
from clipseed.train.segmenter import load_segmenter
from clipseed.train.weclip.affinity import token_affinity
from clipseed.train.weclip.frozen import pixels_of, see
from clipseed.train.weclip.labels import strongest
from clipseed.train.weclip.network import WeclipNetwork
from clipseed.train.weclip.pseudo_scores import pseudo_scores

ROOT = Path(__file__).resolve().parent.parent
CPU = RunOptions(device="cpu", overwrite=True)
LABELLED = 100
"""Scenes whose pseudo-labels are scored."""


class Study:
    """Trains, predicts and scores; each run once."""

    def __init__(self, folder: Path, scenes: int, steps: int, held_out: int | None) -> None:
        self.folder, self.scenes, self.steps, self.held_out = folder, scenes, steps, held_out

    def train(
        self, name: str, seed: int = 0, tell: Callable[[Status], None] = lambda status: None, **given: Any
    ) -> Path:
        """A segmenter; options are those of :class:`TrainWeclipOptions`."""
        out = self.folder / f"{name}-{seed}.safetensors"
        options = TrainWeclipOptions(
            data=DatasetOptions("toy", split="train", limit=self.scenes), out=out, steps=self.steps, seed=seed,
            device=torch.device("cpu"), **given,
        )  # fmt: skip
        run_train_weclip(options, tell, log)
        log(f"{out}: {self.steps} steps")
        return out

    def score(self, segmenter: Path, *, crf: bool = False, limit: int | None = None) -> float:
        """mIoU in percent on the held-out scenes."""
        out = segmenter.with_name(f"{segmenter.stem}{'-crf' if crf else ''}-{limit or 'all'}")
        data = DatasetOptions("toy", limit=limit or self.held_out)
        run_predict(PredictOptions(segmenter, data, out, crf=crf, run=RunOptions(device="cpu")))
        return 100 * evaluate(EvaluateOptions(out)).scores.miou

    def labels(self, split: str, limit: int | None) -> dict[str, Path]:
        """CAM, CAA and CRF of a split."""
        made = {name: self.folder / f"{split}-{name}" for name in ("cams.h5", "caa.h5", "crf")}
        data = DatasetOptions("toy", split=split, limit=limit)
        if not (made["crf"] / "manifest.json").exists():
            run_cam(CamOptions(data, made["cams.h5"], run=CPU))
            run_refine(RefineOptions("caa", made["cams.h5"], made["caa.h5"], run=CPU))
            run_crf(CrfOptions(made["caa.h5"], made["crf"], run=CPU))
        return made

    def pseudo_labels(self, segmenter: Path, scenes: int, at: Path | None = None) -> tuple[float, float]:
        """mIoU of the pseudo-labels of held-out scenes, with the mean attention and with the refinement module.

        ``at``: a checkpoint of the same run, whose decoder is taken.
        """
        loaded = load_segmenter(segmenter, device="cpu")
        network = loaded.network
        assert isinstance(network, WeclipNetwork)
        if at is not None:
            network.decoder.load_state_dict(read_checkpoint(at).weights)
        text, options, tower = network.clip.encode_text(loaded.vocabulary), network.options, network.clip.tower
        images = open_dataset(DatasetOptions("toy", limit=scenes))
        classes = len(loaded.classes) + 1
        counts = [np.zeros((classes, classes), np.int64) for _ in range(2)]
        for sample in images.samples:
            image, labels = images.reader(sample), [sample.labels or ()]
            truth = toy_mask(0, sample.id)
            with torch.inference_mode():
                pixels = pixels_of(tower, shown(image, tower.patch, ViewOptions())[None], network.statistics)
                for place, layers in enumerate((options.static_layers, options.rfm_layers)):
                    seen = see(tower, text, pixels, labels, layers, released=options.released)
                    affinity = token_affinity(network.decoder.fuse(seen.levels)) if place else None
                    scores = pseudo_scores(seen.cams, seen.attention, affinity, pixels, options, truth.shape)
                    counts[place] += confusion(truth, strongest(scores, labels)[0].numpy(), classes)
        static, confirmed = (100 * score(matrix).miou for matrix in counts)
        return static, confirmed


def log(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def over_steps(study: Study) -> list[str]:
    """Decoder and pseudo-labels while a decoder learns: runs of different lengths would have other learning rates."""
    marks = sorted({study.steps * k // 4 for k in range(1, 5)})
    held = study.held_out or 300
    folder = study.folder / "curve-0-training"

    def kept(mark: int) -> Path:
        return folder / f"at-{mark}.safetensors"

    def keep(status: Status) -> None:
        if status.step in marks:
            shutil.copyfile(folder / CHECKPOINT, kept(status.step))

    out = study.train("curve", tell=keep, val="held-out", val_every=marks[0], val_limit=held, keep_every=marks[0])
    rows = [
        "| step | mIoU | pseudo-labels, mean attention | pseudo-labels, refinement module | segmentation loss "
        "| affinity loss | affinities above 0.99 |",
        "| --- " * 7 + "|",
    ]
    metrics = read_metrics(folder / "metrics.jsonl")
    for mark in marks:
        last = [row for row in metrics if mark - marks[0] // 2 < row["step"] <= mark]
        means = [statistics.mean(row[name] for row in last) for name in ("segmentation", "affinity", "saturated")]
        found = 100 * next(row["validation"]["score"] for row in last if "validation" in row)
        static, confirmed = study.pseudo_labels(out, min(LABELLED, held), kept(mark))
        rows.append(
            f"| {mark} | {found:.1f} | {static:.1f} | {confirmed:.1f} | {means[0]:.2f} | {means[1]:.2f} "
            f"| {100 * means[2]:.0f} % |"
        )
    return rows


def parts(study: Study, seeds: Sequence[int]) -> tuple[list[str], dict[str, list[float]]]:
    """The table of what is left out, and the scores behind it."""
    variants: Mapping[str, dict[str, Any]] = {
        "WeCLIP": {},
        "without the refinement module": {"constants": {"rfm_from": study.steps}},
        "refinement module from the first step": {"constants": {"rfm_from": 0}},
        "without PAR": {"constants": {"par_iterations": 0}},
        "without the affinity loss": {"constants": {"affinity_weight": 0.0}},
        "fully supervised": {"masks": f"toy:{TRAIN_SEED}"},
        "on CAM + CAA + CRF labels (two stages)": {"masks": str(study.labels("train", study.scenes)["crf"])},
    }
    scores: dict[str, list[float]] = {}
    # Seed by seed: a study that is cut short has all rows.
    for seed in seeds:
        for number, (name, given) in enumerate(variants.items()):
            scores.setdefault(name, []).append(study.score(study.train(f"variant{number}", seed, **given)))
            log(f"{name}: {scores[name]}")
        scores.setdefault("WeCLIP + CRF", []).append(
            study.score(study.folder / f"variant0-{seed}.safetensors", crf=True)
        )
    rows = ["| trained | mIoU |", "| --- | --- |"]
    rows += [f"| {name} | {spread(found)} |" for name, found in scores.items()]
    return rows, scores


def example(study: Study) -> float:
    """The example's network on the same two-stage labels, for as many steps."""
    devkit, val = study.folder / "train-devkit", study.folder / "val-devkit"
    if not devkit.exists():
        save_devkit(devkit, TRAIN_SEED, study.scenes)
        save_devkit(val, count=study.held_out or 300)
    epochs = max(1, round(study.steps * 4 / study.scenes))
    out = study.folder / "example"
    line = [
        sys.executable, str(ROOT / "examples" / "train_segmenter.py"), "--images", str(devkit / "JPEGImages"),
        "--masks", str(study.labels("train", study.scenes)["crf"]), "--classes", "toy", "--crop", "192",
        "--batch-size", "4", "--epochs", str(epochs), "--val-images", str(val / "JPEGImages"), "--out", str(out),
        "--device", "cpu",
    ]  # fmt: skip
    subprocess.run(line, check=True, cwd=ROOT)
    found = evaluate(EvaluateOptions(out / "predictions", gt=str(val / "SegmentationClass"), classes="toy"))
    return 100 * found.scores.miou


def spread(values: Sequence[float]) -> str:
    """Mean, and the range over seeds."""
    mean = statistics.mean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/results-weclip"), help="working folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where results-weclip.md goes")
    parser.add_argument("--scenes", type=int, default=300, help="of the train split")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, help="only the first held-out scenes, to try it out")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.work.mkdir(parents=True, exist_ok=True)
    study = Study(chosen.work, chosen.scenes, chosen.steps, chosen.held_out)
    rows, scores = parts(study, range(chosen.seeds))
    first = study.folder / "variant0-0.safetensors"
    static, confirmed = study.pseudo_labels(first, min(LABELLED, chosen.held_out or LABELLED))
    held = study.labels("held-out", chosen.held_out)
    caa = evaluate(EvaluateOptions(held["caa.h5"]))
    crf = evaluate(EvaluateOptions(held["crf"]))
    labels = [
        "| labels of the held-out scenes, their classes given | mIoU |", "| --- | --- |",
        f"| CAM + CAA, best threshold | {100 * caa.scores.miou:.1f} |",
        f"| CAM + CAA + CRF | {100 * crf.scores.miou:.1f} |",
        f"| WeCLIP's, mean attention ({LABELLED} scenes) | {static:.1f} |",
        f"| WeCLIP's, refinement module with the trained decoder ({LABELLED} scenes) | {confirmed:.1f} |",
    ]  # fmt: skip
    rows.append(f"| the example's small network on CAM + CAA + CRF labels | {example(study):.1f} |")
    text = (Path(__file__).parent / "results-weclip.in.md").read_text(encoding="utf-8")
    sections = {
        "LABELS": labels, "PARTS": rows, "STEPS": over_steps(study), "SCENES": [str(chosen.scenes)],
        "COUNT": [str(chosen.steps)],
    }  # fmt: skip
    for key, lines in sections.items():
        text = text.replace(f"@{key}@", "\n".join(lines))
    (chosen.out / "results-weclip.md").write_text(text, encoding="utf-8")
    (chosen.work / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
