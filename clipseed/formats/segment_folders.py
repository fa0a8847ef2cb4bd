"""A folder per image with a binary PNG per segment, as SEPL has them."""

from __future__ import annotations

from pathlib import Path

from clipseed.data.types import check_id
from clipseed.errors import ImageError
from clipseed.formats.png import read_values
from clipseed.segments import Segments, from_masks, room_for


class SegmentFolders:
    """A folder per image with a PNG per mask, as SEPL has them: ``<id>/*.png``; what is not 0 is inside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ids(self) -> frozenset[str]:
        """Ids of all folders that hold a PNG."""
        parents = (path.parent.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.png"))
        return frozenset(parents) - {"."}

    def read(self, identifier: str, size: tuple[int, int]) -> Segments:
        """Masks of an image of this height and width, sorted by file name, numbers by value.

        Raises:
            ImageError: no folder, another size, or too many masks for the memory.
            InputError: a damaged file.
        """
        folder = self.folder / check_id(identifier, str(self.folder))
        if not folder.is_dir():
            raise ImageError(f"{folder}: no such mask folder")
        files = [path for path in folder.glob("*.png") if not path.name.startswith(".")]
        files.sort(key=lambda path: (path.stem.zfill(20) if path.stem.isdecimal() else path.stem, path.name))
        masks = room_for(len(files), size, str(folder))
        for mask, path in zip(masks, files, strict=True):
            values = read_values(path, size)
            mask[:] = values.any(axis=2) if values.ndim == 3 else values != 0
        return from_masks(masks)
