"""The CRF of one image: what it is given, and solving it in a worker process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipseed.data.types import ImageReader, Sample
from clipseed.jobs.engine import ImageLoader, LoadedImage, misfit
from clipseed.refine.crf import CrfParameters, clip_es_colours, clip_es_unary
from clipseed.store.reader import Seeds, open_seeds
from clipseed.store.records import SeedMap

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Problem:
    """What the CRF of an image is given; survives pickling, because one engine runs in worker processes."""

    source: Path
    reader: ImageReader
    parameters: CrfParameters
    alpha: float
    paper: bool

    def unary(self, seed: SeedMap) -> Floats:
        """Negative log probabilities ``(1 + K, H, W)`` of background and classes (CLIP-ES, section 9 of its spec)."""
        maps = seed.upsampled()
        if self.paper:
            maps = maps.astype(np.float16)
        background = (1 - maps.max(axis=0, keepdims=True)) ** maps.dtype.type(self.alpha)
        return clip_es_unary(np.concatenate([background, maps]), released=self.paper)

    def colours(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The image as the colour kernel sees it."""
        return clip_es_colours(pixels) if self.paper else pixels


@lru_cache(maxsize=2)
def _seeds(path: Path) -> Seeds:
    """Opened once per worker process."""
    return open_seeds(path, verify=False)


@dataclass(frozen=True)
class Solved:
    """An image with its posterior ``(1 + K, H, W)``, from a worker process."""

    image: LoadedImage
    posterior: Floats

    @property
    def key(self) -> tuple[int, ...]:
        """Nothing is computed together any more."""
        return ()

    @property
    def cost(self) -> int:
        """As its image's."""
        return self.image.cost


@dataclass(frozen=True)
class NativeSolver:
    """Decodes an image and runs the C++ engine on it, in a worker process: a crash there costs that image only."""

    problem: Problem

    def __call__(self, sample: Sample) -> Solved:
        """Solve one image.

        Raises:
            ImageError: it cannot be read, or does not fit its seeds.
        """
        from clipseed.refine.crf_native import native_crf

        image = ImageLoader(self.problem.reader)(sample)
        seed = _seeds(self.problem.source)[sample.id]
        problem = misfit(seed, image.size, image.stamp)
        if problem is not None:
            raise problem
        if not len(seed.classes):
            return Solved(image, np.ones((1, *image.size), np.float32))
        posterior = native_crf(self.problem.unary(seed), self.problem.colours(image.pixels), self.problem.parameters)
        return Solved(image, posterior)
