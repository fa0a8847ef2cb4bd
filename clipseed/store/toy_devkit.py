"""The built-in world written as a VOC devkit, for whatever reads one."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from clipseed.data.toy.dataset import HELD_OUT_COUNT, HELD_OUT_SEED, toy_id
from clipseed.data.toy.shapes import CLASS_NAMES
from clipseed.data.toy.world import Scene, lay_out
from clipseed.errors import InputError
from clipseed.store.label_masks import write_label_mask


def save_devkit(folder: Path, seed: int = HELD_OUT_SEED, count: int = HELD_OUT_COUNT) -> int:
    """Write scenes as a VOC devkit (``JPEGImages``, ``SegmentationClass``, ``Annotations``, ``ImageSets``).

    Images are lossless PNG, so that a devkit gives the numbers of the built-in set. The list is called ``val`` for
    the scored scenes and ``train`` for those of any other seed. Returns how many were written.

    Raises:
        InputError: the folder holds the other list already. Ids repeat from seed to seed, so the scenes of one would
            overwrite those of the other, and training images be scored.
    """
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
        write_label_mask(folder / "SegmentationClass" / f"{identifier}.png", scene.mask())
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
