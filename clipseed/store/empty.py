"""Labels that end with nothing: classes of an image whose map has no positive value, or that got no pixel.

A wrong label, a word that the model does not know and a prompt that is too strict all look like this, and a label mask
that is all background where the label says "sheep" teaches a segmenter that sheep are background. So every output says
which labels came to nothing, and at which stage: derived from what is stored, so that it holds for runs that were
resumed, cut into shards, done by other machines, or merged.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from clipseed.defaults import EmptyPolicy
from clipseed.errors import StoreError
from clipseed.store.files import csv_text, write_text
from clipseed.store.manifest import Manifest
from clipseed.store.names import list_beside

if TYPE_CHECKING:
    from clipseed.store.cam_records import Cam
    from clipseed.store.record_file import RecordFile

NOTHING_COMPETES = "nothing competes with it: no background words (--background) and no other class"
_VALUES = 1 << 22
"""Values of maps that are looked at together."""
_IGNORE = 255


def empty_maps(classes: Sequence[int], maps: npt.NDArray[np.floating[Any]]) -> tuple[int, ...]:
    """Those of the classes ``(K,)`` whose map ``(K, h, w)`` has no positive value."""
    return tuple(int(k) for k, values in zip(classes, maps, strict=True) if not (values > 0).any())


def without_pixel(classes: Sequence[int], labels: npt.NDArray[np.uint8]) -> tuple[int, ...]:
    """Those of the classes that no pixel of a label mask ``(H, W)`` has (mask value = class + 1)."""
    counts = np.bincount(labels.ravel(), minlength=256)
    return tuple(k for k in classes if not counts[k + 1])


def background_to_ignore(labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The label mask with 255 in place of 0: what is not labelled may be what lost its label."""
    return np.where(labels == 0, np.uint8(_IGNORE), labels)


def stored_empty_maps(file: RecordFile[Cam]) -> dict[str, tuple[int, ...]]:
    """Classes without a positive value by id, for every image of a CAM file.

    Raises:
        StoreError: the maps cannot be read back.
    """
    counts = np.diff(file.index["class_offset"])
    cells = np.repeat(file.grids.astype(np.int64).prod(axis=1), counts)
    starts = np.concatenate([[0], np.cumsum(cells)])
    positive = np.zeros(len(cells), bool)
    first = 0
    try:
        while first < len(cells):
            last = max(first + 1, int(np.searchsorted(starts, starts[first] + _VALUES, side="right")) - 1)
            values = file.file["cam"][int(starts[first]) : int(starts[last])] > 0
            positive[first:last] = np.logical_or.reduceat(values, starts[first:last] - starts[first])
            first = last
    except OSError as error:
        raise StoreError(f"{file.path}: damaged, its maps cannot be read back") from error
    classes = file.index["class_id"]
    found: dict[str, list[int]] = {}
    rows = np.repeat(np.arange(len(counts)), counts)
    for k in np.flatnonzero(~positive):
        found.setdefault(file.ids[int(rows[k])], []).append(int(classes[k]))
    return {key: tuple(row) for key, row in found.items()}


@dataclass(frozen=True)
class EmptyLabel:
    """A class of an image that came to nothing.

    Attributes:
        id: Of the image.
        label: Class name.
        stage: Command at which it vanished: ``cam``, ``refine``, ``crf``, ``threshold``, ``sam-seed`` or ``label``.
        reason: Why, as far as is known.
    """

    id: str
    label: str
    stage: str
    reason: str


@dataclass(frozen=True)
class EmptyLabels:
    """All of an output.

    Attributes:
        labels: The empty ones.
        of: How many labels the images have in all.
        masks: What became of the masks that lack them (``--empty``); ``None``: they are classes without a positive map.
        file: Where they are listed; ``None`` where there are none, or another run's end is waited for.
    """

    labels: tuple[EmptyLabel, ...] = ()
    of: int = 0
    masks: EmptyPolicy | None = None
    file: Path | None = None

    @property
    def images(self) -> int:
        """How many images have one."""
        return len({item.id for item in self.labels})

    @property
    def most(self) -> bool:
        """Whether more than half of all labels are empty."""
        return 2 * len(self.labels) > self.of

    def counts(self, part: Literal["label", "stage", "reason"]) -> list[tuple[str, int]]:
        """How often each class, stage or reason occurs, the commonest first."""
        return Counter(getattr(item, part) for item in self.labels).most_common()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json`` and ``--report``."""
        return {
            "count": len(self.labels),
            "of": self.of,
            "images": self.images,
            "masks": self.masks,
            "file": None if self.file is None else str(self.file),
            "classes": dict(self.counts("label")),
            "stages": dict(self.counts("stage")),
            "reasons": dict(self.counts("reason")),
            "labels": [asdict(item) for item in self.labels],
        }


@dataclass(frozen=True)
class Stage:
    """Where labels may vanish.

    Attributes:
        name: The command.
        why: The reason, given how many classes the image has.
        masks: As of :class:`EmptyLabels`.
    """

    name: str
    why: Callable[[int], str]
    masks: EmptyPolicy | None


def stage_of(manifest: Manifest) -> Stage:
    """The stage that an output with this manifest comes from."""
    kind = str(manifest.get("kind") or "source")
    return Stage(kind, partial(_why, manifest, kind), (manifest.get("options") or {}).get("empty"))


def _why(manifest: Manifest, kind: str, classes: int) -> str:
    if kind == "refine":
        return "spreading left no patch of it that stands out"
    if kind == "crf":
        return "other labels won every pixel, or none is sure"
    if kind == "label":
        return "no patch speaks for it, or other labels won every pixel"
    if kind == "threshold":
        return "no pixel of it exceeds the background and all other classes"
    if kind == "sam-seed":
        return "no segment and no pixel was given to it"
    if kind != "cam":
        return "the source has no pixel of it"
    method = manifest.get("method")
    if method not in ("softmax-gradcam", "gradcam"):
        return "its score is the same in every patch"
    words = (manifest.get("vocabulary") or {}).get("background") or (manifest.get("options") or {}).get("prompts")
    if method == "softmax-gradcam" and classes == 1 and not words:
        return NOTHING_COMPETES
    if (manifest.get("options") or {}).get("paper"):
        return "no patch speaks for it, or the softmax is so sure that the released code's gradient vanishes"
    return "no patch speaks for it: the model sees something else"


Earlier = Callable[[str, int], "tuple[str, str] | None"]
"""Stage and reason of a label (image id, class) that had come to nothing in the source already, else ``None``."""


def nothing_earlier(identifier: str, class_id: int) -> None:
    """The first stage has no source."""


class EmptyList:
    """Which labels of an output are empty; both writers keep one.

    Args:
        out: The output, ``NAME.h5`` or a folder.
        manifest: What it is, with the names of its classes.
        stage: Where the output comes from (default: as the manifest says).
        earlier: Asked about every empty label whether it was empty before.
    """

    def __init__(
        self, out: Path, manifest: Manifest, stage: Stage | None = None, earlier: Earlier = nothing_earlier
    ) -> None:
        self.path = list_beside(out, "empty")
        self.classes: dict[str, tuple[int, ...]] = {}
        """Classes of every image that is known, by id."""
        self._names, self._stage, self._earlier = class_names(manifest), stage or stage_of(manifest), earlier
        self._empty: dict[str, tuple[int, ...]] = {}
        self._elsewhere: list[EmptyLabel] = []

    def add(self, identifier: str, classes: Sequence[int], empty: Sequence[int]) -> None:
        """Note an image; what was known of it before goes."""
        self.classes[identifier] = tuple(classes)
        self._empty.pop(identifier, None)
        if empty:
            self._empty[identifier] = tuple(empty)

    def add_listed(self, labels: Iterable[EmptyLabel]) -> None:
        """Note labels of images that the output does not hold."""
        self._elsewhere += labels

    def forget(self, identifiers: Iterable[str]) -> None:
        """Forget images that are made again."""
        for key in identifiers:
            self.classes.pop(key, None)
            self._empty.pop(key, None)

    def found(self, only: Iterable[str] | None = None) -> EmptyLabels:
        """The empty labels by image id, of all images or ``only`` of some."""
        ids = sorted(self.classes if only is None else self.classes.keys() & set(only))
        labels = [self._label(key, k) for key in ids for k in self._empty.get(key, ())]
        of = sum(len(self.classes[key]) for key in ids) + len(self._elsewhere)
        return EmptyLabels((*labels, *self._elsewhere), of, self._stage.masks)

    def _label(self, identifier: str, class_id: int) -> EmptyLabel:
        stage, reason = self._earlier(identifier, class_id) or (
            self._stage.name,
            self._stage.why(len(self.classes[identifier])),
        )
        return EmptyLabel(identifier, self.name(class_id), stage, reason)

    def name(self, class_id: int) -> str:
        """What a class is called."""
        return _name(self._names, class_id)

    def write(self) -> EmptyLabels:
        """Write the list beside the output, or remove an older one where there is nothing to list.

        Raises:
            StoreError: it cannot be written.
        """
        found = self.found()
        if not found.labels:
            self.path.unlink(missing_ok=True)
            return found
        rows = ((item.id, item.label, item.stage, item.reason) for item in found.labels)
        write_text(self.path, csv_text(("id", "class", "stage", "reason"), rows))
        return EmptyLabels(found.labels, found.of, found.masks, self.path)


def read_empty(out: Path) -> list[EmptyLabel]:
    """What is listed beside an output; nothing where there is no list, or none of ours."""
    try:
        with list_beside(out, "empty").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, ValueError, csv.Error):
        return []
    return [EmptyLabel(*row) for row in rows[1:] if len(row) == 4]


def listed_earlier(listed: Iterable[EmptyLabel], manifest: Manifest) -> Earlier:
    """Answers from lists that were written before, of outputs with the same classes."""
    known, names = {(item.id, item.label): (item.stage, item.reason) for item in listed}, class_names(manifest)
    return lambda identifier, class_id: known.get((identifier, _name(names, class_id)))


def class_names(manifest: Manifest) -> tuple[str, ...]:
    """Class names, where a manifest has any."""
    words = manifest.get("vocabulary")
    classes = words.get("classes") if isinstance(words, dict) else None
    return tuple(str(item["name"]) for item in classes or ())


def _name(names: Sequence[str], class_id: int) -> str:
    return names[class_id] if class_id < len(names) else f"mask value {class_id + 1}"


def earlier_in(
    source: Path,
    manifest: Manifest,
    empty_there: Callable[[str], tuple[Sequence[int], Sequence[int]]],
) -> Earlier:
    """Answers whether labels had come to nothing in a source, and where.

    Args:
        source: CAMs or label masks; the list beside them knows of stages before theirs.
        manifest: Theirs.
        empty_there: Classes of an image of the source, and those of them that are empty in it.
    """
    known, stage = listed_earlier(read_empty(source), manifest), stage_of(manifest)

    def earlier(identifier: str, class_id: int) -> tuple[str, str] | None:
        classes, empty = empty_there(identifier)
        if class_id not in empty:
            return None
        return known(identifier, class_id) or (stage.name, stage.why(len(classes)))

    return earlier
