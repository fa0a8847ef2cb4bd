"""Writing CAMs: records that know which classes they were made for, and which of these came to nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from clipseed.errors import StoreError
from clipseed.store.cam_records import Cam, cam_format, classes_of
from clipseed.store.empty import (
    Earlier,
    EmptyLabels,
    EmptyList,
    Stage,
    empty_maps,
    nothing_earlier,
    stored_empty_maps,
)
from clipseed.store.manifest import Manifest
from clipseed.store.record_file import RecordFile
from clipseed.store.shards import WHOLE, Shard
from clipseed.store.units import Unit
from clipseed.store.writer import RecordWriter
from clipseed.wording import counted, some


class CamWriter(RecordWriter[Cam]):
    """A :class:`~clipseed.store.writer.RecordWriter` of CAMs; ``cam_dtype`` is ``float16`` or ``float32``.

    Classes without a positive map are listed in ``NAME.empty.csv`` (:mod:`clipseed.store.empty`), with the ``stage``
    that the output comes from (default: as the manifest says), or what is known of ``earlier`` ones.
    """

    def __init__(
        self, out: Path, manifest: Manifest, cam_dtype: str, unit_size: int, *, overwrite: bool = False,
        shard: Shard = WHOLE, stage: Stage | None = None, earlier: Earlier = nothing_earlier,
    ) -> None:  # fmt: skip
        super().__init__(out, manifest, cam_format(cam_dtype), unit_size, overwrite=overwrite, shard=shard)
        self._empty = EmptyList(out, manifest, stage, earlier)

    def _note(self, file: RecordFile[Cam], path: Path) -> None:
        super()._note(file, path)
        self._look(file, path)

    def _adopt(self, file: RecordFile[Cam], path: Path) -> None:
        super()._adopt(file, path)
        self._look(file, path)

    def _look(self, file: RecordFile[Cam], path: Path) -> None:
        """Note classes, and the empty ones, of what counts as stored in this file."""
        empty = stored_empty_maps(file)
        for row, identifier in enumerate(file.ids):
            if self._done[identifier] == path:
                self._empty.add(identifier, classes_of(file, row).tolist(), empty.get(identifier, ()))

    def write(self, unit: Unit, records: Sequence[Cam]) -> None:
        """As :meth:`~clipseed.store.writer.RecordWriter.write`."""
        super().write(unit, records)
        for record in records:
            self._empty.add(record.id, record.classes.tolist(), empty_maps(record.classes.tolist(), record.maps))

    def forget_unlike(self, classes: Mapping[str, Sequence[int] | None]) -> None:
        """Take images that are stored with other classes than these for not done: their labels were corrected.

        Those that have no labels any more (``None``) leave the output.

        Raises:
            StoreError: that are most of them, as with the label file of another data set.
        """
        known = {key: row for key, row in self._empty.classes.items() if key in self._done and key in classes}
        gone = {key for key in known if classes[key] is None}
        stale = {key for key in known.keys() - gone if tuple(classes[key] or ()) != known[key]}
        if 2 * len(gone) > len(self._done):
            raise StoreError(
                f"{self.out}: {len(gone)} of the {len(self._done)} images that it holds have no labels now; is this "
                "the right label file? Choose another --out, or start again with --overwrite"
            )
        if stale:
            self.notes.append(
                f"{counted(len(stale), 'image is', 'images are')} stored with other labels; computed again"
            )
        if gone:
            self.notes.append(
                f"{counted(len(gone), 'image has', 'images have')} no labels any more "
                f"({some(gone, 3)}); gone from {self.out}"
            )
        self.forget(stale | gone)

    def forget(self, keys: Collection[str]) -> None:
        """As :meth:`~clipseed.store.writer.RecordWriter.forget`."""
        before = set(self._done)
        super().forget(keys)
        self._empty.forget(before - self._done.keys())

    def _empty_labels(self, *, write: bool = False) -> EmptyLabels:
        return self._empty.write() if write else self._empty.found()
