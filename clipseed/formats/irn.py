"""CAMs as IRNet and CLIP-ES keep them: one ``.npy`` per image with a pickled dictionary.

``keys`` are class indices (K,), ``high_res`` (IRNet) and ``attn_highres`` (CLIP-ES) maps (K, H, W) at the image's size,
``cam`` (IRNet) the same at a quarter of it, as a torch tensor. Such files can run code when they are loaded as NumPy
loads them; here they are read by an unpickler that knows arrays and tensors and refuses everything else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from clipseed.errors import InputError
from clipseed.formats.writing import Encoded, Item, Writer

_STRIDE = 4
"""IRNet works at a quarter of the image's sides, rounded up."""
_MAPS = ("attn_highres", "high_res", "cam")


class IrnWriter(Writer):
    """``<id>.npy`` for each image; masks and images are not part of it."""

    placements = ("reference",)
    cams = True

    def encode(self, item: Item) -> Encoded:
        """The dictionary."""
        import torch

        assert item.cam is not None
        classes, maps = item.cam
        height, width = item.size
        small = ((height - 1) // _STRIDE + 1, (width - 1) // _STRIDE + 1)
        strided = np.zeros((len(maps), *small), np.float32)
        for row, values in zip(strided, maps, strict=True):
            row[:] = cv2.resize(values, (small[1], small[0]), interpolation=cv2.INTER_LINEAR)
        fine = maps.astype(np.float16)
        found = {
            "keys": classes.astype(np.int64), "cam": torch.from_numpy(strided), "high_res": fine, "attn_highres": fine,
        }  # fmt: skip
        buffer = io.BytesIO()
        np.save(buffer, np.array(found, object), allow_pickle=True)
        return Encoded({f"{item.id}.npy": buffer.getvalue()})


def read_irn(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Class indices ``(K,)`` and maps ``(K, h, w)`` of a file, the finest maps that it has.

    Raises:
        InputError: missing, malformed, or made of anything but arrays and tensors.
    """
    try:
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            if shape != () or dtype != np.dtype(object):
                raise InputError(f"{path}: an array, not a dictionary of CAMs")
            held = _Refusing(stream).load()
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(f"{path}: no dictionary of CAMs ({str(error)[:160]})") from error
    found = held.item() if isinstance(held, np.ndarray) and held.shape == () else held
    if not isinstance(found, dict) or "keys" not in found:
        raise InputError(f"{path}: no dictionary of CAMs ('keys' and 'high_res' or 'attn_highres')")
    maps = next((found[name] for name in _MAPS if name in found), None)
    try:
        keys, values = np.asarray(found["keys"], np.int64), np.asarray(maps, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: its maps are no numbers") from error
    if keys.ndim != 1 or (len(keys) and (values.ndim != 3 or len(values) != len(keys))):
        raise InputError(f"{path}: {keys.shape} keys do not fit maps of {values.shape}")
    return keys, values


def _tensor_from_bytes(content: bytes) -> Any:
    """What torch stores of a tensor inside of a pickle, read without running code."""
    import torch

    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class _Refusing(pickle.Unpickler):
    """Knows what arrays and tensors are made of."""

    def find_class(self, module: str, name: str) -> Any:
        """An allowed function or class.

        Raises:
            UnpicklingError: anything else.
        """
        found = _allowed().get((module.replace("numpy.core", "numpy._core"), name))
        if found is None:
            raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}, which could run code")
        return found


def _allowed() -> dict[tuple[str, str], Callable[..., Any]]:
    import _codecs
    import collections

    import torch

    arrays: Any = np.ndarray.__reduce__(np.zeros(1))[0]
    scalars: Any = np.float32(0).__reduce__()[0]
    return {
        ("numpy._core.multiarray", "_reconstruct"): arrays,
        ("numpy._core.multiarray", "scalar"): scalars,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _codecs.encode,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch.storage", "_load_from_bytes"): _tensor_from_bytes,
    }
