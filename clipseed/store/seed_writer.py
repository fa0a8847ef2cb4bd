"""Writing seeds: records that know which classes they were made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from clipseed.store.manifest import Manifest
from clipseed.store.records import SeedMap, classes_of, seed_format
from clipseed.store.shard import RecordFile
from clipseed.store.share import WHOLE, Share
from clipseed.store.writer import RecordWriter


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

        A shard that holds one of them goes, and its other pictures are computed again too.
        """
        stale = {key for key, known in self._classes.items() if key in classes and tuple(classes[key] or ()) != known}
        shards = {self._done[key] for key in stale} - {self.out}
        for path in shards:
            path.unlink()
        self._done = {key: path for key, path in self._done.items() if key not in stale and path not in shards}
        if stale:
            self.notes.append(f"{len(stale)} pictures are stored with other labels; they are computed again")
