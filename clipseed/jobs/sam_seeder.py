"""What ``clipseed sam-seed`` does with an image: from opening its maps and masks to the finished label mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from clipseed.data.stamps import FileStamp
from clipseed.data.types import Sample
from clipseed.errors import ImageError, InputError
from clipseed.evaluate.sources import MaskFolder
from clipseed.formats.open import Kind, MaskImport, open_masks
from clipseed.jobs.engine import misfit
from clipseed.pseudo.rules import Rules, seed_labels, voted_labels
from clipseed.segments import Proposals, from_masks
from clipseed.store.mask_cache import MaskCache, holds_cache
from clipseed.store.mask_folder import Labelled
from clipseed.store.mask_records import unpack_proposals
from clipseed.store.masks import mask_note
from clipseed.store.reader import Seeds
from clipseed.types import IGNORE, NO_CLASS


@dataclass(frozen=True)
class Seeded(Labelled):
    """A finished image, with the number of its segments."""

    masks: int = 0

    @property
    def key(self) -> tuple[int, ...]:
        """Nothing is computed together."""
        return ()

    @property
    def cost(self) -> int:
        """Nothing is left to do."""
        return 1


@lru_cache(maxsize=2)
def seeds_at(path: Path) -> Seeds:
    """Opened once per process."""
    return Seeds(path, verify=False)


@lru_cache(maxsize=2)
def masks_at(path: Path, kind: Kind) -> MaskImport:
    """Opened once per process."""
    return MaskCache(path, verify=False) if holds_cache(path) else open_masks(path, kind)


@lru_cache(maxsize=2)
def _ids(path: Path, kind: Kind) -> frozenset[str]:
    return masks_at(path, kind).ids()


def forget() -> None:
    """Close what is open: the next run of this process may find other files under these names."""
    for opened in (seeds_at, masks_at, _ids):
        opened.cache_clear()


@dataclass(frozen=True)
class Seeder:
    """Labels one image, from opening its maps and masks to the finished label mask; runs in worker processes."""

    source: Path
    masks: Path
    kind: Kind
    rules: Rules
    label_map: bool

    def __call__(self, sample: Sample) -> Seeded:
        """Label one image.

        Raises:
            ImageError: its maps or masks cannot be used.
            StoreError: a file is damaged.
        """
        try:
            return self._voted(sample) if self.label_map else self._seeded(sample)
        except InputError as error:  # one damaged file is no reason to stop
            raise ImageError(str(error)) from error

    def _voted(self, sample: Sample) -> Seeded:
        labels = MaskFolder(self.source).read(sample.id)
        stamp = mask_note(self.source / f"{sample.id}.png").image
        proposals, _ = self._proposals(sample.id, (labels.shape[0], labels.shape[1]), stamp)
        found = voted_labels(self.rules, labels, proposals.masks)
        classes = sample.labels
        if classes is None:
            classes = tuple(int(value) - 1 for value in np.unique(labels) if value not in (0, IGNORE))
        return Seeded(sample.id, found, classes, stamp, len(proposals))

    def _seeded(self, sample: Sample) -> Seeded:
        seed = seeds_at(self.source)[sample.id]
        problem = misfit(seed, seed.size)
        if problem is not None:
            raise problem
        proposals, asked = self._proposals(sample.id, seed.size, seed.stamp)
        labels = seed_labels(self.rules, seed, proposals, asked)
        return Seeded(sample.id, labels, tuple(seed.classes.tolist()), seed.stamp, len(proposals))

    def _proposals(self, identifier: str, size: tuple[int, int], stamp: FileStamp) -> tuple[Proposals, Any]:
        """Masks of an image, none where there are none, and the class that each was asked for.

        Raises:
            ImageError: they cannot be used, or were made from another image.
        """
        if self.rules.method == "pixel" or identifier not in _ids(self.masks, self.kind):
            found = from_masks(np.zeros((0, *size), bool))
            return found, np.zeros(0, np.int32)
        masks = masks_at(self.masks, self.kind)
        if isinstance(masks, MaskCache):
            record = masks.record(identifier, size)
            if record.stamp.differs(stamp):
                raise ImageError(f"{self.masks}: its segments are those of another image; run clipseed sam-masks again")
            return unpack_proposals(record), record.class_id
        found = masks.read(identifier, size)
        return found, np.full(len(found), NO_CLASS, np.int32)
