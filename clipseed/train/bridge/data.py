"""What is learned from CAMs themselves: soft labels beside the crops of their images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipseed.data.types import ImageReader, Sample
from clipseed.errors import InputError
from clipseed.store.cam_records import Cam
from clipseed.store.cams import CamSet, open_cams
from clipseed.train.augment import Augmentation, Scores
from clipseed.train.crops import Crops, GivenMasks, KnownCrop, LabelledCrops
from clipseed.train.pseudo_labels import SOFT_BACKGROUND, confidence_of, pixels_of
from clipseed.types import LabelMask


class CamMasks:
    """CAMs as a :class:`~clipseed.evaluate.sources.MaskSource`: each pixel's strongest of background and classes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self._cams: CamSet | None = None

    @property
    def cams(self) -> CamSet:
        """Opened by the process that reads them."""
        if self._cams is None:
            self._cams = open_cams(self.path)
        return self._cams

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "name": self.name, "_cams": None}

    def ids(self) -> frozenset[str]:
        """Ids of all images."""
        return frozenset(self.cams)

    def has(self, identifier: str) -> bool:
        """Whether there are maps of an image."""
        return identifier in self.cams

    def read(self, identifier: str) -> LabelMask:
        """Label mask ``(H, W)``."""
        return pixels_of(self.cams[identifier]).labels

    def content(self, identifier: str) -> bytes:
        """Classes and maps."""
        cam = self.cams[identifier]
        return cam.classes.tobytes() + cam.maps.tobytes()


def soft_labels(cam: Cam) -> npt.NDArray[np.float32]:
    """Soft labels ``(1 + K_b, H, W)`` of background and an image's classes; they sum to 1.

    The background scores what is missing to 1 for the strongest class, as CLIP-ES has it.
    """
    scores = SOFT_BACKGROUND.add_to(cam.upsampled().clip(0, 1))
    normalized: npt.NDArray[np.float32] = scores / scores.sum(axis=0, keepdims=True).clip(1e-6)
    return normalized


@dataclass
class SoftCrops(Crops):
    """A batch with soft labels ``soft`` ``(B, 1 + K, S, S)``, 0 outside of the image."""

    soft: Tensor | None = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> Crops:
        assert self.soft is not None
        moved = super()._each(change)
        assert isinstance(moved, SoftCrops)
        return replace(moved, soft=change(self.soft))


class CamCrops(LabelledCrops):
    """Crops of images and of their CAMs.

    Args:
        samples, reader, augmentation: As of :class:`~clipseed.train.crops.LabelledCrops`.
        source: The CAMs.
        classes: Classes with the background.
    """

    def __init__(
        self, samples: Sequence[Sample], reader: ImageReader, augmentation: Augmentation, source: CamMasks, classes: int
    ) -> None:
        super().__init__(samples, reader, augmentation, GivenMasks(source, classes))
        self._source, self._classes = source, classes

    def scores_of(self, sample: Sample, size: tuple[int, int]) -> list[Scores]:
        """Soft labels of the image's own classes, and the confidence of the strongest."""
        cam = self._source.cams[sample.id]
        if cam.size != size:
            raise InputError(f"{self._source.name}: the maps of {sample.id} are those of an image of another size")
        return [Scores(torch.from_numpy(soft_labels(cam))), Scores(torch.from_numpy(confidence_of(cam))[None])]

    def collate(self, samples: Sequence[KnownCrop]) -> Crops:
        """A batch, the soft labels of all classes among it."""
        batch = super().collate([replace(sample, parts=(*sample.parts[:2], sample.parts[3])) for sample in samples])
        side = batch.pixels.shape[-1]
        soft = torch.zeros(len(samples), self._classes, side, side)
        for row, sample in enumerate(samples):
            present = [0, *(int(k) + 1 for k in self._source.cams[self._samples[sample.index].id].classes)]
            soft[row, present] = sample.parts[2].clamp(0, 1)
        return SoftCrops(**vars(batch), soft=soft)
