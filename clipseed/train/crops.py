"""What trainers on a frozen CLIP learn from: augmented crops of images whose classes, or whose masks, are known."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.tv_tensors import Image, Mask

from clipseed.data.images import patch_grid, resize_to_grid
from clipseed.data.types import ImageReader, ImageSet, Sample
from clipseed.defaults import CAM_MAX_SIDE
from clipseed.errors import ImageError, InputError
from clipseed.evaluate.confusion import check_labels
from clipseed.evaluate.sources import MaskSource, find_ground_truth
from clipseed.store.cams import CamSet, open_cams
from clipseed.train.augment import Augmentation, Scores
from clipseed.train.pseudo_labels import confidence_of


@dataclass
class Crops:
    """A batch.

    Attributes:
        pixels: ``(B, 3, S, S)`` uint8.
        known: ``(B, S, S)`` uint8: 255 outside of the image, inside 0, or the label of a given mask.
        labels: Class indices of each image, ascending.
        seeds: Of each sample, for what else is random about it; none for nothing random.
        confidence: ``(B, S, S)`` of given masks, where there is one.
        indices: Numbers of the images in the data set.
        skipped: Ids of images that cannot be read, with the reason; others stand in for them.
        images: Whole images ``(3, h, w)`` uint8 of whole patches, each of its own size, in place of ``pixels``.
    """

    pixels: Tensor
    known: Tensor
    labels: Sequence[Sequence[int]]
    seeds: Sequence[int] = ()
    confidence: Tensor | None = None
    indices: Sequence[int] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    images: Sequence[Tensor] = ()

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Crops:
        """The batch on a device."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Crops:
        """The batch in memory that a GPU copies from by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Crops:
        confidence = None if self.confidence is None else change(self.confidence)
        images = [change(image) for image in self.images]
        return replace(self, pixels=change(self.pixels), known=change(self.known), confidence=confidence, images=images)


@dataclass(frozen=True)
class GivenMasks:
    """Masks to learn from, in place of image-level labels.

    Attributes:
        source: Where they come from.
        classes: How many there are, with the background.
        soft: CAM file with the scores behind the masks (``clipseed crf --soft``): crops then hold a confidence.
    """

    source: MaskSource
    classes: int
    soft: Path | None = None


def given_masks(path: str, image_set: ImageSet, option: str = "--masks", soft: Path | None = None) -> GivenMasks:
    """Masks that an option names, for the images and classes of a data set.

    Args:
        path: As of :func:`~clipseed.evaluate.sources.find_ground_truth`.
        image_set: What they are masks of.
        option: What messages call it.
        soft: As of :class:`GivenMasks`.

    Raises:
        InputError: they are missing.
    """
    source = find_ground_truth(path, image_set.manifest, option, image_set.vocabulary, image_set.exif)
    return GivenMasks(source, len(image_set.vocabulary.classes) + 1, soft)


@dataclass(frozen=True)
class KnownCrop:
    """One crop: pixels, what is known of them, labels, confidence, and what could not be read on the way."""

    parts: tuple[Tensor, ...]
    labels: tuple[int, ...]
    seed: int
    index: int
    skipped: dict[str, str]


class LabelledCrops:
    """Crops of a data set; survives pickling, because worker processes read it.

    An image that cannot be read is skipped: the next one that can takes its place, the same whenever the step is run.

    Args:
        samples: With labels; or any, with masks.
        reader: Opens their images.
        augmentation: What happens to an image and to all that lies on it.
        masks: In place of labels.
        fixed: Every image has one crop, which comes again and again, and is remembered.
        patch: Likewise, but images are whole, at the size at which ``clipseed cam`` sees them with patches of so many
            pixels; what is known of them is stretched to a crop's size.
    """

    def __init__(
        self, samples: Sequence[Sample], reader: ImageReader, augmentation: Augmentation, masks: GivenMasks | None,
        *, fixed: bool = False, patch: int | None = None,
    ) -> None:  # fmt: skip
        self._samples, self._reader, self._augmentation, self._masks = samples, reader, augmentation, masks
        self._fixed, self._patch = fixed or patch is not None, patch
        self._kept: dict[int, KnownCrop] = {}
        self._soft: CamSet | None = None  # opened by the process that reads it

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int, seed: int) -> KnownCrop:
        """One crop.

        Raises:
            InputError: a mask does not fit, or no image at all can be read.
        """
        if not self._fixed:
            return self._cut(index, seed)
        if index not in self._kept:
            self._kept[index] = self._cut(index, seed)
        return replace(self._kept[index], seed=seed)

    def _cut(self, index: int, seed: int) -> KnownCrop:
        skipped: dict[str, str] = {}
        for step in range(len(self._samples)):
            number = (index + step) % len(self._samples)
            sample = self._samples[number]
            try:
                pixels = np.asarray(self._reader(sample)).copy()
            except ImageError as error:
                skipped[sample.id] = str(error)
                continue
            labels, size = tuple(sorted(sample.labels or ())), (pixels.shape[0], pixels.shape[1])
            known = self._known_of(sample, size)
            if self._patch is not None:
                return KnownCrop(self._whole(pixels, known, self._patch), labels, seed, number, skipped)
            image = Image(torch.from_numpy(pixels).permute(2, 0, 1))
            parts = [image, Mask(known), *self.scores_of(sample, size)]
            cut = self._augmentation(number if self._fixed else seed, *parts)
            return KnownCrop(cut, labels, seed, number, skipped)
        reason = next(iter(skipped.values()))
        raise InputError(f"none of the {len(skipped)} images to train on can be read; one of them: {reason}")

    def _whole(self, pixels: npt.NDArray[np.uint8], known: Tensor, patch: int) -> tuple[Tensor, ...]:
        """The image as whole patches, and what is known of it at a crop's size."""
        grid = patch_grid(pixels.shape[0], pixels.shape[1], patch, CAM_MAX_SIDE)
        view = torch.from_numpy(resize_to_grid(PIL.Image.fromarray(pixels), grid, patch).copy()).permute(2, 0, 1)
        side = self._augmentation.crop
        stretched = F.interpolate(known[None, None].float(), size=(side, side), mode="nearest-exact")
        return view.contiguous(), stretched[0, 0].to(torch.uint8)

    def _known_of(self, sample: Sample, size: tuple[int, int]) -> Tensor:
        if self._masks is None:
            return torch.zeros(size, dtype=torch.uint8)
        source = self._masks.source
        where = f"{source.name}: the mask of {sample.id}"
        mask = source.read(sample.id)
        if mask.shape != size:
            raise InputError(f"{where} has {mask.shape[1]}x{mask.shape[0]} pixels, its image {size[1]}x{size[0]}")
        check_labels(mask, self._masks.classes, where, allow_ignore=True)
        return torch.from_numpy(mask.copy())

    def scores_of(self, sample: Sample, size: tuple[int, int]) -> list[Scores]:
        """What else lies on an image: the confidence ``(1, H, W)`` of a given mask's pixels, where there are scores."""
        if self._masks is None or self._masks.soft is None:
            return []
        if self._soft is None:
            self._soft = open_cams(self._masks.soft)
        cam = self._soft[sample.id]
        if cam.size != size:
            raise InputError(f"{self._masks.soft}: the scores of {sample.id} are those of an image of another size")
        return [Scores(torch.from_numpy(confidence_of(cam))[None])]

    def collate(self, samples: Sequence[KnownCrop]) -> Crops:
        """A batch of crops."""
        columns = list(zip(*(sample.parts for sample in samples), strict=True))
        images: Sequence[Tensor] = ()
        if self._patch is not None:
            images, columns[0] = columns[0], tuple(torch.zeros(3, 0, 0, dtype=torch.uint8) for _ in samples)
        parts = [torch.stack(column) for column in columns]
        skipped = {key: why for sample in samples for key, why in sample.skipped.items()}
        confidence = parts[2][:, 0].clamp(0, 1) if len(parts) > 2 else None
        labels, seeds = [sample.labels for sample in samples], [sample.seed for sample in samples]
        indices = [sample.index for sample in samples]
        return Crops(parts[0], parts[1], labels, seeds, confidence, indices, skipped, images)


def trainable(image_set: ImageSet, masks: GivenMasks | None) -> tuple[Sequence[Sample], list[str]]:
    """The samples that training can use, and the ids of those whose labels, or masks, are missing.

    Raises:
        InputError: there are none.
    """
    samples = image_set.samples
    if masks is None and image_set.name == "toy":
        return samples, []  # all have labels, and asking for them lays out every scene
    usable = [s for s in samples if (s.labels is not None if masks is None else masks.source.has(s.id))]
    if masks is not None and masks.soft is not None:
        with open_cams(masks.soft) as soft:
            usable = [sample for sample in usable if sample.id in soft]
    if not usable:
        lacks = "labels" if masks is None else f"a mask in {masks.source.name}"
        raise InputError(f"none of the {len(samples)} images of {image_set.name} {image_set.split} has {lacks}")
    kept = {sample.id for sample in usable}
    if masks is None and not any(sample.labels for sample in usable):
        raise InputError(
            f"{image_set.name} {image_set.split}: no image shows any class; nothing but background can be learned"
        )
    return usable, [sample.id for sample in samples if sample.id not in kept]


def fingerprint(image_set: ImageSet, samples: Sequence[Sample], masks: GivenMasks | None) -> dict[str, Any]:
    """What a resumed run must find again: the images' ids with their labels, or their masks."""
    about: dict[str, Any] = {"dataset": image_set.name, "split": image_set.split}
    if image_set.name == "toy":
        about["toy_seed"] = image_set.source.get("toy_seed")
    else:
        about["labels"] = _digest(f"{s.id} {sorted(s.labels or ()) if masks is None else ''}" for s in samples)
    if masks is not None:
        about["masks"] = _digest(masks.source.content(sample.id) for sample in samples)
        about["soft"] = None if masks.soft is None else _digest([masks.soft.read_bytes()])
    return about


def _digest(parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else f"{part}\n".encode())
    return digest.hexdigest()
