"""Loading a SAM: Meta's checkpoints, small ones as arrays, or whatever a user's own function makes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipseed.device import pick_device, pick_dtype
from clipseed.digest import file_sha256
from clipseed.errors import ClipseedError, UsageError, WeightsError
from clipseed.sam.architecture import SIZES, assemble, size_name
from clipseed.sam.backend import SamBackend
from clipseed.sam.checkpoint import read_sam_checkpoint
from clipseed.sam.model_backend import ModelBackend, SamInfo
from clipseed.sam.predictor_backend import PredictorBackend


def load_sam(
    checkpoint: str | Path | None,
    device: str | torch.device = "auto",
    *,
    factory: str | None = None,
    precision: str = "auto",
    size: str | None = None,
) -> SamBackend:
    """Load a frozen SAM.

    Args:
        checkpoint: ``.pth`` of Meta (ViT-B, L or H), or a smaller SAM as ``.safetensors`` or ``.npz``; optional with a
            factory.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        factory: ``module:function`` called with the checkpoint's path (or ``None``) and the device's name, for other
            models. It returns a model with SAM's ``image_encoder``, ``prompt_encoder`` and ``mask_decoder``, or a
            predictor with ``set_image`` and ``predict_torch``. The module is looked for in the current folder, too.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``: type of the image encoder; ``auto`` is fp32 on a CPU and
            half precision on a GPU.
        size: Insist on ``vit_b``, ``vit_l`` or ``vit_h``.

    Raises:
        WeightsError: the checkpoint is missing, damaged, not a SAM's, or of another size than asked for.
        UsageError: device, precision, size or factory do not exist or do not fit; segment_anything is not installed.
    """
    device = pick_device(device)
    dtype = pick_dtype(precision, device)
    path = None if checkpoint is None else Path(checkpoint)
    if factory is not None:
        if path is not None and not path.exists():
            raise WeightsError(f"{path}: no such SAM checkpoint file (see --checkpoint)")
        return _from_factory(factory, path, device, dtype, precision)
    if path is None:
        raise UsageError(
            "a SAM is needed: give its checkpoint with --checkpoint FILE, or --sam-factory MODULE:FUNCTION"
        )
    if size is not None and size not in SIZES:
        raise UsageError(f"SAM size {size}: choose {', '.join(SIZES)}")
    read = read_sam_checkpoint(path)
    model, config = assemble(read)
    name = size_name(config)
    if size not in {None, name}:
        raise WeightsError(f"{path}: a {name} checkpoint, but {size} is asked for; name the right file or size")
    return ModelBackend(model, device, dtype, SamInfo(name, path.name, read.sha256))


def same_sam(
    recorded: Mapping[str, Any], checkpoint: Path | None, device: torch.device, *, precision: str, size: str | None
) -> bool:
    """Whether :func:`load_sam` would give the model that a manifest records; the file is digested, not loaded."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    alike = recorded.get("precision") == names[pick_dtype(precision, device)] and size in {None, recorded.get("size")}
    return bool(alike and checkpoint and checkpoint.is_file() and recorded.get("weights") == checkpoint.name
                and recorded.get("sha256") == file_sha256(checkpoint))  # fmt: skip


def _from_factory(
    factory: str, path: Path | None, device: torch.device, dtype: torch.dtype, precision: str
) -> SamBackend:
    function = _imported(factory)
    try:
        made = function(None if path is None else str(path), str(device))
    except ClipseedError:
        raise
    except Exception as error:  # the code is the user's
        raise UsageError(f"--sam-factory {factory}: failed ({type(error).__name__}: {error})") from error
    digest = file_sha256(path) if path is not None and path.is_file() else None
    info = SamInfo(factory, None if path is None else path.name, digest)
    if all(hasattr(made, name) for name in ("set_image", "predict_torch")):
        if not hasattr(getattr(made, "transform", None), "target_length"):
            raise UsageError(f"--sam-factory {factory}: the predictor has no transform.target_length as SAM's has")
        if precision not in {"auto", "fp32"}:
            raise UsageError(f"--precision {precision}: a predictor chooses its own; choose inside {factory}")
        return PredictorBackend(made, device, info)
    parts = ("image_encoder", "prompt_encoder", "mask_decoder", "pixel_mean", "pixel_std")
    if isinstance(made, nn.Module) and all(hasattr(made, name) for name in parts):
        if not hasattr(made.image_encoder, "img_size"):
            raise UsageError(f"--sam-factory {factory}: the model's image_encoder has no img_size as SAM's has")
        return ModelBackend(made, device, dtype, info)
    raise UsageError(
        f"--sam-factory {factory}: returned {type(made).__name__}; needed is a SAM model (image_encoder, "
        "prompt_encoder, mask_decoder, pixel_mean, pixel_std) or a predictor (set_image, predict_torch)"
    )


def _imported(factory: str) -> Any:
    module_name, _, name = factory.partition(":")
    if not module_name or not name:
        raise UsageError(f"--sam-factory {factory}: write it as MODULE:FUNCTION")
    here = str(Path.cwd())
    sys.path.append(here)  # last, so that nothing in this folder hides an installed module
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code
        raise UsageError(
            f"--sam-factory {factory}: module {module_name!r} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"--sam-factory {factory}: module {module_name!r} has no function {name!r}")
    return function
