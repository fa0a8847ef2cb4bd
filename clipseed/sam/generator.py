"""Masks of everything in an image, from a grid of points: SAM's automatic mask generation, and FMA-WSSS's changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipseed.device import is_out_of_memory
from clipseed.errors import ImageError
from clipseed.sam.backend import Embedding, Pixels, SamBackend, as_pixels
from clipseed.sam.candidates import Candidates, passing
from clipseed.sam.cleanup import remove_small_regions
from clipseed.sam.grid import Crop, crops_of, point_grid
from clipseed.sam.levels import filter_levels
from clipseed.sam.nms import corners_of, mask_boxes, suppress, with_extent
from clipseed.sam.options import ProposalOptions
from clipseed.segments import SegmentColumns, Segments, joined_columns


@dataclass
class Limits:
    """What has fitted into memory so far. Pass one to every call of :func:`generate`, and only the first call pays.

    Attributes:
        points: Most prompts at once, if ever fewer than asked for.
        crops: Most crops at once, likewise.
    """

    points: int | None = None
    crops: int | None = None


def generate(
    backend: SamBackend, image: npt.NDArray[Any], options: ProposalOptions, limits: Limits | None = None
) -> Segments:
    """Propose masks for an image.

    For each crop: answers to a grid of points, the masks that pass the thresholds, NMS. Then NMS between crops,
    clean-up of small regions (and NMS once more, preferring masks that needed none), and the level filter. Equals
    ``SamAutomaticMaskGenerator`` with equal settings, except that masks without any pixel are left out; those occur
    only without a stability threshold.

    Args:
        backend: See :func:`~clipseed.sam.load.load_sam`.
        image: 8-bit grey, RGB or RGBA; see :func:`~clipseed.sam.backend.as_pixels`.
        options: Thresholds, grids and filters.
        limits: Batch sizes, lowered where memory runs out.

    Returns:
        Masks at the image's size, best first; possibly none. With a level filter: wholes, parts, sub-parts.

    Raises:
        ImageError: the image is unusable, or does not fit into memory even with one prompt at once.
    """
    pixels = as_pixels(image)
    size = (pixels.shape[0], pixels.shape[1])
    limits = limits or Limits()
    crops = crops_of(*size, options.crop_layers, options.crop_overlap)
    by_crop: list[Candidates] = []
    while len(by_crop) < len(crops):
        some = crops[len(by_crop) : len(by_crop) + (limits.crops or backend.crops_at_once)]
        embeddings = _encoded(backend, pixels, some, limits)
        for crop, embedding in zip(some, embeddings, strict=False):  # fewer, where memory ran out
            candidates = _answers(backend, embedding, crop, size, options, limits)
            bonus = np.array(options.nms_level_bonus, np.float32)[candidates.level]
            kept = suppress(corners_of(candidates.box), candidates.iou + bonus, options.box_nms_threshold)
            by_crop.append(candidates.take(kept))
    proposals = _between_crops(by_crop, crops, size, options)
    if options.min_region_area > 0 and len(proposals):
        proposals = _cleaned(proposals, options)
    if options.level_filter is not None:
        proposals = proposals.take(filter_levels(proposals.masks, proposals.level, options.level_filter))
    return proposals


def _encoded(backend: SamBackend, pixels: Pixels, crops: Sequence[Crop], limits: Limits) -> list[Embedding]:
    """Embeddings of the first of these crops: of as many as fit into memory at once."""
    count = len(crops)
    while True:
        try:
            return backend.encode([pixels[crop.top : crop.bottom, crop.left : crop.right] for crop in crops[:count]])
        except (RuntimeError, MemoryError) as error:
            _refuse_unless_smaller_helps(error, count)
        count = limits.crops = count // 2


def _answers(
    backend: SamBackend,
    embedding: Embedding,
    crop: Crop,
    size: tuple[int, int],
    options: ProposalOptions,
    limits: Limits,
) -> Candidates:
    """Good masks of a crop's grid of points, a batch of points after the other."""
    points = point_grid(options.points_of_layer(crop.layer), embedding.size)
    parts: list[Candidates] = []
    done = 0
    while done < len(points):
        batch = points[done : done + min(options.points_per_batch, limits.points or len(points))]
        try:
            decoded = backend.decode_prompts(embedding, points=batch[:, None])
            parts.append(passing(backend, embedding, decoded, batch, crop, size, options))
            done += len(batch)
            continue
        except (RuntimeError, MemoryError) as error:
            _refuse_unless_smaller_helps(error, len(batch))
        limits.points = len(batch) // 2  # outside of the handler, which keeps what did not fit alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return Candidates.joined(parts)


def _refuse_unless_smaller_helps(error: BaseException, count: int) -> None:
    if not is_out_of_memory(error):
        raise error
    if count <= 1:
        raise ImageError("does not fit into the device's memory, even one crop and one point at a time") from error


def _between_crops(
    by_crop: Sequence[Candidates], crops: Sequence[Crop], size: tuple[int, int], options: ProposalOptions
) -> Segments:
    """Masks at the image's size; where those of several crops overlap, the smaller crop's stay."""
    owner = np.repeat(np.arange(len(by_crop)), [len(candidates) for candidates in by_crop])
    together = SegmentColumns(**joined_columns(by_crop))
    place = np.concatenate([np.arange(len(candidates)) for candidates in by_crop])
    kept = np.arange(len(owner))
    if len(crops) > 1:
        scores = np.float32(1) / np.array([crop.area for crop in crops], np.float32)
        kept = suppress(corners_of(together.box), scores[owner], options.crop_nms_threshold)
    masks = np.zeros((len(kept), *size), np.bool_)
    for mask, crop_index, index in zip(masks, owner[kept], place[kept], strict=True):
        crop = crops[crop_index]
        bits = np.unpackbits(by_crop[crop_index].packed[index], count=crop.area)
        mask[crop.top : crop.bottom, crop.left : crop.right] = bits.reshape(crop.size)
    return Segments(masks=masks, **together.columns(kept))


def _cleaned(proposals: Segments, options: ProposalOptions) -> Segments:
    """Masks without small holes and islands, and of those that overlap now, the ones that had none."""
    masks = np.empty_like(proposals.masks)
    untouched = np.empty(len(proposals), np.float32)
    for index, mask in enumerate(proposals.masks):
        masks[index], changed = remove_small_regions(mask, options.min_region_area)
        untouched[index] = not changed
    corners = mask_boxes(torch.from_numpy(masks)).numpy()
    kept = suppress(corners, untouched, max(options.box_nms_threshold, options.crop_nms_threshold))
    return replace(proposals, masks=masks, box=with_extent(corners)).take(kept)
