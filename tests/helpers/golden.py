"""Arrays of the authors' released programs: ``tests/data``, or another folder of the same layout in $CLIPSEED_GOLDEN.

Tests take every size, count, seed and name from the files, so that they run unchanged on other cases.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(os.environ.get("CLIPSEED_GOLDEN") or Path(__file__).parent.parent / "data").resolve()
CLIP_ES_DATA = GOLDEN / "clip_es"
FMA_WSSS_DATA = GOLDEN / "fma_wsss"
WECLIP_DATA = GOLDEN / "weclip"

SETS = sorted(path.parent.name for path in CLIP_ES_DATA.glob("*/config.json"))
"""Folders of CLIP-ES cases: one model, one vocabulary and some images each."""
CASES = [(folder, path.stem) for folder in SETS for path in sorted((CLIP_ES_DATA / folder).glob("img_*.npz"))]


def names(folder: Path, pattern: str) -> list[str]:
    """Stems of the files that a test runs over."""
    return sorted(path.stem for path in folder.glob(f"{pattern}.npz"))


@lru_cache(maxsize=64)
def arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file."""
    with np.load(path) as stored:
        return {key: stored[key] for key in stored.files}


def with_meta(folder: Path, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays of a file, and its settings."""
    found = arrays(folder / f"{name}.npz")
    return found, json.loads(str(found["meta"]))


@lru_cache
def config(folder: str) -> dict[str, Any]:
    """Settings of a set of CLIP-ES cases."""
    return json.loads((CLIP_ES_DATA / folder / "config.json").read_text())


def vocabulary(folder: str) -> str:
    """Name of the set's vocabulary."""
    return str(config(folder)["dataset"])


def case(folder: str, name: str) -> dict[str, np.ndarray]:
    """Arrays of one image of a set, or another file there (``text``, ``evaluate``, ``weights``)."""
    return arrays(CLIP_ES_DATA / folder / f"{name}.npz")
