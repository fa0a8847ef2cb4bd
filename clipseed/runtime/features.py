"""Image features of a data set: the work, and an output that keeps them in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.clip.model import FrozenClip
from clipseed.data.types import ImageReader, Sample
from clipseed.runtime.clip_work import ClipChoice, ClipWork
from clipseed.runtime.images import LoadedViews, ViewLoader, stacked
from clipseed.store.feature_records import Feature
from clipseed.store.shards import WHOLE
from clipseed.store.units import Unit, missing_units
from clipseed.store.writer import Finished


@dataclass(frozen=True)
class FeatureRecipe:
    """Loads CLIP for the features of whole images, seen at their own aspect ratio; sizes as of ``clipseed cam``."""

    choice: ClipChoice
    reader: ImageReader
    max_side: int
    min_side: int

    def __call__(self) -> FeatureWork:
        """Load it."""
        return FeatureWork(self)


class FeatureWork(ClipWork[Feature]):
    """Images to features."""

    def __init__(self, recipe: FeatureRecipe) -> None:
        super().__init__(recipe.choice)
        self._recipe = recipe

    @property
    def loader(self) -> ViewLoader:
        """Decodes images at one scale."""
        recipe = self._recipe
        return ViewLoader(recipe.reader, self.clip.tower.patch, (1.0,), recipe.max_side, recipe.min_side)

    def compute(self, items: Sequence[LoadedViews]) -> list[Feature]:
        """Features of a batch."""
        found, recomputed = features_of(self.clip, items)
        self.counters["recomputed"] += recomputed
        return [
            Feature(item.sample.id, row.numpy(), item.size, item.grid, item.stamp)
            for item, row in zip(items, found, strict=True)
        ]


def features_of(clip: FrozenClip, items: Sequence[LoadedViews]) -> tuple[Tensor, int]:
    """Unit features ``(B, E)`` of the first views of a batch, and how many were computed again in float32."""
    return image_features(clip, stacked([item.views[0] for item in items], clip.tower.device))


def image_features(clip: FrozenClip, pixels: Tensor) -> tuple[Tensor, int]:
    """Unit features ``(B, E)`` of images of one size ``(B, 3, H, W)`` uint8, float32 on the CPU.

    Those that come out NaN or infinite in half precision are computed again in float32; how many is the second value.
    """
    features = clip.encode_image(pixels).float()
    broken = ~torch.isfinite(features).all(dim=-1)
    again = bool(broken.any()) and clip.exact is not clip
    if again:
        features[broken] = clip.exact.encode_image(pixels[broken]).float()
    return F.normalize(features, dim=-1).cpu(), int(broken.sum()) if again else 0


class FeaturesInMemory:
    """An :class:`~clipseed.runtime.run.Output` that keeps features while the process lives.

    Attributes:
        features: By sample id.
    """

    out = folder = None

    def __init__(self, unit_size: int) -> None:
        self._unit_size = unit_size
        self.features: dict[str, Feature] = {}
        self.notes: list[str] = []
        self.left_out: list[tuple[str, str]] = []

    @property
    def done(self) -> frozenset[str]:
        """Ids of all features."""
        return frozenset(self.features)

    def own(self, items: Sequence[str]) -> list[str]:
        """All of them: what is in memory is a run of the whole."""
        return list(items)

    def units(self, samples: Sequence[Sample]) -> list[Unit]:
        """All units."""
        return missing_units(samples, self._unit_size, WHOLE, self.features)

    def write(self, unit: Unit, records: Sequence[Feature]) -> None:
        """Keep features."""
        self.features |= {record.id: record for record in records}

    def finish(self, ids: Sequence[str], skipped: Sequence[tuple[str, str]] = ()) -> Finished:
        """Nothing to do."""
        return Finished(None)
