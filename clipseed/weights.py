"""Reading weight files of any model without ever running code that a file brings along, and checking that they fit."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipseed.digest import file_sha256
from clipseed.errors import WeightsError


@dataclass(frozen=True)
class WeightsFile:
    """What one file holds.

    Attributes:
        state: Tensors by name, those of a training checkpoint (``state_dict``, ``module.``) unwrapped.
        texts: Texts beside them by name: string arrays of an ``.npz``, the metadata of a ``.safetensors``.
        scripted: It is a TorchScript archive.
        sha256: Digest of the file's bytes.
    """

    path: Path
    state: dict[str, Tensor]
    texts: dict[str, str]
    scripted: bool
    sha256: str


def read_weights(path: Path) -> WeightsFile:
    """Read ``.safetensors``, ``.npz``, a ``torch.save`` file, or a TorchScript archive.

    Raises:
        WeightsError: missing, damaged, of another kind, or containing anything but plain tensors.
    """
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise WeightsError(f"{path}: {what}, not a file of weights")
    texts: dict[str, str] = {}
    scripted = False
    try:
        if found := _not_weights(path):
            raise WeightsError(f"{path}: {found}")
        if path.suffix == ".safetensors":
            state: Any
            state, texts = _read_safetensors(path)
        elif path.suffix == ".npz":
            state, texts = _read_arrays(path)
        elif scripted := _is_torchscript(path):
            state = _read_torchscript(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such weights file") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: holds more than plain tensors, or is damaged; refused, because loading it could run code "
            f"({str(error).splitlines()[0][:120]})"
        ) from error
    except Exception as error:  # each reader raises errors of its own on damaged files
        raise WeightsError(f"{path}: not a readable weights file ({type(error).__name__}: {error})") from error
    return WeightsFile(path, _plain_state(state, path), texts, scripted, file_sha256(path))


def check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, advice: str) -> None:
    """Compare a file's tensors with those that a model has.

    Args:
        state: The file's.
        expected: The model's, of which only the shapes matter.
        path: The file.
        advice: The way out, which ends the message.

    Raises:
        WeightsError: tensors are missing, left over, of another shape, or not finite.
    """
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    shapes = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing (first {missing[0]!r})")
    if extra:
        problems.append(f"{len(extra)} do not belong to it (first {extra[0]!r})")
    if shapes:
        key = shapes[0]
        problems.append(f"{key!r} is {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}")
    if problems:
        raise WeightsError(f"{path}: does not fit the model: {'; '.join(problems)}; {advice}")
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"{path}: tensor {key!r} contains NaN or infinity; the file is damaged")


def count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules stand behind a prefix such as ``transformer.resblocks.``."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def take_over(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a model without memory the tensors of a file, so that nothing is initialised only to be replaced; frozen."""
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False).eval()


_GIT_LFS = b"version https://git-lfs.github.com/"
_WEB_PAGE = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")
_BEGINNING = 1024


def _not_weights(path: Path) -> str | None:
    """What commonly comes instead of weights when a download goes wrong, told by a file's first bytes."""
    with path.open("rb") as stream:
        beginning = stream.read(_BEGINNING)
    if not beginning:
        return "an empty file; fetch it again"
    if beginning.startswith(_GIT_LFS):
        return (
            "a Git LFS pointer, a few lines that stand for the weights; fetch the file itself, with git lfs pull or by "
            "the download link of its page"
        )
    if beginning.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_WEB_PAGE):
        return (
            "a web page (HTML), not weights: the server answered with a page, often one to log in or an error; open "
            "the address in a browser and download the file itself"
        )
    if _is_text(beginning):
        first = beginning.decode("utf-8", "ignore").strip().splitlines()
        return f"a text file, not weights; it begins with {first[0][:60]!r}" if first else "a text file without text"
    return None


def _is_text(beginning: bytes) -> bool:
    """Readable characters and line breaks only: no weights, because those hold numbers as bytes."""
    try:
        text = beginning.decode("utf-8")
    except UnicodeDecodeError as error:  # a character may be cut off at the end
        if error.start < len(beginning) - 3 or len(beginning) < _BEGINNING:
            return False
        text = beginning[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\t\r\n" for character in text)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        texts: dict[str, str] = file.metadata() or {}
    return load_file(path), texts


def _read_arrays(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    state: dict[str, Tensor] = {}
    texts: dict[str, str] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            values = arrays[key]
            if values.dtype.kind == "U":
                texts[key] = str(values)
            else:
                state[key] = torch.from_numpy(values)
    return state, texts


def _plain_state(state: Any, path: Path) -> dict[str, Tensor]:
    """Unwrap training checkpoints and drop entries that are no tensors."""
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: holds no state dict")
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors")
    return tensors


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class _ScriptObject:
    """Stands in for a TorchScript module: keeps its attributes, has none of its code."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


_STORAGE_TYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _ScriptUnpickler(pickle.Unpickler):
    """Unpickles a TorchScript archive's object tree, allowing tensors and attribute holders only."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{prefix}/data.pkl")))
        self._archive, self._prefix = archive, prefix
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild_tensor
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        if module == "collections" and name == "OrderedDict":
            return dict
        if module.startswith("__torch__"):
            return _ScriptObject
        raise pickle.UnpicklingError(f"{module}.{name} is not a tensor or module")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, numel = pid
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._prefix}/data/{key}"))
            self._storages[key] = torch.frombuffer(content, dtype=dtype, count=numel)
        return self._storages[key]


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = _ScriptUnpickler(archive, pickled.removesuffix("/data.pkl")).load()
    state: dict[str, Tensor] = {}

    def collect(holder: object, prefix: str) -> None:
        for key, value in vars(holder).items():
            if isinstance(value, Tensor):
                state[prefix + key] = value
            elif isinstance(value, _ScriptObject):
                collect(value, f"{prefix}{key}.")

    collect(root, "")
    return state
