"""Images with label masks, and scores where there are any, as something to train a segmenter on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.tv_tensors import Image, Mask

from clipseed.data.images import read_image
from clipseed.data.listing import list_images
from clipseed.errors import InputError
from clipseed.pseudo.background import Background
from clipseed.pseudo.pixels import PixelLabels, label_scores
from clipseed.store.cam_records import Cam
from clipseed.store.cams import open_cams
from clipseed.store.label_masks import read_label_mask
from clipseed.train.augment import Augmentation, Scores
from clipseed.train.data import Stacked


class PseudoLabels(Stacked):
    """Augmented crops of images and of what is known of their pixels.

    Args:
        images: Folder with the images; others may lie there, too.
        masks: Folder with label masks: 0 background, class index + 1, 255 ignore. Each needs an image of its name.
        augmentation: What happens to both.
        soft: CAM file with scores behind the masks (``clipseed crf --soft``): samples then hold a confidence.

    Raises:
        InputError: a mask without an image, or without scores.
    """

    def __init__(self, images: Path, masks: Path, augmentation: Augmentation, soft: Path | None = None) -> None:
        self._augmentation, self._soft = augmentation, soft
        self._cams = None if soft is None else open_cams(soft)  # each process that reads it opens it for itself
        labels, pixels = list_images(masks), list_images(images)
        known = set(pixels)
        if self._cams is not None:
            known &= set(self._cams)
        missing = sorted(labels.keys() - known)
        if missing:
            what = "image" if soft is None else "image or scores"
            raise InputError(f"{masks}: {len(missing)} of {len(labels)} masks have no {what}: {missing[0]} …")
        self._samples = [(identifier, pixels[identifier], path) for identifier, path in labels.items()]

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int, seed: int) -> tuple[Tensor, ...]:
        """One crop: pixels ``(3, S, S)`` uint8, labels ``(S, S)`` uint8; with scores, confidence ``(S, S)`` float32.

        The confidence is the score of the strongest class, or of the background, which is 1 less that (CLIP-ES).

        Raises:
            InputError: image and mask differ in size.
            ImageError: the image cannot be read.
        """
        identifier, path, mask = self._samples[index]
        image, labels = read_image(path), read_label_mask(mask)
        if image.size != labels.shape[::-1]:
            raise InputError(f"{mask}: size {labels.shape[::-1]}, but its image has {image.size}")
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        parts = [Image(pixels), Mask(torch.from_numpy(labels.copy()))]
        if self._cams is not None:
            parts.append(Scores(torch.from_numpy(self.confidence(identifier))[None]))
        cut = self._augmentation(seed, *parts)
        return (*cut[:2], *(scores[0].clamp(0, 1) for scores in cut[2:]))

    def confidence(self, identifier: str) -> npt.NDArray[np.float32]:
        """Score ``(H, W)`` of what a mask says about each pixel of an image."""
        assert self._cams is not None
        return confidence_of(self._cams[identifier])

    def digest(self) -> str:
        """Digest of all masks and scores and of the images' names and sizes: what a resumed run must find again."""
        digest = hashlib.blake2b(digest_size=16)
        for identifier, path, mask in self._samples:
            digest.update(f"{identifier}\n{path.stat().st_size}\n".encode())
            digest.update(hashlib.blake2b(mask.read_bytes(), digest_size=16).digest())
        if self._soft is not None and self._soft.is_file():
            digest.update(hashlib.blake2b(self._soft.read_bytes(), digest_size=16).digest())
        return digest.hexdigest()


SOFT_BACKGROUND = Background("power", 1.0)
"""What the background scores beside soft labels: what is missing to 1 for the strongest class (CLIP-ES)."""


def pixels_of(cam: Cam) -> PixelLabels:
    """Each pixel's strongest class, or the background, and its score: ``(H, W)`` both."""
    return label_scores(cam.upsampled(), cam.classes, SOFT_BACKGROUND)


def confidence_of(cam: Cam) -> npt.NDArray[np.float32]:
    """Score ``(H, W)`` of each pixel's strongest class, or of the background."""
    return pixels_of(cam).confidence.astype(np.float32, copy=False)
