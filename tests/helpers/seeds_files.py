"""CAMs files as docs/formats.md describes them, written with h5py alone, whatever they hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

MANIFEST: dict[str, Any] = {
    "kind": "cam", "method": "m", "options": {"scales": [1.0], "paper": False}, "model": {"sha256": "ab"},
    "vocabulary": {"name": "three", "classes": [{"name": name} for name in ("ant", "bee", "cow")]},
    "dataset": {"name": "folder", "split": "all", "images": "nowhere"}, "versions": {"clipseed": "0"},
}  # fmt: skip
DATASETS = ("id", "size", "grid", "class_offset", "class_id", "cam_offset", "cam")


def arrays() -> dict[str, np.ndarray]:
    """Three images as docs/formats.md describes them: with two classes, with none, with one."""
    return {
        "id": np.array([b"a", b"b/c", b"d"], "S3"),
        "size": np.array([[48, 64], [32, 32], [16, 48]], np.int32),
        "grid": np.array([[3, 4], [2, 2], [1, 3]], np.int32),
        "class_offset": np.array([0, 2, 2, 3], np.int64),
        "class_id": np.array([2, 0, 1], np.int32),
        "cam_offset": np.array([0, 24, 24, 27], np.int64),
        "cam": np.linspace(0, 1, 27).astype(np.float16),
    }


def seeds_file(path: Path, content: dict[str, np.ndarray], manifest: Any = MANIFEST, libver: str = "earliest") -> Path:
    """A CAM file with a true checksum, written with h5py alone, whatever it holds."""
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    parts = [text]
    with h5py.File(path, "w", libver=libver) as file:
        for name in DATASETS:
            values = content[name]
            file.create_dataset(
                name, data=values, chunks=values.shape if values.size else None, fletcher32=values.size > 0
            )
            raw = (
                b"".join(bytes(v) + b"\n" for v in values)
                if name == "id" and values.dtype.kind == "S"
                else values.tobytes()
            )
            parts.append(hashlib.sha256(raw).hexdigest())
        attributes = {"format": "clipseed-cams", "version": 1, "manifest": text,
                      "checksum": hashlib.sha256("\n".join(parts).encode()).hexdigest()}  # fmt: skip
        file.attrs.update(attributes)
    return path
