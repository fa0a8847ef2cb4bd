"""Reading CAMs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipseed.errors import StoreError
from clipseed.store.cam_records import Cam
from clipseed.store.manifest import Manifest
from clipseed.store.record_file import CamFile
from clipseed.store.record_set import RecordSet

_PARTS = ("options", "vocabulary", "dataset")


class CamSet(RecordSet[Cam, CamFile]):
    """CAMs of a data set: sample id to :class:`~clipseed.store.cam_records.Cam`, in stored order.

    See :class:`~clipseed.store.record_set.RecordSet`.
    """

    what, content, maker, missing = "a CAM file", "CAMs", "command", "no such file"

    def _file(self, path: Path, *, verify: bool) -> CamFile:
        return CamFile(path, verify=verify)

    def _check(self) -> None:
        names = class_names(self.manifest, self.path)
        for file in self._files:
            if len(file.class_counts) > len(names):
                raise StoreError(f"{file.path}: damaged, it has class {len(file.class_counts) - 1} of {len(names)}")

    def classes(self, identifier: str) -> npt.NDArray[np.int32]:
        """Classes of an image ``(K,)``, without reading its maps."""
        file, row = self.place(identifier)
        return file.classes(row)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that ``Cam.classes`` indexes."""
        return class_names(self.manifest, self.path)


def class_names(manifest: Manifest, path: Path) -> tuple[str, ...]:
    """Class names of a CAM file's manifest.

    Raises:
        StoreError: the manifest has another form than every manifest of ours.
    """
    parts = {"model": manifest.get("model", {}), **{part: manifest.get(part) for part in _PARTS}}
    odd = next((part for part, value in parts.items() if not isinstance(value, dict)), None)
    classes = manifest["vocabulary"].get("classes") if odd is None else None
    if not isinstance(classes, list) or not all(
        isinstance(item, dict) and isinstance(item.get("name"), str) for item in classes
    ):
        raise StoreError(f"{path}: damaged, its manifest has no {odd or 'list of classes'!r}")
    return tuple(item["name"] for item in classes)


def open_cams(path: str | Path, *, verify: bool | None = None) -> CamSet:
    """Open CAMs for reading.

    Args:
        path: A CAM file, or a folder of units.
        verify: Read everything and check the checksum first; by default for outputs below 256 MB. Without it, damage is
            found when the damaged record is read.

    Raises:
        StoreError: missing, unfinished, not ours, or damaged.
    """
    return CamSet(Path(path), verify=verify)
