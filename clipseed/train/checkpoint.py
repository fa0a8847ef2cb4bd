"""What is kept of a training run: safetensors with a JSON text in the header, never a pickle.

One file holds weights, the optimiser's state and what decided them, so that renaming it is all that makes a checkpoint
the newest. Random generators are not in it: every step seeds them anew (``train/loop.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipseed.errors import StoreError, WeightsError
from clipseed.store.files import replacing
from clipseed.store.manifest import OtherSettings

Settings = Mapping[str, Any]
_WEIGHTS, _OPTIMIZER = "weights/", "optimizer/"
_HEADER = "clipseed"


@dataclass(frozen=True)
class Checkpoint:
    """A run after ``step`` steps.

    Attributes:
        settings: Everything that decides the weights.
        best: ``{"step": …, "score": …}`` of the best validation so far, or ``None``.
        weights: State dict of what is trained.
        optimizer: The optimiser's state: for each parameter's name, tensors and plain numbers.
    """

    step: int
    settings: dict[str, Any]
    best: dict[str, Any] | None
    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]


def save_checkpoint(
    path: Path,
    step: int,
    settings: Settings,
    best: Mapping[str, Any] | None,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint; a kill or a full disk leaves the one before.

    Raises:
        StoreError: it cannot be written.
    """
    tensors = {_WEIGHTS + name: value for name, value in module.state_dict().items()}
    numbers: dict[str, dict[str, Any]] = {}
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{key}/{names[parameter]}"] = value
            else:
                numbers.setdefault(names[parameter], {})[key] = value
    about = {"kind": "checkpoint", "step": step, "settings": dict(settings), "best": best, "numbers": numbers}
    _write(path, tensors, about)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        StoreError: damaged, or no checkpoint.
    """
    try:
        tensors, about = _read(path)
        if about["kind"] != "checkpoint":
            raise ValueError(f"holds {about['kind']}")
        optimizer: dict[str, dict[str, Any]] = {name: dict(state) for name, state in about["numbers"].items()}
        weights = {}
        for name, value in tensors.items():
            if name.startswith(_WEIGHTS):
                weights[name.removeprefix(_WEIGHTS)] = value
            else:
                key, parameter = name.removeprefix(_OPTIMIZER).split("/", 1)
                optimizer.setdefault(parameter, {})[key] = value
        return Checkpoint(about["step"], about["settings"], about["best"], weights, optimizer)
    except (WeightsError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"{path}: no checkpoint that training can go on from ({error}); delete it to begin anew"
        ) from error


def refuse_other_settings(checkpoint: Checkpoint, settings: Settings, path: Path) -> None:
    """Refuse to go on with options other than those a run began with.

    Raises:
        OtherSettings: naming each that differs.
    """
    wanted = _flat(json.loads(json.dumps(dict(settings))))  # tuples as the file gives them back
    there = _flat(checkpoint.settings)
    names = [*wanted, *(name for name in there if name not in wanted)]
    pairs = [(name, there.get(name), wanted.get(name)) for name in names]
    changed = [f"{name} {_short(before)} -> {_short(now)}" for name, before, now in pairs if before != now]
    if changed:
        raise OtherSettings(
            f"{path} was made with other settings ({', '.join(changed)}); choose another --out, or start from its "
            "weights with --init"
        )


def _flat(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Settings of settings under names of their own: ``options.lr``."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, Mapping)
        found.update(_flat(value, f"{prefix}{name}.") if nested else {prefix + name: value})
    return found


def restore(checkpoint: Checkpoint, module: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Put a checkpoint's weights and optimiser state in place.

    Raises:
        WeightsError: they do not fit.
    """
    _fill(module, checkpoint.weights, path)
    names = {parameter: name for name, parameter in module.named_parameters()}
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {}
    for index, parameter in enumerate(learned):
        if names[parameter] in checkpoint.optimizer:
            kept = checkpoint.optimizer[names[parameter]]
            state[index] = {key: _laid_out_like(parameter, value) for key, value in kept.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_weights(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write weights alone, with a description (``kind`` and whatever JSON can hold).

    Raises:
        StoreError: it cannot be written.
    """
    _write(path, {_WEIGHTS + name: value for name, value in weights.items()}, {"kind": "weights", **about})


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and description out of a file of :func:`save_weights`, or out of a checkpoint.

    Raises:
        WeightsError: missing, damaged, or not ours.
    """
    tensors, about = _read(path)
    weights = {name.removeprefix(_WEIGHTS): value for name, value in tensors.items() if name.startswith(_WEIGHTS)}
    return weights, about


def is_ours(path: Path) -> bool:
    """Whether a safetensors file has our metadata; damaged and missing ones count as ours, whose reader says so."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            return _HEADER in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return True


def start_from(module: nn.Module, path: Path) -> str:
    """Give a module the weights of a file (``--init``); returns the file's digest.

    Raises:
        WeightsError: the file is no such file, or its weights do not fit.
    """
    weights, about = read_weights(path)
    _fill(module, weights, path)
    return str(about["digest"])


def _fill(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    own = module.state_dict()
    missing, foreign = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    wrong = [f"lacks {name}" for name in missing[:3]] + [f"also has {name}" for name in foreign[:3]]
    wrong += [f"{name} is {tuple(weights[name].shape)}, not {tuple(own[name].shape)}" for name in sorted(shapes)[:3]]
    if wrong:
        raise WeightsError(f"{path}: weights of another model ({'; '.join(wrong)})")
    module.load_state_dict(dict(weights))


def _laid_out_like(parameter: Tensor, value: Any) -> Any:
    """The same numbers in the parameter's memory format, in which the optimiser's rounding is the same, too."""
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype, device="cpu", requires_grad=False).copy_(value)
    return value


def _write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    from safetensors.torch import save

    # Copies: safetensors wants every tensor to own its memory, and tied weights share it.
    kept = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    digest = _digest(kept, json.dumps(about, sort_keys=True))
    content = save(kept, {_HEADER: json.dumps({**about, "digest": digest}, sort_keys=True)})
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            about = json.loads((opened.metadata() or {})[_HEADER])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        digest = about.pop("digest")
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such weights file") from error
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: not written by clipseed's training") from error
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: damaged, or no safetensors file ({error})") from error
    if digest != _digest(tensors, json.dumps(about, sort_keys=True)):
        raise WeightsError(f"{path}: damaged, its checksum does not fit")
    return tensors, {**about, "digest": digest}


def _digest(tensors: Mapping[str, Tensor], about: str) -> str:
    """Digest of everything in a file: safetensors itself would not notice a flipped bit."""
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
