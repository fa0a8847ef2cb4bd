"""Reading CLIP weights from files without ever running code that a file brings along."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clipseed.data.paths import never_ends
from clipseed.errors import WeightsError

Activation = Literal["quickgelu", "gelu"]
_BOOKKEEPING = {"input_resolution", "context_length", "vocab_size", "attn_mask", "visual.input_resolution"}


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of one weights file and what the file itself tells about the model they belong to.

    Attributes:
        state: State dict with open_clip's (= OpenAI's) names.
        activation: ``quickgelu`` when the file can only be OpenAI's; ``None`` when it does not tell.
        config: Content of an ``open_clip_config.json`` beside the file, if any.
        sha256: Digest of the file's bytes.
    """

    path: Path
    state: dict[str, Tensor]
    activation: Activation | None
    config: dict[str, Any] | None
    sha256: str


def read_checkpoint(path: Path) -> Checkpoint:
    """Read ``.safetensors``, ``.npz``, a ``torch.save`` file, or OpenAI's TorchScript archive.

    Args:
        path: The file, or a folder holding ``open_clip_config.json`` and one weights file.

    Raises:
        WeightsError: missing, damaged, of another kind, or containing anything but plain tensors.
    """
    path = _file_in(path) if path.is_dir() else path
    if never_ends(path):
        raise WeightsError(f"{path}: a pipe or a device, not a file of weights")
    scripted = False
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                state = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        elif _is_torchscript(path):
            scripted = True
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
    tensors = _plain_state(state, path)
    activation: Activation | None = "quickgelu" if scripted or _is_openai_mixed_precision(tensors) else None
    return Checkpoint(path, tensors, activation, _sidecar(path), file_sha256(path))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _file_in(folder: Path) -> Path:
    for pattern in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "*.safetensors", "*.bin", "*.pt"):
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise WeightsError(f"{folder}: no weights file in this folder (looked for *.safetensors, *.bin, *.pt)")


def _sidecar(path: Path) -> dict[str, Any] | None:
    config = path.parent / "open_clip_config.json"
    if not config.is_file():
        return None
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{config}: not valid JSON ({error})") from error
    return data if isinstance(data, dict) and isinstance(data.get("model_cfg"), dict) else None


def _plain_state(state: Any, path: Path) -> dict[str, Tensor]:
    """Unwrap training checkpoints (``state_dict``, ``module.``) and drop entries that are not weights."""
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path}: holds no state dict")
    tensors = {
        str(key).removeprefix("module."): value
        for key, value in state.items()
        if isinstance(value, Tensor) and str(key).removeprefix("module.") not in _BOOKKEEPING
    }
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors")
    return tensors


def _is_openai_mixed_precision(state: dict[str, Tensor]) -> bool:
    """OpenAI's checkpoints keep linear weights in half precision and everything else in single.

    That survives conversion to other file types and to float32: the linear weights stay exact in half precision, the
    embeddings and norms do not. No other published CLIP has this pattern.
    """

    def exact(key: str) -> bool | None:
        value = state.get(key)
        return None if value is None else bool((value.to(torch.float16).to(value.dtype) == value).all())

    linear = [exact(f"visual.transformer.resblocks.0.{key}") for key in ("attn.in_proj_weight", "mlp.c_fc.weight")]
    others = [exact("visual.positional_embedding"), exact("visual.class_embedding")]
    single = [state[key].dtype == torch.float32 for key in ("visual.class_embedding",) if key in state]
    return linear == [True, True] and others == [False, False] and all(single)


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
