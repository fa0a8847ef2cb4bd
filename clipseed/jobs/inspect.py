"""``clipseed inspect``: what a seeds output holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipseed.data.dataset import image_finder, relocated
from clipseed.errors import ImageError, InputError
from clipseed.report.overlay import Pixels, contact_sheet, heat_overlay
from clipseed.store.empty import EmptyLabels, EmptyList, empty_maps, listed_earlier, read_empty
from clipseed.store.files import replacing
from clipseed.store.manifest import Manifest
from clipseed.store.reader import Seeds


@dataclass(frozen=True)
class Inspection:
    """A summary of seeds.

    Attributes:
        maps: Number of class activation maps.
        per_class: Class name to number of images.
        grid_range: Smallest and largest ``(h, w)``.
        empty: LabelMask whose maps are zero everywhere, among those looked at, with reasons.
        checked: How many images were looked at for that.
    """

    path: Path
    manifest: Manifest
    files: int
    bytes: int
    images: int
    without_class: int
    maps: int
    per_class: dict[str, int]
    grid_range: tuple[tuple[int, int], tuple[int, int]] | None
    cam_dtype: str
    empty: EmptyLabels
    checked: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            **vars(self), "path": str(self.path), "empty": self.empty.as_dict(), "empty_maps": len(self.empty.labels)
        }  # fmt: skip


def inspect_seeds(path: Path, *, verify: bool = False, look_at: int = 2000) -> Inspection:
    """Summarise a seeds file or folder.

    Args:
        path: What to look at.
        verify: Check all checksums, whatever the size.
        look_at: Look for empty maps in this many images.

    Raises:
        StoreError: missing, not ours, or damaged.
    """
    with Seeds(path, verify=True if verify else None) as seeds:
        names = seeds.class_names
        counts = np.zeros(len(names), np.int64)
        for file in seeds.files:
            found = file.class_counts
            counts[: len(found)] += found
        grids = np.concatenate([file.grids for file in seeds.files])
        ids = list(seeds)[:look_at]
        order = np.argsort(grids.prod(axis=1), kind="stable")
        ends = tuple((int(grids[k][0]), int(grids[k][1])) for k in (order[0], order[-1])) if len(grids) else None
        without = int(sum((np.diff(file.class_offsets) == 0).sum() for file in seeds.files))
        return Inspection(
            path=path,
            manifest=seeds.manifest,
            files=len(seeds.files),
            bytes=sum(file.path.stat().st_size for file in seeds.files),
            images=len(seeds),
            without_class=without,
            maps=int(counts.sum()),
            per_class={name: int(count) for name, count in zip(names, counts, strict=True)},
            grid_range=ends if ends is None else (ends[0], ends[1]),
            cam_dtype=seeds.files[0].cam_dtype,
            empty=_empty(seeds, ids),
            checked=len(ids),
        )


def _empty(seeds: Seeds, ids: list[str]) -> EmptyLabels:
    """Labels of some images whose maps are empty, with the stages and reasons that are listed beside the seeds."""
    listed = listed_earlier(read_empty(seeds.path), seeds.manifest)
    found = EmptyList(seeds.path, seeds.manifest, earlier=listed)
    for key in ids:
        seed = seeds[key]
        classes = seed.classes.tolist()
        found.add(key, classes, empty_maps(classes, seed.cam))
    return found.found()


def write_preview(
    path: Path, out: Path, count: int = 4, ids: tuple[str, ...] = (), images: Path | None = None,
    root: Path | None = None,
) -> list[str]:  # fmt: skip
    """Write an overlay of some images' maps to a PNG; returns their ids.

    Raises:
        InputError: no such id, or none of the images can be found any more.
        StoreError: the seeds are damaged, or ``out`` cannot be written.
    """
    with Seeds(path) as seeds:
        dataset = relocated(seeds.manifest, images, root)["dataset"]
        find = image_finder(dataset, exif=bool(seeds.manifest["options"].get("exif")))
        unknown = [key for key in ids if key not in seeds]
        if unknown:
            raise InputError(f"{path}: holds no image {unknown[0]!r}")
        chosen = list(ids) or _spread([key for key in seeds if len(seeds[key].classes)], count)
        rows, problems = [], []
        for key in chosen:
            try:
                rows.append(_row(seeds, key, np.asarray(find(key))))
            except ImageError as error:
                problems.append(str(error))
        if not rows:
            raise InputError(f"{path}: nothing to show: {problems[0] if problems else 'no image shows a class'}")
        with replacing(out) as temporary:
            contact_sheet(rows).save(temporary, format="PNG")
        return chosen


def _spread(keys: list[str], count: int) -> list[str]:
    """Evenly spaced members of a list."""
    step = max(1, len(keys) // max(1, count))
    return keys[::step][:count]


def _row(seeds: Seeds, key: str, image: Pixels) -> list[tuple[str, Pixels]]:
    seed = seeds[key]
    if image.shape[:2] != seed.size:
        raise ImageError(f"{key}: the image has another size now")
    row = [(key, image)]
    for class_id, heat in zip(seed.classes, seed.upsampled(), strict=True):
        row.append((seeds.class_names[class_id], heat_overlay(image, heat)))
    return row
