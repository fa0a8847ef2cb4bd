"""Reading folders of label masks, those of clipseed and anybody's."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

from clipseed.data.listing import ids_below
from clipseed.data.paths import is_file
from clipseed.errors import InputError
from clipseed.store.label_masks import LabelMaskNote, label_mask_note, read_label_mask
from clipseed.store.manifest import Manifest
from clipseed.store.places import located
from clipseed.types import LabelMask

MANIFEST = "manifest.json"


class LabelMaskFolder:
    """PNG masks below a folder; the id is the path without suffix. Survives pickling."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)

    @cached_property
    def manifest(self) -> Manifest | None:
        """What is recorded beside the masks; ``None`` where nothing can be read."""
        return read_label_mask_manifest(self.folder)

    def ids(self) -> frozenset[str]:
        """Ids of all PNG files below the folder."""
        return ids_below(self.folder, ".png")

    def has(self, identifier: str) -> bool:
        """Whether the file exists."""
        return is_file(self.path(identifier))

    def read(self, identifier: str) -> LabelMask:
        """The mask ``(H, W)``.

        Raises:
            InputError: it cannot be read.
        """
        return read_label_mask(self.path(identifier))

    def content(self, identifier: str) -> bytes:
        """The bytes of the file.

        Raises:
            InputError: it cannot be read.
        """
        try:
            return self.path(identifier).read_bytes()
        except OSError as error:
            raise InputError(f"{self.path(identifier)}: cannot be read ({error.strerror})") from error

    def note(self, identifier: str) -> LabelMaskNote:
        """What a mask says about itself: classes and image file; nothing where it is not ours."""
        return label_mask_note(self.path(identifier))

    def path(self, identifier: str) -> Path:
        """The file of a mask."""
        return self.folder / f"{identifier}.png"


def read_label_mask_manifest(folder: Path) -> Manifest | None:
    """What is recorded beside masks; ``None`` where nothing can be read. Without ``vocabulary`` it is not ours."""
    try:
        stored = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return located(stored, folder) if isinstance(stored, dict) else None
