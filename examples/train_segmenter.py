#!/usr/bin/env python
r"""Train a segmentation network on pseudo-labels with CLIP-ES's confidence-guided loss, and score it with clipseed.

    python examples/train_segmenter.py --images VOC2012/JPEGImages --masks pseudo --classes voc \
        --val-images VOC2012/JPEGImages --val-list VOC2012/ImageSets/Segmentation/val.txt \
        --gt VOC2012/SegmentationClass --network deeplabv3_resnet50 --backbone-weights resnet50.pth --out runs/segmenter

All it needs from clipseed is a folder of palette PNG masks (0 background, class index + 1, 255 ignore), as
`clipseed crf` writes it. It checkpoints every epoch; the same command goes on where a killed run stopped, and ends
where an undisturbed one would have.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import clipseed
from clipseed.data.images import read_image
from clipseed.data.listing import list_images, read_split
from clipseed.errors import ClipseedError, InputError
from clipseed.store.files import remove_leftovers, replacing
from clipseed.store.masks import read_mask, write_mask
from clipseed.train import ConfidenceGuidedLoss
from clipseed.types import IGNORE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's backbones were trained with these
SCALES = (0.5, 1.5)
NETWORKS = ("small", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50")
DECISIVE = ("images", "masks", "soft", "confidence", "classes", "network", "backbone_weights",
            "epochs", "crop", "batch_size", "lr", "seed")  # fmt: skip
"""Options that a resumed run must share with the one it goes on from."""


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
        """Pictures ``(B, 3, H, W)`` to logits ``(B, C, H/4, W/4)``."""
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
    """A network from pictures to logits; its backbone from a file of torchvision's classifier of the same name."""
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


def as_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class PseudoLabels(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Augmented crops ``(3, S, S)``, labels and confidence ``(S, S)``; decided by seed, epoch and index alone."""

    def __init__(self, images: Path, masks: Path, soft: Path | None, crop: int, seed: int) -> None:
        self.masks, pictures = list_images(masks), list_images(images)
        self.soft, self.seeds, self.crop, self.seed, self.epoch = soft, None, crop, seed, 0
        known = pictures.keys() & (clipseed.open_seeds(soft).keys() if soft else pictures.keys())
        missing = sorted(self.masks.keys() - known)
        if missing:
            raise InputError(f"{len(missing)} of {len(self.masks)} masks have no picture or scores: {missing[0]} …")
        self.samples = [(identifier, pictures[identifier]) for identifier in self.masks]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        identifier, path = self.samples[index]
        image, labels = read_image(path), Image.fromarray(read_mask(self.masks[identifier]))
        if image.size != labels.size:
            raise InputError(f"{self.masks[identifier]}: size {labels.size}, but its picture has {image.size}")
        confidence = Image.fromarray(self._confidence(identifier, labels))
        rng = np.random.default_rng([self.seed, self.epoch, index])
        scale = rng.uniform(*SCALES)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        parts = (
            as_tensor(image.resize(size, Image.Resampling.BILINEAR)),
            torch.from_numpy(np.asarray(labels.resize(size, Image.Resampling.NEAREST)).copy()),
            torch.from_numpy(np.asarray(confidence.resize(size, Image.Resampling.BILINEAR)).copy()).clamp_(0, 1),
        )
        # Negative offsets put a small picture somewhere into the crop, surrounded by the mean colour and by 255.
        top, left = (self._offset(side, rng) for side in (size[1], size[0]))
        around = (-left, left + self.crop - size[0], -top, top + self.crop - size[1])
        flip = rng.random() < 0.5
        pixels, cut, sure = (F.pad(part, around, value=fill) for part, fill in zip(parts, (0, IGNORE, 0), strict=True))
        return tuple(part.flip(-1) if flip else part for part in (pixels, cut, sure))  # type: ignore[return-value]

    def _offset(self, side: int, rng: np.random.Generator) -> int:
        room = side - self.crop
        return int(rng.integers(min(room, 0), max(room, 0) + 1))

    def _confidence(self, identifier: str, labels: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Score of the strongest of background (1 - strongest class, as in CLIP-ES) and classes."""
        if self.soft is None:
            return np.ones((labels.height, labels.width), np.float32)
        if self.seeds is None:  # opened by the process that reads it
            self.seeds = clipseed.open_seeds(self.soft)
        strongest = self.seeds[identifier].upsampled().max(axis=0, initial=0)
        return np.maximum(strongest, 1 - strongest)


def train(network: nn.Module, data: PseudoLabels, options: argparse.Namespace) -> None:
    """All epochs, from the checkpoint if there is one; every epoch prints a line and replaces the checkpoint."""
    loss_of = ConfidenceGuidedLoss(options.confidence)
    # Plain SGD as in DeepLab, which starts from a trained backbone; the small network starts from nothing.
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(network.parameters(), options.lr, weight_decay=1e-2)
        if options.network == "small"
        else torch.optim.SGD(network.parameters(), options.lr, momentum=0.9, weight_decay=5e-4)
    )
    checkpoint = options.out / "checkpoint.pt"
    settings = {key: str(getattr(options, key)) for key in DECISIVE} | {"pictures": str(len(data))}
    done = restore(checkpoint, settings, network, optimizer, options.device) if checkpoint.exists() else 0
    order = torch.Generator()
    loader = DataLoader(data, options.batch_size, True, drop_last=True, num_workers=options.workers, generator=order)
    for epoch in range(done, options.epochs):
        # Everything random starts anew each epoch, so that a resumed run repeats an undisturbed one.
        data.epoch = epoch
        order.manual_seed(1_000_003 * options.seed + epoch)
        torch.manual_seed(1_000_003 * options.seed + epoch)
        network.train()
        total, start = 0.0, time.monotonic()
        for step, batch in enumerate(loader):
            progress = (epoch * len(loader) + step) / (options.epochs * len(loader))
            for group in optimizer.param_groups:
                group["lr"] = options.lr * (1 - progress) ** 0.9
            pixels, labels, confidence = (part.to(options.device) for part in batch)
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            loss = loss_of(network(pixels), labels, confidence if data.soft else None)
            if not math.isfinite(value := loss.item()):
                raise InputError(f"the loss is {value} in epoch {epoch + 1}, step {step + 1}; try a lower --lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += value
        speed = len(loader) * options.batch_size / (time.monotonic() - start)
        say(f"epoch {epoch + 1}/{options.epochs}: loss {total / len(loader):.4f}, {speed:.1f} pictures/s")
        state = {"epoch": epoch + 1, "network": network.state_dict(), "optimizer": optimizer.state_dict()}
        with replacing(checkpoint) as temporary:
            torch.save({"settings": settings, **state}, temporary)


def restore(
    path: Path, settings: dict[str, str], network: nn.Module, optimizer: torch.optim.Optimizer, device: str
) -> int:
    """Load a checkpoint and return how many epochs it has seen; one made with other settings is refused."""
    state = torch.load(path, map_location=device, weights_only=True)
    made = state["settings"]
    changed = [f"{key} {made.get(key)} -> {value}" for key, value in settings.items() if made.get(key) != value]
    if changed:
        raise InputError(f"{path} was made with other settings ({', '.join(changed)}); choose another --out")
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    say(f"{path}: going on after epoch {state['epoch']}")
    return int(state["epoch"])


@torch.inference_mode()
def predict(network: nn.Module, pictures: dict[str, Path], folder: Path, device: str) -> None:
    """Write the network's mask of every picture, at the picture's size, in place of earlier ones."""
    network.eval()
    shutil.rmtree(folder, ignore_errors=True)
    for identifier, path in pictures.items():
        image = read_image(path)
        logits = network(as_tensor(image)[None].to(device))
        logits = F.interpolate(logits, size=(image.height, image.width), mode="bilinear", align_corners=False)
        target = folder / f"{identifier}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_mask(target, logits[0].argmax(dim=0).byte().cpu().numpy())
    say(f"{folder}: {len(pictures)} predicted masks")


def evaluate(options: argparse.Namespace) -> None:
    """Run `clipseed evaluate` on the predictions; print the command and the mean IoU."""
    words = ["evaluate", str(options.out / "predictions"), "--gt", str(options.gt), "--classes", options.classes]
    if options.val_list is not None:
        words += ["--split", str(options.val_list)]
    print("clipseed", shlex.join(words), flush=True)
    command = [sys.executable, "-m", "clipseed", *words, "--json", "--quiet"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise SystemExit(found.returncode)
    scores = json.loads(found.stdout)
    print(f"mIoU {100 * scores['miou']:.2f} % on {scores['images']} pictures")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder with the training pictures (others may lie there, too)")
    add("--masks", type=Path, required=True, help="pseudo-labels, PNG: 0 background, class index + 1, 255 ignore")
    add("--soft", type=Path, help="seeds (.h5) whose scores say where the masks are sure; else only 255 is left out")
    add("--confidence", type=float, default=0.95, help="with --soft: least score that counts [%(default)s]")
    add("--classes", default="voc", help="voc, coco, toy or a file, as for clipseed [%(default)s]")
    add("--val-images", type=Path, required=True, help="folder with the pictures to predict")
    add("--val-list", type=Path, help="only these of them: a file with one id per line")
    add("--gt", type=Path, help="ground-truth masks of these pictures; without it nothing is scored")
    add("--network", choices=NETWORKS, default="small", help="small learns the toy set on a CPU [%(default)s]")
    add("--backbone-weights", type=Path,
        help="torchvision's ImageNet classifier (.pth) to start the deeplabv3_* from. Nothing is ever downloaded: "
        "without this file they start from random weights, and need far more pictures and epochs")  # fmt: skip
    add("--epochs", type=int, default=30, help="[%(default)s]")
    add("--crop", type=int, default=320, help="side of the training crops in pixels [%(default)s]")
    add("--batch-size", type=int, default=8, help="[%(default)s]")
    add("--lr", type=float, help="first learning rate; it falls polynomially [0.001 for small, else 0.007]")
    add("--out", type=Path, default=Path("runs/segmenter"), help="checkpoint.pt and predictions/ [%(default)s]")
    add("--seed", type=int, default=0, help="[%(default)s]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s here]")
    add("--workers", type=int, default=0, help="processes that read pictures, beside this one [%(default)s]")
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


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    torch.manual_seed(options.seed)
    classes = len(clipseed.load_vocabulary(options.classes).class_names)
    data = PseudoLabels(options.images, options.masks, options.soft, options.crop, options.seed)
    if len(data) < options.batch_size:
        raise InputError(f"{options.masks}: {len(data)} masks do not fill one batch of {options.batch_size}")
    pictures = list_images(options.val_images)
    if options.val_list is not None:
        listed = read_split(options.val_list)
        if missing := [identifier for identifier in listed if identifier not in pictures]:
            raise InputError(f"{options.val_list}: no picture for {len(missing)} of its ids: {missing[0]} …")
        pictures = {identifier: pictures[identifier] for identifier in listed}
    network = build_network(options.network, classes + 1, options.backbone_weights)
    network = network.to(options.device, memory_format=torch.channels_last)  # convolutions are several times faster
    options.out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(options.out)
    say(f"{options.network} on {len(data)} pictures with pseudo-labels, {options.device}")
    train(network, data, options)
    predict(network, pictures, options.out / "predictions", options.device)
    if options.gt is not None:
        evaluate(options)


if __name__ == "__main__":
    try:
        main()
    except ClipseedError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        say("interrupted; the same command goes on after the last finished epoch")
        raise SystemExit(130) from None
