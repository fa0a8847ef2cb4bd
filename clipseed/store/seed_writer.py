"""Writing seeds: records that know which classes they were made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from clipseed.errors import StoreError
from clipseed.store.manifest import Manifest
from clipseed.store.records import SeedMap, classes_of, seed_format
from clipseed.store.shard import RecordFile
from clipseed.store.share import WHOLE, Share
from clipseed.store.writer import RecordWriter, some


class SeedWriter(RecordWriter[SeedMap]):
    """A :class:`~clipseed.store.writer.RecordWriter` of seeds; ``cam_dtype`` is ``float16`` or ``float32``."""

    def __init__(
        self, out: Path, manifest: Manifest, cam_dtype: str, unit_size: int, *, overwrite: bool = False,
        share: Share = WHOLE,
    ) -> None:  # fmt: skip
        super().__init__(out, manifest, seed_format(cam_dtype), unit_size, overwrite=overwrite, share=share)
        self._classes: dict[str, tuple[int, ...]] = {}

    def _note(self, file: RecordFile[SeedMap], path: Path) -> None:
        super()._note(file, path)
        for row, identifier in enumerate(file.ids):
            self._classes.setdefault(identifier, tuple(classes_of(file, row).tolist()))

    def forget_unlike(self, classes: Mapping[str, Sequence[int] | None]) -> None:
        """Take pictures that are stored with other classes than these for not done: their labels were corrected.

        Those that have no labels any more (``None``) leave the output.

        Raises:
            StoreError: that are most of them, as with the label file of another data set.
        """
        known = {key: self._classes[key] for key in self._done if key in classes}
        gone = {key for key in known if classes[key] is None}
        stale = {key for key in known.keys() - gone if tuple(classes[key] or ()) != known[key]}
        if 2 * len(gone) > len(self._done):
            raise StoreError(
                f"{self.out}: {len(gone)} of the {len(self._done)} images that it holds have no labels now; is this "
                "the right label file? Choose another --out, or start again with --overwrite"
            )
        if stale:
            self.notes.append(f"{len(stale)} pictures are stored with other labels; they are computed again")
        if gone:
            self.notes.append(f"{len(gone)} images have no labels any more ({some(gone)}); they leave {self.out}")
        self.forget(stale | gone)
