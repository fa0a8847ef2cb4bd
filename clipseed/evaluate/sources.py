"""Where true masks come from: folders of PNG, annotation tools, the toy world; and finding what the user means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from clipseed.data.dataset import ImageFinder, image_finder
from clipseed.data.listing import read_split
from clipseed.data.orientation import read_header, turned_back
from clipseed.data.paths import is_file, is_folder
from clipseed.data.toy.dataset import HELD_OUT_SEED, toy_mask
from clipseed.data.vocabulary import Vocabulary
from clipseed.errors import ImageError, InputError
from clipseed.formats.cvat import CvatMasks, is_cvat_folder
from clipseed.formats.label_studio import LabelStudioMasks
from clipseed.store.label_mask_folder import LabelMaskFolder
from clipseed.types import LabelMask


class MaskSource(Protocol):
    """Masks by sample id."""

    @property
    def name(self) -> str:
        """What to call it in messages and tables."""
        ...

    def ids(self) -> frozenset[str]:
        """Ids that have a mask."""
        ...

    def has(self, identifier: str) -> bool:
        """Whether this id has a mask (cheaper than :meth:`ids`)."""
        ...

    def read(self, identifier: str) -> LabelMask:
        """The mask ``(H, W)``.

        Raises:
            InputError: it cannot be read.
        """
        ...

    def content(self, identifier: str) -> bytes:
        """What the mask follows from: equal bytes mean equal masks.

        Raises:
            InputError: it cannot be read.
        """
        ...


class ToyTruth:
    """Exact masks of the toy world."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.name = f"toy:{seed}"

    def ids(self) -> frozenset[str]:
        """None: every number is a scene, so there is no list that predictions could fall short of."""
        return frozenset()

    def has(self, identifier: str) -> bool:
        """Whether it is a toy id (every number is a scene)."""
        number = identifier.removeprefix("toy_")
        return number != identifier and number.isdecimal() and len(number) <= 20

    def read(self, identifier: str) -> LabelMask:
        """Draw one mask."""
        return toy_mask(self.seed, identifier)

    def content(self, identifier: str) -> bytes:
        """Its name."""
        return f"{self.name} {identifier}".encode()


def is_annotated(path: Path) -> bool:
    """Whether a path holds masks of an annotation tool: a JSON file, or an unpacked export of CVAT."""
    return is_cvat_folder(path) or (path.suffix.lower() == ".json" and is_file(path))


def open_annotated(path: Path, vocabulary: Vocabulary) -> MaskSource:
    """Masks of an annotation tool, as that shows images: turned as their EXIF says.

    Raises:
        InputError: a malformed file.
    """
    return CvatMasks(path, vocabulary) if is_folder(path) else LabelStudioMasks(path, vocabulary)


class AsStored:
    """Masks of an annotation tool on the pixels as image files store them.

    Such tools show photos turned as their EXIF says, and that is how their masks lie.

    Args:
        source: The masks.
        find: Where images are, by id.
    """

    def __init__(self, source: MaskSource, find: ImageFinder) -> None:
        self.name, self._source, self._find = source.name, source, find

    def ids(self) -> frozenset[str]:
        """Ids that have a mask."""
        return self._source.ids()

    def has(self, identifier: str) -> bool:
        """Whether this id has a mask."""
        return self._source.has(identifier)

    def read(self, identifier: str) -> LabelMask:
        """The mask; as the tool gave it where the image is not there, or where it fits the stored one alone."""
        mask, path = self._source.read(identifier), self._find.path(identifier)
        if path is None:
            return mask
        try:
            header = read_header(path)
        except ImageError:  # whoever needs the image says so
            return mask
        return turned_back(mask, header.orientation) if mask.shape == header.shown else mask

    def content(self, identifier: str) -> bytes:
        """What the mask follows from, besides its image."""
        return self._source.content(identifier)


def find_ground_truth(
    given: str | None,
    dataset: Mapping[str, str | int | None] | None,
    option: str = "--gt",
    vocabulary: Vocabulary | None = None,
    exif: bool = False,
) -> MaskSource:
    """The ground truth the user means.

    Args:
        given: A folder below the working folder, below the data set's root or below ``$CLIPSEED_VOC``: masks, or an
            unpacked "Segmentation mask 1.1" of CVAT; a JSON export of Label Studio; or ``toy``. Without it the data
            set's own is taken.
        dataset: Of a manifest.
        option: What messages call it.
        vocabulary: Classes that the labels of an annotation tool are names of.
        exif: Images are turned as their EXIF says, and masks of an annotation tool are wanted like that.

    Raises:
        InputError: nothing is found there.
    """
    recorded = dataset or {}
    if given is None:
        own = recorded.get("ground_truth")
        if own is None:
            raise InputError("no ground truth is known for these CAMs; name the mask folder with --gt DIR")
        given = str(own)
    if given == "toy" or given.startswith("toy:"):
        seed = given.removeprefix("toy").removeprefix(":") or str(recorded.get("toy_seed", HELD_OUT_SEED))
        if not seed.isdecimal() or len(seed) > 20:
            raise InputError(f"{option} {given[:40]}: the part behind 'toy:' must be a number of at most 20 digits")
        return ToyTruth(int(seed))
    bases = [Path()]
    bases += [Path(str(root)) for root in (recorded.get("root"), os.environ.get("CLIPSEED_VOC")) if root]
    for base in bases:
        if vocabulary and is_annotated(base / given):
            return _lying(open_annotated(base / given, vocabulary), recorded, exif)
        if is_folder(base / given):
            return LabelMaskFolder(base / given)
    looked = ", ".join(str((base / given).absolute()) for base in dict.fromkeys(bases))
    if given.lower().endswith(".zip") and is_file(Path(given)):
        raise InputError(f"{option} {given}: unpack it, and name the folder")
    raise InputError(f"{option} {given}: no such folder (looked for {looked})")


def _lying(source: MaskSource, dataset: Mapping[str, Any], exif: bool) -> MaskSource:
    """Masks of an annotation tool as the images of a data set are read."""
    return source if exif or not dataset.get("images") else AsStored(source, image_finder(dataset))


def find_split(given: str, truth: MaskSource, dataset: Mapping[str, str | int | None] | None) -> tuple[str, list[str]]:
    """Name and ids of a split given as a file, or as the name of a list in the devkit.

    Raises:
        InputError: no such list.
    """
    bases = [Path(str(root)) for root in ((dataset or {}).get("root"), os.environ.get("CLIPSEED_VOC")) if root]
    if isinstance(truth, LabelMaskFolder):
        bases.append(truth.folder.absolute().parent)
    candidates = [base / "ImageSets" / "Segmentation" / f"{given}.txt" for base in [*bases, Path()]]
    for path in (Path(given), *candidates):
        if is_file(path):
            return path.stem, read_split(path, folders=("JPEGImages",))
    looked = ", ".join(map(str, dict.fromkeys(candidates)))
    raise InputError(f"--split {given}: neither a file nor a list of the devkit (looked for {looked})")
