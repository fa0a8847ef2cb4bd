"""CAMs and segments in files, with just what their manifests must say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipseed.data.vocabulary import load_vocabulary
from clipseed.segments import Segments, from_masks
from clipseed.store.cam_records import Cam
from clipseed.store.cam_writer import CamWriter
from clipseed.store.segment_records import SegmentRecord, segment_format
from clipseed.store.units import Unit
from clipseed.store.writer import RecordWriter

SIZE, GRID = (48, 64), (24, 32)


def small_manifest(images: Path, vocabulary: str = "voc") -> dict[str, Any]:
    return {
        "kind": "cam",
        "method": "softmax-gradcam",
        "options": {"exif": False, "max_side": 640, "min_side": 0},
        "model": {"model": "ViT-B-16"},
        "weights": "x",
        "vocabulary": load_vocabulary(vocabulary).as_dict(),
        "dataset": {"name": "folder", "root": str(images), "split": "all", "images": str(images)},
        "versions": {},
    }


def write_seeds(path: Path, seeds: list[Cam], manifest: dict[str, Any]) -> Path:
    with CamWriter(path, manifest, "float16", 64) as writer:
        writer.write(Unit(0), seeds)
        writer.finish([seed.id for seed in seeds])
    return path


def bump(size: tuple[int, int], row: float, column: float, width: float = 2.0) -> np.ndarray:
    """A map with one peak."""
    y, x = np.mgrid[: size[0], : size[1]]
    return np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * width**2)).astype(np.float32)


def rectangles(size: tuple[int, int], seed: int, count: int = 6) -> Segments:
    """Overlapping rectangles of all levels."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, *size), bool)
    for mask in masks:
        top, left = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
        mask[top : top + rng.integers(3, size[0]), left : left + rng.integers(3, size[1])] = True
    return replace(from_masks(masks), level=rng.integers(0, 3, count).astype(np.int8))


def make_cam(key: str, classes: tuple[int, ...], seed: int, size: tuple[int, int] = SIZE) -> Cam:
    rng = np.random.default_rng(seed)
    maps = [bump((6, 8), rng.uniform(0, 6), rng.uniform(0, 8), 2.5) for _ in classes]
    cam = np.array(maps, np.float32).reshape(len(classes), 6, 8)
    return Cam(key, np.array(classes, np.int32), cam.astype(np.float16).astype(np.float32), size)


def write_cache(path: Path, records: list[SegmentRecord], vocabulary: str | None = None) -> Path:
    words = small_manifest(Path("x"), vocabulary)["vocabulary"] if vocabulary else {}
    manifest = {"kind": "sam-masks", "method": "grid", "options": {}, "source": {}, "model": {}, "dataset": {},
                "vocabulary": words}  # fmt: skip
    with RecordWriter(path, manifest, segment_format(), 64) as writer:
        writer.write(Unit(0), records)
        writer.finish([record.id for record in records])
    return path
