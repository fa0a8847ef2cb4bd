"""What a segmenter said about a few images while it learned: kept beside its checkpoint, for people to look at.

``previews/ID/image.png``, ``truth.png``, ``prediction-000250.png`` and, where they are made, ``pseudo-000250.png``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clipseed.store.files import replacing, storage_errors
from clipseed.store.label_masks import read_label_mask, write_label_mask
from clipseed.types import LabelMask

FOLDER = "previews"
SHOWN = 4
"""Images that are kept."""


@dataclass(frozen=True)
class Preview:
    """One image.

    Attributes:
        image: Its file.
        truth: Its ground truth.
        steps: For each step, what there is: ``prediction`` and ``pseudo``, masks ``(H, W)``.
    """

    image: Path
    truth: LabelMask
    steps: Mapping[int, Mapping[str, LabelMask]]


def keep_preview(
    folder: Path, place: int, step: int, image: Image.Image, truth: LabelMask, masks: Mapping[str, LabelMask]
) -> None:
    """Keep what was said about an image at a step.

    Args:
        folder: Of the run.
        place: Number of the image.
        step: Steps done.
        image: The image.
        truth: Its ground truth.
        masks: ``prediction``, ``pseudo``.

    Raises:
        StoreError: it cannot be written.
    """
    home = folder / FOLDER / f"{place:02d}"
    with storage_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        with replacing(home / "image.png") as temporary:
            image.save(temporary, format="PNG")
        write_label_mask(home / "truth.png", truth)
        for name, mask in masks.items():
            write_label_mask(home / f"{name}-{step:06d}.png", mask)


def read_previews(folder: Path) -> list[Preview]:
    """All that a run kept, image by image; none where it kept nothing."""
    found = []
    for home in sorted((folder / FOLDER).glob("*/")):
        if not ((home / "image.png").is_file() and (home / "truth.png").is_file()):
            continue
        steps: dict[int, dict[str, LabelMask]] = {}
        for path in sorted(home.glob("*-*.png")):
            name, _, step = path.stem.rpartition("-")
            if name in ("prediction", "pseudo") and step.isdecimal():
                steps.setdefault(int(step), {})[name] = read_label_mask(path)
        found.append(Preview(home / "image.png", read_label_mask(home / "truth.png"), dict(sorted(steps.items()))))
    return found
