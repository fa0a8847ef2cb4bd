"""The toy world as a data set: 300 held-out scenes, drawn on demand, and the same as a VOC devkit on disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipseed.data.types import ImageSet, Sample
from clipseed.data.vocabulary import Vocabulary
from clipseed.errors import InputError
from clipseed.toy.shapes import CLASS_NAMES
from clipseed.toy.world import Scene, lay_out

HELD_OUT_SEED = 0
HELD_OUT_COUNT = 300
"""The scored scenes. Training draws from seeds 1000 and above only (see ``tools/toy/train_clip.py``)."""


@dataclass(frozen=True)
class ToyReader:
    """Draws the image of a toy sample."""

    seed: int

    def __call__(self, sample: Sample) -> Image.Image:
        """Render the scene that the sample's id names."""
        return Image.fromarray(toy_scene(self.seed, sample.id).image())

    def file(self, sample: Sample) -> None:
        """There is none."""
        return


class _ToySamples(Sequence[Sample]):
    """Samples of the world, laid out when asked for."""

    def __init__(self, seed: int, count: int) -> None:
        self._seed, self._count = seed, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:  # type: ignore[override]
        if isinstance(index, slice):
            return [self._sample(k) for k in range(*index.indices(self._count))]
        return self._sample(range(self._count)[index])

    def _sample(self, index: int) -> Sample:
        identifier = toy_id(index)
        return Sample(identifier, Path(f"{identifier}.png"), lay_out(self._seed, index).labels)


def toy_id(index: int) -> str:
    """Sample id of a scene."""
    return f"toy_{index:06d}"


def is_toy_id(identifier: str) -> bool:
    """Whether an id is that of a scene, drawn or saved as a devkit."""
    return re.fullmatch(r"toy_\d{6,}", identifier) is not None


def toy_scene(seed: int, identifier: str) -> Scene:
    """Scene that a toy sample id names.

    Raises:
        InputError: not a toy id.
    """
    number = identifier.removeprefix("toy_")
    if number == identifier or not number.isdecimal() or len(number) > 20:
        raise InputError(f"{identifier!r} is not an image of the toy set")
    return lay_out(seed, int(number))


def toy_mask(seed: int, identifier: str) -> npt.NDArray[np.uint8]:
    """Ground truth of a toy sample: 0 background, class index + 1."""
    return toy_scene(seed, identifier).mask()


def toy_set(vocabulary: Vocabulary, seed: int = HELD_OUT_SEED, count: int = HELD_OUT_COUNT) -> ImageSet:
    """The toy data set.

    Raises:
        InputError: the vocabulary does not list the toy classes in their order.
    """
    if vocabulary.class_names != CLASS_NAMES:
        raise InputError(f"--classes {vocabulary.name}: the toy set needs the classes {', '.join(CLASS_NAMES)}")
    samples: Sequence[Sample] = _ToySamples(seed, count)
    split = "held-out" if seed == HELD_OUT_SEED and count == HELD_OUT_COUNT else f"seed-{seed}"
    return ImageSet("toy", None, split, samples, vocabulary, ToyReader(seed), f"toy:{seed}", {"toy_seed": seed})


def save_devkit(folder: Path, seed: int = HELD_OUT_SEED, count: int = HELD_OUT_COUNT) -> int:
    """Write scenes as a VOC devkit (``JPEGImages``, ``SegmentationClass``, ``Annotations``, ``ImageSets``).

    Images are lossless PNG, so that a devkit gives the numbers of the built-in set. The list is called ``val`` for
    the scored scenes and ``train`` for those of any other seed. Returns how many were written.

    Raises:
        InputError: the folder holds the other list already. Ids repeat from seed to seed, so the scenes of one would
            overwrite those of the other, and training images be scored.
    """
    from clipseed.store.masks import write_mask

    split, other = ("val", "train") if seed == HELD_OUT_SEED else ("train", "val")
    lists = folder / "ImageSets" / "Segmentation"
    if (lists / f"{other}.txt").exists():
        raise InputError(f"{folder}: holds scenes of another seed ({other}.txt); choose another folder")
    for name in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    ids = []
    for index in range(count):
        scene, identifier = lay_out(seed, index), toy_id(index)
        ids.append(identifier)
        Image.fromarray(scene.image()).save(folder / "JPEGImages" / f"{identifier}.png")
        write_mask(folder / "SegmentationClass" / f"{identifier}.png", scene.mask())
        (folder / "Annotations" / f"{identifier}.xml").write_text(_annotation(identifier, scene), encoding="utf-8")
    (lists / f"{split}.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    return count


def _annotation(identifier: str, scene: Scene) -> str:
    height, width = scene.size
    lines = [
        "<annotation>",
        "  <folder>toy</folder>",
        f"  <filename>{escape(identifier)}.png</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    for item in scene.objects:
        rows, columns = np.nonzero(item.visible)
        box = (columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1)
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        lines.append(f"  <object><name>{CLASS_NAMES[item.class_id]}</name><bndbox>{corners}</bndbox></object>")
    return "\n".join([*lines, "</annotation>", ""])
