"""Existing masks in PNG: COCO's panoptic maps, maps of instances or superpixels, and folders of binary masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from clipseed.data.labels import read_json
from clipseed.data.listing import clean_id
from clipseed.data.types import check_id
from clipseed.errors import ImageError, InputError
from clipseed.sam.json_masks import ids_below, integer, records, room_for
from clipseed.sam.proposals import Proposals, from_masks
from clipseed.store.masks import IGNORE


def read_values(path: Path, size: tuple[int, int] | None = None) -> npt.NDArray[np.generic]:
    """Stored values of a PNG: palette indices or grey ``(H, W)``, colours ``(H, W, 3)``; transparency is dropped.

    Args:
        path: The file.
        size: Height and width it must have. Looked at before anything is decoded.

    Raises:
        ImageError: missing, or of another size.
        InputError: not a picture, or damaged.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if size is not None and image.size != (size[1], size[0]):
                raise ImageError(
                    f"{path}: masks of {image.size[0]}x{image.size[1]} pixels for a picture of {size[1]}x{size[0]}"
                )
            image.load()
            if image.mode in {"RGB", "RGBA"}:
                return np.asarray(image.convert("RGB"))
            if image.mode == "LA":
                return np.asarray(image)[..., 0]
            return np.asarray(image)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such mask file") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not a PNG") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files.
        raise InputError(f"{path}: damaged mask ({type(error).__name__}: {error})") from error


def split_regions(values: npt.NDArray[np.generic], left_out: int | None, where: str) -> Proposals:
    """A mask for each value of a map ``(H, W)``, ascending, but for the one that is left out.

    Raises:
        ImageError: there are more than fit into memory.
    """
    kinds, region = np.unique(values, return_inverse=True)
    region = region.reshape(values.shape)
    kept = [index for index, kind in enumerate(kinds) if left_out is None or int(kind) != left_out]
    masks = room_for(len(kept), (values.shape[0], values.shape[1]), where)
    for mask, index in zip(masks, kept, strict=True):
        np.equal(region, index, out=mask)
    return from_masks(masks)


class CocoPanoptic:
    """COCO's panoptic format: colour PNGs in which a segment's id is R + 256 G + 65536 B; 0 belongs to no segment.

    The source is the JSON file, whose PNGs lie in the folder of the same name beside it, or such a folder itself.
    """

    def __init__(self, source: Path) -> None:
        """List the pictures.

        Raises:
            InputError: a malformed JSON file, or no PNG folder beside it.
        """
        if source.is_dir():
            self._files = {identifier: source / f"{identifier}.png" for identifier in ids_below(source, ".png")}
            return
        data = read_json(source, "a COCO panoptic file")
        folder = source.with_suffix("")
        if not folder.is_dir():
            raise InputError(f"{source}: its PNG files should be in {folder}, which is no folder")
        names = {}
        for number, item in enumerate(records(data, "images", source)):
            names[integer(item, "id", f"{source}: images[{number}]")] = item.get("file_name")
        self._files = {}
        for number, item in enumerate(records(data, "annotations", source)):
            where = f"{source}: annotations[{number}]"
            png = item.get("file_name")
            picture = names.get(integer(item, "image_id", where))
            if not isinstance(png, str) or not isinstance(picture, str):
                raise InputError(f"{where}: 'file_name', or that of its image, is missing")
            self._files[clean_id(picture, where)] = folder / f"{clean_id(png, where)}.png"

    def ids(self) -> frozenset[str]:
        """Ids of all pictures that have a PNG."""
        return frozenset(self._files)

    def read(self, identifier: str, size: tuple[int, int]) -> Proposals:
        """Segments of a picture of this height and width, by ascending id.

        Raises:
            ImageError: no such picture, another size, or too many segments for the memory.
            InputError: damaged, or not in colours.
        """
        path = self._files.get(identifier)
        if path is None:
            raise ImageError(f"no panoptic PNG for the picture {identifier!r}")
        colours = read_values(path, size)
        if colours.ndim != 3:
            raise InputError(f"{path}: panoptic maps are RGB; this one has palette indices or grey values")
        wide = colours.astype(np.int32)
        return split_regions(wide[..., 0] + 256 * wide[..., 1] + 65536 * wide[..., 2], 0, str(path))


class InstanceMaps:
    """A folder of maps ``<id>.png``, 8 or 16 bits, grey or palette: instances, superpixels, any partition.

    Every value is a mask, 0 too: a map does not say whether 0 is background or a superpixel, and a mask on background
    does no harm. Only 255 in 8-bit maps is left out, VOC's boundary; superpixels of more than 255 regions need 16 bits.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ids(self) -> frozenset[str]:
        """Ids of all PNG files below the folder."""
        return ids_below(self.folder, ".png")

    def read(self, identifier: str, size: tuple[int, int]) -> Proposals:
        """Masks of a picture of this height and width, by ascending value.

        Raises:
            ImageError: no file, another size, or too many masks for the memory.
            InputError: damaged, or in colours.
        """
        path = self.folder / f"{check_id(identifier, str(self.folder))}.png"
        values = read_values(path, size)
        if values.ndim != 2:
            raise InputError(f"{path}: instance maps are palette or grey PNG; colours that are ids are coco-panoptic")
        return split_regions(values, IGNORE if values.dtype == np.uint8 else None, str(path))


class MaskFolders:
    """A folder per picture with a PNG per mask, as SEPL has them: ``<id>/*.png``; what is not 0 is inside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ids(self) -> frozenset[str]:
        """Ids of all folders that hold a PNG."""
        parents = (path.parent.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.png"))
        return frozenset(parents) - {"."}

    def read(self, identifier: str, size: tuple[int, int]) -> Proposals:
        """Masks of a picture of this height and width, sorted by file name, numbers by value.

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
