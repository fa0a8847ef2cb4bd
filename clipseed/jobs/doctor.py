"""``clipseed doctor``: what is installed, what would be used, and what is in the way."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from clipseed.errors import ClipseedError
from clipseed.network import HUB, reachable

Verdict = Literal["ok", "note", "problem"]
_REQUIRED = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow", "opencv-python-headless", "h5py",
             "typer", "rich", "pyyaml", "safetensors", "filelock", "segment-anything")  # fmt: skip
_EXTRAS = (
    ("sam", "pycocotools", "reads COCO's files of masks (--import); SAM itself needs no extra"),
    ("crf", "pydensecrf.densecrf", "clipseed crf --solver pydensecrf"),
    ("ray", "ray", "--engine ray"),
)
"""Extra, its module, and what it is for."""

_VIT_B_WIDTH = 768


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``problem`` keeps clipseed from working, ``note`` limits it."""

    topic: str
    verdict: Verdict
    text: str


def examine(model: str = "ViT-B-16", tag: str = "openai", *, network: bool = True) -> list[Finding]:
    """Look at versions, device, weights and extras.

    Args:
        model: Model whose weights would be used.
        tag: Their pretrained tag.
        network: Also try to reach the hub, for at most a few seconds.
    """
    findings = [Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")]
    findings += _packages()
    torch_works = _import_torch(findings)
    if torch_works:
        findings += _device()
        findings += _weights(model, tag, network)
    findings += _extras()
    return findings


def _packages() -> Iterator[Finding]:
    for name in _REQUIRED:
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "problem", f"is not installed; run: pip install {name}")
    try:
        full = metadata.version("opencv-python")
    except metadata.PackageNotFoundError:
        return
    yield Finding(
        "opencv-python", "note",
        f"{full} is installed beside opencv-python-headless; both provide cv2 and one hides the other. "
        "If cv2 misbehaves: pip uninstall opencv-python",
    )  # fmt: skip


def _import_torch(findings: list[Finding]) -> bool:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation raises nearly anything
        findings.append(Finding("torch", "problem", f"cannot be imported ({_first_line(error)}); reinstall it"))
        return False
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        text = _first_line(error)
        if "torchvision::nms" in str(error) or "libcudart" in str(error) or "undefined symbol" in str(error):
            text = (
                f"{_version('torchvision')} does not belong to torch {torch.__version__} ({text}). One is a CPU build, "
                "the other a CUDA build, or their versions differ. Install both from the same place in one command: "
                "pip install --force-reinstall torch torchvision"
            )
        else:
            text = f"cannot be imported ({text}); reinstall it together with torch"
        findings.append(Finding("torchvision", "problem", text))
        return False
    try:
        importlib.import_module("open_clip")
    except Exception as error:
        findings.append(Finding("open_clip_torch", "problem", f"cannot be imported ({_first_line(error)})"))
        return False
    return True


def _device() -> Iterator[Finding]:
    import torch

    from clipseed.device import pick_device, pick_dtype

    device = pick_device("auto")
    dtype = str(pick_dtype("auto", device, _VIT_B_WIDTH)).removeprefix("torch.")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        detail = f"{properties.name}, {memory:.0f} GiB, {torch.cuda.device_count()} GPU(s)"
    else:
        detail = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    yield Finding("device", "ok", f"{device} ({detail}), precision {dtype}")
    if device.type == "cpu" and torch.version.cuda:
        yield Finding("gpu", "note", f"torch is built for CUDA {torch.version.cuda} but finds no GPU: runs on the CPU")


def _weights(model: str, tag: str, network: bool) -> Iterator[Finding]:
    from open_clip import pretrained

    from clipseed.clip.model import local_weights, toy_weights_path, weights_folder

    toy = toy_weights_path()
    if toy.is_file():
        yield Finding("toy weights", "ok", f"{toy} ({toy.stat().st_size / 1e6:.1f} MB)")
    else:
        yield Finding("toy weights", "problem", f"{toy} is missing; reinstall clipseed")
    if Path(tag).exists():
        yield _weights_file(Path(tag))
        return
    topic = f"{model} {tag}"
    entry = pretrained.get_pretrained_cfg(model, tag)
    if not entry:
        known = ", ".join(pretrained.list_pretrained_tags_by_model(model)) or "no tags"
        yield Finding(topic, "problem", f"not a pretrained tag of this model (known: {known})")
        return
    found = local_weights(model, tag) or _cached(str(entry.get("hf_hub", "")))
    if found:
        yield Finding(topic, "ok", f"at {found}")
        return
    place = weights_folder() / f"{model}-{tag}.safetensors"
    source = entry.get("hf_hub", "").rstrip("/") or entry.get("url")
    if not network:
        yield Finding(topic, "note", f"not here yet; would be downloaded from {source}, or put the file at {place}")
    elif reachable(HUB):
        yield Finding(topic, "ok", f"not here yet; the first run downloads it from {source}")
    else:
        yield Finding(
            topic, "note",
            f"not here, and {HUB} cannot be reached. Fetch {source} elsewhere and put the file at {place} "
            "(.safetensors, .bin or .pt), or name it with --weights FILE. clipseed demo needs none of it",
        )  # fmt: skip


def _weights_file(path: Path) -> Finding:
    """Whether a file holds a CLIP that can be used."""
    from clipseed.clip.model import FrozenClip

    try:
        info = FrozenClip.load(None, path, "cpu", "fp32").info
    except ClipseedError as error:
        return Finding("weights", "problem", str(error))
    shape = f"{info.blocks} blocks of {info.width}, patches of {info.patch} pixels, {info.activation}"
    return Finding("weights", "ok", f"{path}: {shape}, SHA-256 {info.sha256[:16]}…")


def _cached(hub: str) -> str | None:
    """The hub's own cache, asked without network."""
    if not hub:
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        try:
            found = try_to_load_from_cache(hub.rstrip("/"), name)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return found
    return None


def _extras() -> Iterator[Finding]:
    for extra, module, use in _EXTRAS:
        try:
            present = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            present = False
        if present:
            yield Finding(f"extra [{extra}]", "ok", f"{module.partition('.')[0]}: {use}")
        else:
            yield Finding(f"extra [{extra}]", "note", f"not installed ({use}): pip install 'clipseed[{extra}]'")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(unknown version)"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__
