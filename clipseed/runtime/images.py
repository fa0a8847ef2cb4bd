"""Images on their way to the network: how they are decoded, at which size, how many together, how many ahead."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipseed.data.dataset import ImageFinder, image_finder
from clipseed.data.images import patch_grid, resize_to_grid
from clipseed.data.stamps import UNKNOWN, FileStamp, file_stamp
from clipseed.data.types import ImageReader, Sample
from clipseed.errors import ImageError
from clipseed.runtime.threads import OneByOne
from clipseed.store.cam_records import Cam
from clipseed.store.cams import CamSet
from clipseed.store.empty import Earlier, earlier_in, empty_maps
from clipseed.store.manifest import Manifest

if TYPE_CHECKING:
    from PIL.Image import Image


R = TypeVar("R")
_UNIT_SIZE = {"cpu": 64}
_GPU_UNIT_SIZE = 8192
_LEAST_UNIT = 64
_TOKEN_BUDGET = {"cpu": 1_600}
_GPU_TOKEN_BUDGET = 50_000
LARGE_IMAGE = 500_000 // 64
"""Cost of an image whose pixels keep all cores busy, and whose CRF takes 0.7 GB."""


def unit_size_for(device: torch.device) -> int:
    """Most images of a unit: what a kill can cost.

    Batches are made within a unit, and each of its grids ends with one that is not full, so a GPU's units are large
    (docs/performance.md, "Batches"): some seconds of work.
    """
    return _UNIT_SIZE.get(device.type, _GPU_UNIT_SIZE)


def dealt_unit(most: int, total: int, hands: int) -> int:
    """Images of a unit: at most ``most``, and so few that there is one for all ``hands`` that work on an output."""
    return min(most, max(_LEAST_UNIT, -(-total // hands)))


def batches_in_flight(device: torch.device) -> int:
    """Batches that may wait while another is collected; on a CPU the network and the decoder share the cores."""
    return 0 if device.type == "cpu" else 2


def decode_ahead(device: torch.device, workers: int) -> int:
    """Images to decode ahead: two for each worker and, for a GPU, as many as it can take while one batch is made."""
    return 2 * workers + (16 if device.type == "cpu" else 96)


def stacked(views: Sequence[npt.NDArray[np.uint8]], device: torch.device) -> Tensor:
    """Equal ``(H, W, 3)`` arrays as one ``(B, 3, H, W)`` uint8 tensor on a device.

    For a GPU they are stacked in pinned memory, which it reads by itself while this process goes on.
    """
    if device.type != "cuda":
        return torch.from_numpy(np.stack(views)).to(device).permute(0, 3, 1, 2)
    pinned = torch.empty((len(views), *views[0].shape), dtype=torch.uint8, pin_memory=True)
    np.stack(views, out=pinned.numpy())
    return pinned.to(device, non_blocking=True).permute(0, 3, 1, 2)


def token_budget(device: torch.device) -> int:
    """Tokens of a batch that a device works well with."""
    return _TOKEN_BUDGET.get(device.type, _GPU_TOKEN_BUDGET)


def default_workers(device: torch.device) -> int:
    """On a CPU the network needs the cores; a GPU needs all of them to be fed, or its part of them."""
    return 0 if device.type == "cpu" else max(1, min(16, usable_cores() - 1))


def usable_cores() -> int:
    """Cores that this process may use, as one of those that a launcher started on the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, cores // max(1, int(beside))) if beside.isdigit() else cores


def one_by_one(device: torch.device, largest: int) -> OneByOne | None:
    """On a CPU, images of up to ``largest`` cost on one core each, over the cores that torch may use; else batches."""
    return OneByOne(min(torch.get_num_threads(), usable_cores()), largest) if device.type == "cpu" else None


@dataclass(frozen=True)
class LoadedViews:
    """A decoded image at the scales of the run."""

    sample: Sample
    size: tuple[int, int]
    views: tuple[npt.NDArray[np.uint8], ...]
    grid: tuple[int, int]
    stamp: FileStamp = UNKNOWN

    @property
    def key(self) -> tuple[tuple[int, ...], ...]:
        """Images share a batch when all their views have equal shapes and both or neither have labels."""
        return (self.grid, (int(not self.sample.labels),), *(view.shape for view in self.views))

    @property
    def cost(self) -> int:
        """Tokens of the largest view."""
        return self.grid[0] * self.grid[1] + 1


@dataclass(frozen=True)
class ViewLoader:
    """Decodes a sample and resizes it to whole patches at every scale; runs in worker processes."""

    reader: ImageReader
    patch: int
    scales: tuple[float, ...]
    max_side: int
    min_side: int

    def __call__(self, sample: Sample) -> LoadedViews:
        """Decode one sample.

        Raises:
            ImageError: it cannot be read.
        """
        stamp = file_stamp(self.reader.file(sample))
        return self.of(sample, self.reader(sample), stamp)

    def of(self, sample: Sample, image: Image, stamp: FileStamp) -> LoadedViews:
        """The views of a decoded image."""
        grid = patch_grid(image.height, image.width, self.patch, self.max_side, self.min_side)
        grids = [grid if scale == 1.0 else _scaled_grid(image.size, self, scale) for scale in self.scales]
        views = tuple(resize_to_grid(image, item, self.patch) for item in grids)
        return LoadedViews(sample, (image.height, image.width), views, grid, stamp)


def _scaled_grid(size: tuple[int, int], loader: ViewLoader, scale: float) -> tuple[int, int]:
    """Grid of a scaled view: the scale multiplies the image as the ``max_side`` and ``min_side`` limits leave it."""
    rows, columns = patch_grid(size[1], size[0], 1, loader.max_side, loader.min_side)
    return patch_grid(max(1, round(rows * scale)), max(1, round(columns * scale)), loader.patch)


@dataclass(frozen=True)
class FoundReader:
    """An :class:`~clipseed.data.types.ImageReader` that finds images by id, as a manifest describes them."""

    finder: ImageFinder

    def __call__(self, sample: Sample) -> Image:
        """Open the image of a sample."""
        return self.finder(sample.id)

    def file(self, sample: Sample) -> Path | None:
        """Where it is found."""
        return self.finder.path(sample.id)


@dataclass(frozen=True)
class LoadedImage:
    """A decoded image at its own size, ``(H, W, 3)`` uint8."""

    sample: Sample
    pixels: npt.NDArray[np.uint8]
    stamp: FileStamp = UNKNOWN

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return (self.pixels.shape[0], self.pixels.shape[1])

    @property
    def key(self) -> tuple[int, ...]:
        """Images share a batch when their sizes are equal and both or neither have labels."""
        return (*self.size, int(not self.sample.labels))

    @property
    def cost(self) -> int:
        """In patches of 8 pixels a side: work on pixels needs more memory than that on patches."""
        return self.size[0] * self.size[1] // 64 + 1


@dataclass(frozen=True)
class ImageLoader:
    """Decodes a sample at its own size; runs in worker processes."""

    reader: ImageReader

    def __call__(self, sample: Sample) -> LoadedImage:
        """Decode one sample.

        Raises:
            ImageError: it cannot be read.
        """
        stamp = file_stamp(self.reader.file(sample))
        return LoadedImage(sample, np.asarray(self.reader(sample)).copy(), stamp)


def recorded_reader(manifest: Manifest) -> FoundReader:
    """Opens the images that CAMs were made from; see :func:`~clipseed.data.dataset.relocated`."""
    dataset = manifest["dataset"]
    exif = bool(manifest["options"].get("exif"))
    return FoundReader(image_finder(dataset, exif=exif, max_pixels=manifest.get("max_pixels")))


def earlier_in_cams(cams: CamSet) -> Earlier:
    """Answers whether a label's map had no positive value in these CAMs already, and since which stage."""

    def there(key: str) -> tuple[list[int], tuple[int, ...]]:
        cam = cams[key]
        classes: list[int] = cam.classes.tolist()
        return classes, empty_maps(classes, cam.maps)

    return earlier_in(cams.path, cams.manifest, there)


def cam_sample(cams: CamSet, key: str) -> Sample:
    """An image of stored CAMs, as the stream takes it; readers find its file by id."""
    return Sample(key, Path(key), tuple(int(k) for k in cams.classes(key)))


def misfit(cam: Cam, size: tuple[int, int], stamp: FileStamp = UNKNOWN) -> ImageError | None:
    """Why an image of this size, from this file, cannot be used with its CAMs, or ``None``."""
    if cam.size != size:
        return ImageError(
            f"the image is {size[1]}x{size[0]} pixels now, {cam.size[1]}x{cam.size[0]} when its CAMs were made"
        )
    if cam.stamp.differs(stamp):
        return ImageError("the image is another one than its maps were made from; run clipseed cam again")
    if not np.isfinite(cam.maps).all():
        return ImageError("its CAMs hold NaN or infinity")
    return None
