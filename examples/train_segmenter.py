#!/usr/bin/env python
r"""Train a segmentation network on pseudo-labels with CLIP-ES's confidence-guided loss, and score it with clipseed.

    python examples/train_segmenter.py --images VOC2012/JPEGImages --masks pseudo --classes voc \
        --val-images VOC2012/JPEGImages --val-list VOC2012/ImageSets/Segmentation/val.txt \
        --gt VOC2012/SegmentationClass --network deeplabv3_resnet50 --backbone-weights resnet50.pth --out runs/segmenter

It starts from a folder of palette PNG masks (0 background, class index + 1, 255 ignore), as `clipseed crf` writes it.
To train something of your own, write a trainer like `Segmentation` below: a network, an optimiser, a schedule, and the
loss of a batch. `clipseed.train.loop` does the rest: the same command goes on where a killed run stopped and ends where
an undisturbed one would have; `torchrun --nproc-per-node 4 examples/train_segmenter.py ...` uses four GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipseed
from clipseed.data.images import read_image
from clipseed.data.listing import list_images, read_split
from clipseed.errors import ClipseedError, InputError
from clipseed.store.label_masks import write_label_mask
from clipseed.train import ConfidenceGuidedLoss
from clipseed.train.augment import Augmentation
from clipseed.train.loop import LoopOptions, say, train
from clipseed.train.pseudo_labels import PseudoLabels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's backbones were trained with these
SCALES = (0.5, 1.5)
NETWORKS = ("small", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50")


# 1. A network: from images (B, 3, H, W) to logits (B, C, h, w).


def convolution(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class SmallNetwork(nn.Module):
    """0.5 million parameters: convolutions to 1/8, parallel dilations, and a head at 1/4 that sees fine features again.

    The dilations reach across 200 pixels and a pooled branch sees everything, because a toy object (like a real one) is
    told by a small part and must be filled to its outline.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(convolution(3, 24, 2), convolution(24, 48, 2), convolution(48, 48))
        self.coarse = nn.Sequential(convolution(48, 96, 2), convolution(96, 96), convolution(96, 96))
        self.branches = nn.ModuleList(convolution(96, 48, dilation=step) for step in (1, 3, 6, 12))
        self.everything = nn.Linear(96, 48)
        self.merge = nn.Sequential(nn.Conv2d(4 * 48, 48, 1, bias=False), nn.BatchNorm2d(48))
        self.head = nn.Sequential(convolution(48 + 48, 48), nn.Conv2d(48, classes, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        fine = self.fine(pixels)
        coarse = self.coarse(fine)
        context = self.merge(torch.cat([branch(coarse) for branch in self.branches], dim=1))
        context = F.relu(context + self.everything(coarse.mean(dim=(2, 3)))[:, :, None, None])
        context = F.interpolate(context, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(torch.cat([context, fine], dim=1))


class Logits(nn.Module):
    """A torchvision segmentation network without its dictionary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)["out"]


def build_network(name: str, classes: int, backbone_weights: Path | None = None) -> nn.Module:
    """One of ``NETWORKS``; its backbone from a file of torchvision's classifier of the same name."""
    if name == "small":
        return SmallNetwork(classes)
    from torchvision.models import segmentation

    network = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=classes)
    if backbone_weights is not None:
        try:
            state = torch.load(backbone_weights, map_location="cpu", weights_only=True)
            kept = {key: value for key, value in state.items() if not key.startswith(("fc.", "classifier."))}
            network.backbone.load_state_dict({key.removeprefix("features."): value for key, value in kept.items()})
        except (OSError, RuntimeError, AttributeError, UnpicklingError) as error:
            text = str(error).strip().splitlines()[0]
            raise InputError(f"{backbone_weights}: not torchvision's weights for {name} ({text})") from error
    return Logits(network)


# 2. A trainer: what is learned, how fast, and from what error.


class Segmentation:
    """A network under the confidence-guided loss; the learning rate falls polynomially."""

    def __init__(self, network: nn.Module, rate: float, steps: int, loss: nn.Module) -> None:
        self.module = network.to(memory_format=torch.channels_last)  # convolutions are several times faster
        self.rate, self.steps, self.loss = rate, steps, loss

    def optimizer(self) -> torch.optim.Optimizer:
        # Plain SGD as in DeepLab, which starts from a trained backbone; the small network starts from nothing.
        if isinstance(self.module, SmallNetwork):
            return torch.optim.AdamW(self.module.parameters(), self.rate, weight_decay=1e-2)
        return torch.optim.SGD(self.module.parameters(), self.rate, momentum=0.9, weight_decay=5e-4)

    def schedule(self, step: int) -> float:
        return (1 - step / self.steps) ** 0.9

    def losses(self, batch: tuple[Tensor, ...], step: int) -> dict[str, Tensor]:
        pixels, labels, *confidence = batch
        logits = self.module(normalized(pixels))
        return {"loss": self.loss(logits.float(), labels, *confidence)}


def normalized(pixels: Tensor) -> Tensor:
    """Bytes (B, 3, H, W) to what the network sees."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


# 3. The data, the loop, predictions, and a score.


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    torch.manual_seed(options.seed)
    classes = len(clipseed.load_vocabulary(options.classes).class_names)
    around = tuple(round(255 * value) for value in MEAN)
    data = PseudoLabels(options.images, options.masks, Augmentation(options.crop, SCALES, fill=around), options.soft)
    if len(data) < options.batch_size:
        raise InputError(f"{options.masks}: {len(data)} masks do not fill one batch of {options.batch_size}")
    images = to_predict(options.val_images, options.val_list)
    network = build_network(options.network, classes + 1, options.backbone_weights)
    epoch = len(data) // options.batch_size
    steps = options.epochs * epoch
    device = torch.device(options.device)
    say(f"{options.network} on {len(data)} images with pseudo-labels, {device}")
    train(
        Segmentation(network, options.lr, steps, ConfidenceGuidedLoss(options.confidence)),
        data,
        LoopOptions(
            options.out, steps, options.batch_size, seed=options.seed, device=device, workers=options.workers,
            bfloat16=device.type == "cuda", keep_every=epoch, report_every=epoch, init=options.init,
        ),
        settings={
            "data": data.digest(), "network": options.network, "classes": options.classes, "crop": options.crop,
            "confidence": options.confidence if options.soft else None, "lr": options.lr,
            "backbone_weights": options.backbone_weights and options.backbone_weights.name,
        },
    )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":  # one process is enough for the rest
        predict(network, images, options.out / "predictions", device)
        if options.gt is not None:
            evaluate(options)


def to_predict(folder: Path, split: Path | None) -> dict[str, Path]:
    images = list_images(folder)
    if split is None:
        return images
    listed = read_split(split)
    if missing := [identifier for identifier in listed if identifier not in images]:
        raise InputError(f"{split}: no image for {len(missing)} of its ids: {missing[0]} …")
    return {identifier: images[identifier] for identifier in listed}


@torch.inference_mode()
def predict(network: nn.Module, images: dict[str, Path], folder: Path, device: torch.device) -> None:
    """Write the network's mask of every image, at the image's size, in place of earlier ones."""
    network.eval()
    shutil.rmtree(folder, ignore_errors=True)
    for identifier, path in images.items():
        pixels = torch.from_numpy(np.asarray(read_image(path)).copy()).permute(2, 0, 1)[None].to(device)
        logits = F.interpolate(network(normalized(pixels)), size=pixels.shape[-2:], mode="bilinear")
        target = folder / f"{identifier}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_label_mask(target, logits[0].argmax(dim=0).byte().cpu().numpy())
    say(f"{folder}: {len(images)} predicted masks")


def evaluate(options: argparse.Namespace) -> None:
    """Run `clipseed evaluate` on the predictions; print the command and the mean IoU."""
    words = ["evaluate", str(options.out / "predictions"), "--gt", str(options.gt), "--classes", options.classes]
    if options.val_list is not None:
        words += ["--split", str(options.val_list)]
    print("clipseed", shlex.join(words), flush=True)
    command = [sys.executable, "-m", "clipseed", *words, "--json", "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    scores: dict[str, Any] = json.loads(done.stdout)
    print(f"mIoU {100 * scores['miou']:.2f} % on {scores['images']} images")


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder with the training images (others may lie there, too)")
    add("--masks", type=Path, required=True, help="pseudo-labels, PNG: 0 background, class index + 1, 255 ignore")
    add("--soft", type=Path, help="CAMs (.h5) whose scores say where the masks are sure; else only 255 is left out")
    add("--confidence", type=float, default=0.95, help="with --soft: least score that counts [%(default)s]")
    add("--classes", default="voc", help="voc, coco, toy or a file, as for clipseed [%(default)s]")
    add("--val-images", type=Path, required=True, help="folder with the images to predict")
    add("--val-list", type=Path, help="only these of them: a file with one id per line")
    add("--gt", type=Path, help="ground-truth masks of these images; without it nothing is scored")
    add("--network", choices=NETWORKS, default="small", help="small learns the toy set on a CPU [%(default)s]")
    add("--backbone-weights", type=Path,
        help="torchvision's ImageNet classifier (.pth) to start the deeplabv3_* from. Nothing is ever downloaded: "
        "without this file they start from random weights, and need far more images and epochs")  # fmt: skip
    add("--init", type=Path, help="checkpoint.safetensors of another run, whose weights this one starts from")
    add("--epochs", type=int, default=30, help="[%(default)s]")
    add("--crop", type=int, default=320, help="side of the training crops in pixels [%(default)s]")
    add("--batch-size", type=int, default=8, help="of all processes together [%(default)s]")
    add("--lr", type=float, help="first learning rate; it falls polynomially [0.001 for small, else 0.007]")
    add("--out", type=Path, default=Path("runs/segmenter"), help="checkpoint, metrics, predictions/ [%(default)s]")
    add("--seed", type=int, default=0, help="[%(default)s]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s here]")
    add("--workers", type=int, default=0, help="processes that read images, beside this one [%(default)s]")
    options = parser.parse_args(words)
    if options.batch_size < 2:
        parser.error("--batch-size: at least 2, for the batch normalisation")
    if min(options.epochs, options.crop) < 1 or min(options.seed, options.workers) < 0:
        parser.error("--epochs, --crop: at least 1; --seed, --workers: at least 0")
    if not 0 <= options.confidence <= 1:
        parser.error("--confidence: from 0 to 1")
    if options.backbone_weights is not None and options.network == "small":
        parser.error("--backbone-weights: the small network has no pretrained backbone")
    if options.lr is None:
        options.lr = 1e-3 if options.network == "small" else 7e-3
    elif not options.lr > 0:
        parser.error("--lr: more than 0")
    return options


if __name__ == "__main__":
    try:
        main()
    except ClipseedError as error:
        say(f"error: {error}")
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")
        raise SystemExit(130) from None
