"""Label masks, and on request the scores behind them as CAMs: the output of ``crf`` and ``predict``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipseed.data.stamps import FileStamp
from clipseed.data.types import Sample
from clipseed.defaults import EmptyPolicy
from clipseed.store.cam_records import Cam
from clipseed.store.cam_writer import CamWriter
from clipseed.store.empty import Earlier, Stage, nothing_earlier
from clipseed.store.files import freshen
from clipseed.store.label_mask_writer import Labelled, LabelMaskWriter
from clipseed.store.manifest import Manifest
from clipseed.store.shards import WHOLE, Shard
from clipseed.store.units import Unit, missing_units
from clipseed.store.writer import Finished


@dataclass(frozen=True)
class ScoredMask(Labelled):
    """A finished image, with its scores where they are kept."""

    soft: Cam | None = None


class ScoredMaskWriter:
    """Writes masks always, scores on request; an image is done when both have it.

    Args:
        out: Folder for the masks; see :class:`~clipseed.store.label_mask_writer.LabelMaskWriter`.
        soft: CAM file for the scores, or ``None``.
        manifest: What decides the masks and, without a ``soft_manifest``, the scores.
        unit_size: Samples per unit.
        overwrite, shard, empty, earlier: As of the writer of masks.
        soft_manifest: What decides the scores, where they are CAMs of an earlier step; ``soft_stage``: that step.
    """

    def __init__(
        self, out: Path, soft: Path | None, manifest: Manifest, unit_size: int, *, overwrite: bool = False,
        shard: Shard = WHOLE, empty: EmptyPolicy = "background", earlier: Earlier = nothing_earlier,
        soft_manifest: Manifest | None = None, soft_stage: Stage | None = None,
    ) -> None:  # fmt: skip
        self.masks = LabelMaskWriter(
            out, manifest, unit_size, overwrite=overwrite, shard=shard, empty=empty, earlier=earlier
        )
        self.out = self.folder = out
        self._shard, self._unit_size = shard, unit_size
        self._soft = (
            CamWriter(
                soft,
                soft_manifest or manifest,
                "float16",
                unit_size,
                overwrite=overwrite,
                shard=shard,
                stage=soft_stage,
                earlier=earlier,
            )
            if soft
            else None
        )

    def __enter__(self) -> ScoredMaskWriter:
        self.masks.__enter__()
        try:
            if self._soft:
                self._soft.__enter__()
        except BaseException:
            self.masks.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        if self._soft:
            self._soft.__exit__(*error)
        self.masks.__exit__(*error)

    @property
    def done(self) -> set[str]:
        """Ids that are stored."""
        return self.masks.done & self._soft.done if self._soft else self.masks.done

    @property
    def notes(self) -> list[str]:
        """What is to be told about what was there before."""
        return [*self.masks.notes, *(self._soft.notes if self._soft else [])]

    def follow(self, classes: Mapping[str, tuple[int, ...] | None], stamp: Callable[[str], FileStamp]) -> None:
        """Forget what was made for other labels or from other image files (both writers' ``follow``).

        Args:
            classes: Of each image; ``None``: whatever was found in it.
            stamp: From an id to its image file.
        """
        self.masks.follow(classes, stamp)
        if self._soft:
            known = {key: row for key, row in classes.items() if row is not None}
            self._soft.forget_unlike(known)
            self._soft.follow(classes.keys(), stamp)

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """Masks that were not stored for what they are."""
        return self.masks.left_out

    def own(self, items: Sequence[str]) -> list[str]:
        """Those of all ids that are this run's to do."""
        return self.masks.own(items)

    def units(self, samples: Sequence[Sample]) -> list[Unit]:
        """This run's units, without what is done."""
        return missing_units(samples, self._unit_size, self._shard, self.done)

    def write(self, unit: Unit, records: Sequence[ScoredMask]) -> None:
        """Store a unit."""
        self.masks.write(unit, records)
        if self._soft:
            soft = [mask.soft for mask in records if mask.soft is not None and mask.id not in self._soft.done]
            self._soft.write(unit, soft)

    def finish(self, ids: Sequence[str], skipped: Sequence[tuple[str, str]] = ()) -> Finished:
        """End the run; see the writers."""
        if self._soft is None:
            return self.masks.finish(ids, skipped)
        self._soft.finish(ids, skipped)
        finished = self.masks.finish(ids, skipped)
        freshen(self.out, self._soft.out)  # the masks are what a command means that is told nothing
        return finished
