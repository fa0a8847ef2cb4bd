"""Reading segments files."""

from __future__ import annotations

from pathlib import Path

from clipseed.data.paths import is_folder
from clipseed.errors import ImageError, StoreError
from clipseed.segments import Segments
from clipseed.store.record_file import RecordFile
from clipseed.store.record_set import UNIT_PATTERN, RecordSet
from clipseed.store.segment_records import SegmentRecord, segment_format, unpack_segments

_PARTS = ("options", "model", "dataset", "vocabulary", "source")


class SegmentSet(RecordSet[SegmentRecord, RecordFile[SegmentRecord]]):
    """Masks of a data set: sample id to :class:`~clipseed.store.segment_records.SegmentRecord`, in stored order.

    See :class:`~clipseed.store.record_set.RecordSet`. Also a :class:`~clipseed.formats.open.SegmentSource`, whose masks
    may be smaller than their image.
    """

    what, content, maker = "a segments file", "masks", "clipseed sam-masks"
    missing = "no such segments file; clipseed sam-masks makes one"

    def _file(self, path: Path, *, verify: bool) -> RecordFile[SegmentRecord]:
        return RecordFile(path, segment_format(), verify=verify)

    def ids(self) -> frozenset[str]:
        """Ids of all images that were looked at, with or without masks."""
        return frozenset(self)

    def record(self, identifier: str, size: tuple[int, int]) -> SegmentRecord:
        """What is stored of an image of this height and width.

        Raises:
            ImageError: nothing, or the image had another size.
        """
        if identifier not in self:
            raise ImageError(f"{self.path}: holds no image {identifier!r}")
        found = self[identifier]
        if found.size != size:
            raise ImageError(
                f"{self.path}: its masks were made for an image of {found.size[1]}x{found.size[0]} pixels, not "
                f"{size[1]}x{size[0]}"
            )
        return found

    def read(self, identifier: str, size: tuple[int, int]) -> Segments:
        """Masks of an image of this height and width, as they are stored.

        Raises:
            ImageError: none, or for another size, or too many for the memory.
            StoreError: damaged.
        """
        return unpack_segments(self.record(identifier, size))

    def _check(self) -> None:
        odd = [part for part in _PARTS if not isinstance(self.manifest.get(part), dict)]
        if odd:
            raise StoreError(f"{self.path}: damaged, its manifest has no {odd[0]!r}")


def holds_segments(path: Path) -> bool:
    """Whether a path is, or is going to be, a segments file rather than masks in a foreign format."""
    if is_folder(path):
        return any(path.glob(UNIT_PATTERN))
    return path.suffix.lower() in {".h5", ".hdf5"}
