"""Label Studio: tasks with brush masks to be corrected, and the corrected ones back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt

from clipseed.data.json_fields import integer, numbers
from clipseed.data.label_studio import REGION_KINDS, names_of, read_tasks
from clipseed.data.labels import read_json
from clipseed.data.vocabulary import Vocabulary
from clipseed.errors import InputError
from clipseed.formats.brush import brush_code, brush_mask
from clipseed.formats.palette import css_color
from clipseed.formats.polygons import filled
from clipseed.formats.values import value_of
from clipseed.formats.writing import Encoded, Item, TextFile, Writer, compact, regions
from clipseed.types import IGNORE, LabelMask

LOCAL_FILES = "/data/local-files/?d="
"""What Label Studio serves files of its own machine by."""


class LabelStudioWriter(Writer):
    """``tasks.json`` with masks as predictions, which annotators accept and correct, and the project's ``config.xml``.

    ``data.id`` holds the image's id, so that corrected masks find back. Browsers turn images as their EXIF says.
    """

    placements = ("reference", "copy", "link")
    turned = True
    addresses = True
    ignores = ("keep", "background", "drop")
    background = None

    def encode(self, item: Item) -> Encoded:
        """The task."""
        height, width = item.size
        common = {
            "to_name": "image", "original_width": width, "original_height": height, "image_rotation": 0,
        }  # fmt: skip
        results: list[dict[str, Any]] = []
        shown = []
        for value, name, pixels in regions(item.labels, self.table):
            code = {"format": "rle", "rle": list(brush_code(pixels)), "brushlabels": [name]}
            results.append(
                {"id": f"{item.number}-{value}", "from_name": "label", "type": "brushlabels", **common, "value": code}
            )
            shown += [name] if value not in (0, IGNORE) else []
        if shown:
            results.append(
                {"id": f"{item.number}-tags", "from_name": "tags", "type": "choices", **common,
                 "value": {"choices": shown}}
            )  # fmt: skip
        address = self.url + quote(item.image.lstrip("/"))
        task = {
            "data": {"image": address, "id": item.id},
            "predictions": [{"model_version": "clipseed", "result": results}],
        }
        return Encoded({}, {"tasks.json": (compact(task),)})

    def texts(self) -> list[TextFile]:
        """Tasks and labeling configuration."""
        labels = "".join(
            f"    <Label value={quoteattr(name)} background={quoteattr(css_color(value))}/>\n"
            for value, name in self.table.annotated.items()
        )
        choices = "".join(f"    <Choice value={quoteattr(name)}/>\n" for name in self.table.names)
        config = (
            '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
            f'  <BrushLabels name="label" toName="image">\n{labels}  </BrushLabels>\n'
            f'  <Choices name="tags" toName="image" choice="multiple" showInline="true">\n{choices}  </Choices>\n'
            "</View>\n"
        )
        return [TextFile("tasks.json", ("[\n", "\n]\n")), TextFile("config.xml", (config,))]


class LabelStudioMasks:
    """Label masks by image id, as annotators left them: later regions lie over earlier ones, the rest is background.

    Tasks that nobody has annotated have no mask, and neither has one whose annotation says nothing at all: it does not
    state the size of the image.

    Args:
        path: The JSON export.
        vocabulary: Classes that labels are names of.
        predicted: Take what is there to be corrected for corrected.

    Raises:
        InputError: not such an export, or two tasks of one image.
    """

    def __init__(self, path: Path, vocabulary: Vocabulary, *, predicted: bool = False) -> None:
        self.path, self.name, self._vocabulary = path, str(path), vocabulary
        data = read_json(path, "an export of Label Studio")
        if predicted and isinstance(data, list):
            data = [{**item, "annotations": item.get("predictions", [])} for item in data if isinstance(item, dict)]
        self._regions: dict[str, tuple[str, list[dict[str, Any]]]] = {}
        for task in read_tasks(data, path):
            if not task.results or not any("original_width" in result for result in task.results):
                continue
            if task.id in self._regions:
                raise InputError(f"{task.where}: another task has the image {task.id!r}, too")
            self._regions[task.id] = task.where, task.results

    def ids(self) -> frozenset[str]:
        """Ids of the images that are annotated."""
        return frozenset(self._regions)

    def has(self, identifier: str) -> bool:
        """Whether an image is annotated."""
        return identifier in self._regions

    def read(self, identifier: str) -> LabelMask:
        """The mask ``(H, W)``.

        Raises:
            InputError: no such image, an unknown class, or a region that is malformed or of another kind.
        """
        if identifier not in self._regions:
            raise InputError(f"{self.path}: nobody has annotated an image {identifier!r}")
        where, results = self._regions[identifier]
        sized = next(result for result in results if "original_width" in result)
        size = (integer(sized, "original_height", where), integer(sized, "original_width", where))
        if not all(0 < side < 1 << 16 for side in size):
            raise InputError(f"{where}: an image of {size[1]}x{size[0]} pixels")
        mask = np.zeros(size, np.uint8)
        for result in results:
            kind = result.get("type")
            if kind in ("choices", "relation"):
                continue
            if kind not in REGION_KINDS:
                raise InputError(f"{where}: regions are {', '.join(REGION_KINDS)}, not {str(kind)[:40]!r}")
            names = names_of(result.get("value"), kind, where)
            if len(names) != 1:
                raise InputError(f"{where}: a region has {len(names)} labels; it needs one")
            mask[_pixels(result["value"], kind, size, where)] = value_of(names[0], self._vocabulary, where)
        return mask

    def content(self, identifier: str) -> bytes:
        """What the mask follows from."""
        return json.dumps(self._regions[identifier][1], sort_keys=True).encode()


def _pixels(value: dict[str, Any], kind: str, size: tuple[int, int], where: str) -> npt.NDArray[np.bool_]:
    """Pixels ``(H, W)`` of a region; its coordinates are per cent of the sides."""
    height, width = size
    if kind == "brushlabels":
        if value.get("format") != "rle" or not isinstance(value.get("rle"), list):
            raise InputError(f"{where}: a brush without 'rle'")
        return brush_mask(value["rle"], size, where)
    if kind == "polygonlabels":
        points = value.get("points")
        if not isinstance(points, list) or len(points) < 3:
            raise InputError(f"{where}: a polygon needs three points")
        corners = np.array([numbers(point, 2, "points", where) for point in points])
    else:
        left, top, wide, high = (numbers(value.get(key), 1, key, where)[0] for key in ("x", "y", "width", "height"))
        turn = np.deg2rad(numbers(value.get("rotation", 0), 1, "rotation", where)[0])
        # About its first corner, in pixels: per cent of the two sides are not equally long.
        along = np.array([[0, 0], [wide * width, 0], [wide * width, high * height], [0, high * height]])
        turned = along @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        corners = turned / (width, height) + (left, top)
    return filled(corners / 100 * (width, height), size)
