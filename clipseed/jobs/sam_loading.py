"""What ``clipseed sam-masks`` does with an image in a decoding process: open and shrink it, or read its masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipseed.data.stamps import UNKNOWN, FileStamp, file_stamp
from clipseed.data.types import ImageReader, Sample
from clipseed.defaults import SegmentFormat
from clipseed.errors import ImageError, InputError
from clipseed.formats.open import MaskImport, open_masks
from clipseed.sam.backend import fitted_size
from clipseed.store.mask_records import MaskRecord, pack_proposals


@dataclass(frozen=True)
class LoadedForSam:
    """A decoded image, shrunk to what SAM sees of it: ``(h, w, 3)`` uint8."""

    sample: Sample
    size: tuple[int, int]
    pixels: npt.NDArray[np.uint8]
    stamp: FileStamp = UNKNOWN

    @property
    def key(self) -> tuple[int, ...]:
        """Images of all sizes are encoded together."""
        return ()

    @property
    def cost(self) -> int:
        """Each is as much work as any other, because SAM's input has one size."""
        return 1


@dataclass(frozen=True)
class ShrinkingLoader:
    """Decodes a sample, and shrinks what is longer than ``max_side`` as SAM itself would; runs in worker processes."""

    reader: ImageReader
    max_side: int

    def __call__(self, sample: Sample) -> LoadedForSam:
        """Decode one sample.

        Raises:
            ImageError: it cannot be read.
        """
        stamp = file_stamp(self.reader.file(sample))
        image = self.reader(sample)
        size = (image.height, image.width)
        if self.max_side and max(size) > self.max_side:
            height, width = fitted_size(size, self.max_side)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return LoadedForSam(sample, size, np.asarray(image).copy(), stamp)


@dataclass(frozen=True)
class Stored:
    """An image's masks, from a worker process that found or made them."""

    record: MaskRecord

    @property
    def key(self) -> tuple[int, ...]:
        """Nothing is computed together any more."""
        return ()

    @property
    def cost(self) -> int:
        """None is left."""
        return 1


@lru_cache(maxsize=2)
def existing_masks(path: Path, kind: SegmentFormat) -> MaskImport:
    """Opened once per worker process."""
    return open_masks(path, kind)


@dataclass(frozen=True)
class ExistingLoader:
    """Reads an image's masks from files, after looking at the image for its size; runs in worker processes."""

    reader: ImageReader
    path: Path
    kind: SegmentFormat

    def __call__(self, sample: Sample) -> Stored:
        """Read and compress one image's masks.

        Raises:
            ImageError: image or masks are missing, damaged, or do not fit each other.
        """
        stamp = file_stamp(self.reader.file(sample))
        image = self.reader(sample)
        size = (image.height, image.width)
        try:
            proposals = existing_masks(self.path, self.kind).read(sample.id, size)
        except InputError as error:  # one damaged file is no reason to stop
            raise ImageError(str(error)) from error
        return Stored(replace(pack_proposals(sample.id, size, proposals), stamp=stamp))
