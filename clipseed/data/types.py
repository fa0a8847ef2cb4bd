"""What a data set is: an ordered list of samples, each an identifier, a file and its image-level labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from clipseed.data.vocabulary import Vocabulary
from clipseed.defaults import MAX_PIXELS
from clipseed.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ID_BYTES = 1024


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        id: POSIX path relative to the image folder, without suffix (``2007_000032``, ``cats/tabby-3``).
        path: The image file.
        labels: Indices into the vocabulary's classes, in the order the annotation gives them, each once; empty when
            the annotation names no class; ``None`` when there is no annotation for this image.
    """

    id: str
    path: Path
    labels: tuple[int, ...] | None


class ImageReader(Protocol):
    """Opens the image of a sample; must survive pickling, because decoding happens in worker processes."""

    def __call__(self, sample: Sample) -> Image:
        """Return the 8-bit RGB image.

        Raises:
            ImageError: the image cannot be read.
        """
        ...

    def file(self, sample: Sample) -> Path | None:
        """The file that the image is read from; ``None`` where it is drawn, or is not there."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """An ordered data set, ready to stream.

    Attributes:
        name: ``voc``, ``coco``, ``folder`` or ``toy``.
        root: Folder the data set was found in; ``None`` for data that is made, not read.
        split: Name of the split, or ``all``.
        samples: In the order of the split file, or sorted by id; without labels where nobody asked for them.
        vocabulary: Classes that labels index, with their texts.
        reader: How to open a sample's image.
        ground_truth: Where ``evaluate`` finds this set's masks when not told: a folder, or ``toy``.
        source: What identifies the data besides name, root and split (label file, image folder, toy seed).
        exif, max_pixels: As images are read.
        notes: What people should know of how files were understood.
    """

    name: str
    root: Path | None
    split: str
    samples: Sequence[Sample]
    vocabulary: Vocabulary
    reader: ImageReader
    ground_truth: str | None = None
    source: Mapping[str, str | int | None] = field(default_factory=dict)
    exif: bool = False
    max_pixels: int | None = MAX_PIXELS
    notes: tuple[str, ...] = ()

    @property
    def manifest(self) -> dict[str, str | int | None]:
        """The ``dataset`` of a manifest: what it is and where everything lies.

        :func:`~clipseed.data.dataset.recorded_set` reads it back.
        """
        root = str(self.root) if self.root else None
        return {
            "name": self.name, "root": root, "split": self.split, "ground_truth": self.ground_truth, **self.source
        }  # fmt: skip


def check_id(text: str, where: str) -> str:
    """Return ``text`` when it can serve as a sample id.

    An id becomes a path below the output folder, so it must not be able to leave it.

    Raises:
        InputError: empty, absolute, containing ``..``, NUL, a line break or a backslash, not Unicode, or too long.
    """
    problem = None
    try:
        length: int | None = len(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        length = None
    if length is None:  # JSON can say "\ud800", no file name can
        problem = "holds half a character"
    elif not text or text == ".":
        problem = "is empty"
    elif any(character in text for character in "\0\r\n\\"):
        problem = "contains a NUL, a line break or a backslash"
    elif PurePosixPath(text).is_absolute() or ".." in PurePosixPath(text).parts:
        problem = "leaves the image folder"
    elif length > MAX_ID_BYTES:
        problem = f"is longer than {MAX_ID_BYTES} bytes"
    if problem:
        raise InputError(f"{where}: the image id {text[:80]!r} {problem}; ids are paths relative to the image folder")
    return text
