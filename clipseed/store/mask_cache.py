"""Reading mask caches."""

from __future__ import annotations

from pathlib import Path

from clipseed.data.paths import is_folder
from clipseed.errors import StoreError
from clipseed.store.mask_records import MaskRecord, mask_format
from clipseed.store.record_set import SHARD_PATTERN, RecordSet
from clipseed.store.shard import RecordFile

_PARTS = ("options", "model", "dataset", "vocabulary", "source")


class MaskCache(RecordSet[MaskRecord, RecordFile[MaskRecord]]):
    """Masks of a data set: sample id to :class:`~clipseed.store.mask_records.MaskRecord`, in stored order.

    See :class:`~clipseed.store.record_set.RecordSet`.
    """

    what, content, maker = "a mask cache", "masks", "clipseed sam-masks"
    missing = "no such mask cache; clipseed sam-masks makes one"

    def _file(self, path: Path, *, verify: bool) -> RecordFile[MaskRecord]:
        return RecordFile(path, mask_format(), verify=verify)

    def _check(self) -> None:
        odd = [part for part in _PARTS if not isinstance(self.manifest.get(part), dict)]
        if odd:
            raise StoreError(f"{self.path}: damaged, its manifest has no {odd[0]!r}")


def holds_cache(path: Path) -> bool:
    """Whether a path is, or is going to be, a mask cache rather than masks in a foreign format."""
    if is_folder(path):
        return any(path.glob(SHARD_PATTERN))
    return path.suffix.lower() in {".h5", ".hdf5"}
