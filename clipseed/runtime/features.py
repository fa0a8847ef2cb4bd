"""Image features of a data set through the streaming engine: what ranking prompts and tagging have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.clip.model import FrozenClip
from clipseed.data.types import ImageReader, Sample
from clipseed.runtime.decode import DecodePool
from clipseed.runtime.images import (
    LoadedViews,
    ViewLoader,
    batches_in_flight,
    decode_ahead,
    default_workers,
    stacked,
    token_budget,
    unit_size_for,
)
from clipseed.runtime.stream import BatchSize, StreamStats, run_stream
from clipseed.store.units import Unit


@dataclass(frozen=True)
class FeatureOptions:
    """How images are prepared and batched; as in :class:`~clipseed.jobs.cam.CamOptions`."""

    max_side: int
    min_side: int
    batch_size: int | None
    workers: int | None


Feature = tuple[str, Tensor]
"""Sample id and unit feature ``(E,)``, float32 on the CPU."""


def stream_features(
    clip: FrozenClip,
    reader: ImageReader,
    units: Sequence[Sequence[Sample]],
    options: FeatureOptions,
    write: Callable[[Sequence[Feature]], None],
    advance: Callable[[int, StreamStats], None],
) -> StreamStats:
    """Encode every image once, at its own aspect ratio, and hand the unit features on, unit by unit.

    ``write`` runs in a thread of its own. Images that cannot be read are reported in the result.
    """
    device = clip.tower.device
    loader = ViewLoader(reader, clip.tower.patch, (1.0,), options.max_side, options.min_side)
    workers = options.workers if options.workers is not None else default_workers(device)
    batch = BatchSize(options.batch_size, token_budget(device))
    ahead = decode_ahead(device, workers) + 2 * (options.batch_size or 0)
    todo = [Unit(index, tuple(samples)) for index, samples in enumerate(units) if samples]

    def compute(items: Sequence[LoadedViews]) -> list[Feature]:
        found = image_features(clip, stacked([item.views[0] for item in items], device))
        return [(item.sample.id, row) for item, row in zip(items, found, strict=True)]

    with DecodePool(loader, workers, ahead) as pool:
        queue = batches_in_flight(device)
        return run_stream(todo, pool, compute, lambda _, results: write(results), batch, advance, queue=queue)


def cut_units(samples: Sequence[Sample], device: torch.device) -> list[Sequence[Sample]]:
    """Consecutive samples in units as ``clipseed cam`` makes them."""
    size = unit_size_for(device)
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def image_features(clip: FrozenClip, pixels: Tensor) -> Tensor:
    """Unit features ``(B, E)`` of images of one size ``(B, 3, H, W)`` uint8, float32 on the CPU.

    Those that come out NaN or infinite in half precision are computed again in float32.
    """
    features = clip.encode_image(pixels).float()
    broken = ~torch.isfinite(features).all(dim=-1)
    if broken.any() and clip.exact is not clip:
        features[broken] = clip.exact.encode_image(pixels[broken]).float()
    return F.normalize(features, dim=-1).cpu()
