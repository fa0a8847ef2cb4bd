"""Reading features files."""

from __future__ import annotations

from pathlib import Path

from clipseed.errors import StoreError
from clipseed.store.feature_records import Feature, feature_format
from clipseed.store.record_file import RecordFile
from clipseed.store.record_set import RecordSet

_PARTS = ("options", "model", "dataset")


class FeatureSet(RecordSet[Feature, RecordFile[Feature]]):
    """Features of a data set: sample id to :class:`~clipseed.store.feature_records.Feature`, in stored order.

    See :class:`~clipseed.store.record_set.RecordSet`.
    """

    what, content, maker = "a features file", "features", "clipseed prompts --features"
    missing = "no such features file; clipseed prompts --features makes one"

    def _file(self, path: Path, *, verify: bool) -> RecordFile[Feature]:
        return RecordFile(path, feature_format(), verify=verify)

    def _check(self) -> None:
        odd = [part for part in _PARTS if not isinstance(self.manifest.get(part), dict)]
        if odd:
            raise StoreError(f"{self.path}: damaged, its manifest has no {odd[0]!r}")
        lengths = {len(file.index["feature"]) // len(file) for file in self._files if len(file)}
        if len(lengths) > 1:
            raise StoreError(f"{self.path}: damaged, its features have the lengths {sorted(lengths)}")
