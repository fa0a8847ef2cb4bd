"""Shared fixtures: tiny seeded models in the real formats, and small data sets in the real layouts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.images import photo
from helpers.models import save_npz, tiny_config, tiny_model
from helpers.program import Runner

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; programs that are started inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def openai_state() -> dict[str, torch.Tensor]:
    """A state dict as OpenAI publishes them: heads of 64, linear weights in half precision, the rest in single."""
    from open_clip.model import convert_weights_to_lp

    model = tiny_model(tiny_config(head_width=64))
    convert_weights_to_lp(model, torch.float16)
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def tiny_weights(tmp_path: Path, openai_state: dict[str, torch.Tensor]) -> Path:
    """Weights file of the tiny model."""
    return save_npz(tmp_path / "tiny.npz", openai_state)


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Six images in VOC layout with masks, two of them of equal size."""
    from clipseed.store.label_masks import write_label_mask

    root = tmp_path / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    contents = [
        ("2007_000001", (48, 64), ["cat"]),
        ("2007_000002", (48, 64), ["dog", "person", "dog"]),
        ("2007_000003", (70, 50), ["person"]),
        ("2007_000004", (33, 90), ["sofa", "cat", "dog"]),
        ("2007_000005", (48, 64), []),
        ("2007_000006", (64, 64), ["tvmonitor"]),
    ]
    from clipseed.data.vocabulary import load_vocabulary

    names = load_vocabulary("voc").class_names
    for number, (identifier, (height, width), labels) in enumerate(contents):
        photo(number, height, width).save(root / "JPEGImages" / f"{identifier}.jpg", quality=95)
        mask = np.zeros((height, width), np.uint8)
        for position, label in enumerate(labels):
            mask[5 + 8 * position : 12 + 8 * position, 4:40] = names.index(label) + 1
        mask[:2] = 255
        write_label_mask(root / "SegmentationClass" / f"{identifier}.png", mask)
        objects = "".join(f"<object><name>{label}</name><part><name>head</name></part></object>" for label in labels)
        (root / "Annotations" / f"{identifier}.xml").write_text(f"<annotation>{objects}</annotation>")
    ids = [identifier for identifier, _, _ in contents]
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("\n".join(ids) + "\n")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(ids[:2]) + "\n")
    return root


@pytest.fixture
def clipseed() -> Runner:
    """Run the program in a process of its own; returns exit code, stdout and stderr."""

    def run(*words: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Any:
        command = [sys.executable, "-m", "clipseed", *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
        return subprocess.run(
            command, check=False, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
        )

    return run
