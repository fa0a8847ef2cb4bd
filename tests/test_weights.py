"""Loading weights: every real format, the activation question, and refusing what is wrong or dangerous."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clipseed.clip import FrozenClip
from clipseed.clip.architecture import decide_activation, round_linear_weights, supported_models
from clipseed.clip.checkpoint import read_checkpoint
from clipseed.clip.model import local_weights
from clipseed.device import pick_device, pick_dtype
from clipseed.digest import file_sha256
from clipseed.errors import UsageError, WeightsError
from clipseed.sam.load import load_sam
from clipseed.weights import read_weights

from helpers.models import save_npz, tiny_config, tiny_model

State = dict[str, torch.Tensor]


def features(clip: FrozenClip) -> torch.Tensor:
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return clip.encode_image(pixels)


@pytest.fixture
def expected(openai_state: State) -> torch.Tensor:
    """The image feature of the tiny model by open_clip itself."""
    model: Any = tiny_model(tiny_config(head_width=64))
    model.load_state_dict({key: value.float() for key, value in openai_state.items()})
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.inference_mode():
        return model.encode_image((pixels / 255 - mean) / std)


def save(state: State, path: Path) -> Path:
    if path.suffix == ".npz":
        return save_npz(path, state)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


class Scripted(torch.nn.Module):
    """A module tree with OpenAI's parameter names, to be saved as the archives they publish."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for key, value in state.items():
            owner: torch.nn.Module = self
            *path, name = key.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        self.register_buffer("input_resolution", torch.tensor(64))
        self.register_buffer("context_length", torch.tensor(77))
        self.register_buffer("vocab_size", torch.tensor(49408))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".bin"])
def test_formats(suffix: str, openai_state: State, expected: torch.Tensor, tmp_path: Path) -> None:
    path = save(openai_state, tmp_path / f"weights{suffix}")
    clip = FrozenClip.load(weights=path, device="cpu")
    assert clip.info.activation == "quickgelu"
    assert (clip.info.patch, clip.info.blocks, clip.info.width, clip.info.heads) == (16, 3, 64, 1)
    assert clip.info.sha256 == file_sha256(path)
    assert (features(clip) - expected).abs().max() < 1e-5


def test_openai_archive(openai_state: State, expected: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "ViT-tiny.pt"
    torch.jit.save(torch.jit.script(Scripted(openai_state)), path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.activation == "quickgelu"
    assert checkpoint.state.keys() == openai_state.keys()
    for key, value in openai_state.items():
        assert checkpoint.state[key].dtype == value.dtype
        assert torch.equal(checkpoint.state[key], value)
    assert (features(FrozenClip.load(weights=path, device="cpu")) - expected).abs().max() < 1e-5


def test_training_checkpoint_and_legacy_format(openai_state: State, expected: torch.Tensor, tmp_path: Path) -> None:
    nested = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in openai_state.items()}}
    torch.save(nested, tmp_path / "epoch_3.pt")
    torch.save(openai_state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("epoch_3.pt", "old.pth"):
        assert (features(FrozenClip.load(weights=tmp_path / name, device="cpu")) - expected).abs().max() < 1e-5


def test_folder_with_configuration(openai_state: State, tmp_path: Path) -> None:
    """What the hub serves: open_clip_config.json beside a safetensors file; here with GELU and other pixel values."""
    state = {key: value.float() + 1e-4 * torch.randn_like(value.float()) for key, value in openai_state.items()}
    save(state, tmp_path / "open_clip_model.safetensors")
    config = {
        "model_cfg": tiny_config(head_width=64),
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    clip = FrozenClip.load(weights=tmp_path, device="cpu")
    assert clip.info.activation == "gelu"
    assert clip.tower.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert clip.tower.blocks[0].activation == "gelu"


def test_named_models_take_the_activation_of_their_weights(openai_state: State, tmp_path: Path) -> None:
    import open_clip

    config = open_clip.get_model_config("ViT-S-32")
    plain = {
        key: torch.randn(value.shape) * 0.02 for key, value in open_clip.create_model("ViT-S-32").state_dict().items()
    }
    path = save(plain, tmp_path / "plain.safetensors")
    assert config is not None
    clip = FrozenClip.load("ViT-S-32", path, "cpu")
    assert clip.info.activation == "gelu"
    assert clip.info.heads == 6


def test_the_activation_is_never_guessed(openai_state: State, tmp_path: Path) -> None:
    state = {key: value.float() + 1e-4 * torch.randn_like(value.float()) for key, value in openai_state.items()}
    path = save(state, tmp_path / "who-knows.safetensors")
    with pytest.raises(WeightsError, match=r"GELU or QuickGELU.*--model"):
        FrozenClip.load(weights=path, device="cpu")


def test_contradicting_activation_is_refused(openai_state: State, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"known: openai, .*"):  # not one of this name's tags
        FrozenClip.load("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "cpu")
    checkpoint = read_checkpoint(save(openai_state, tmp_path / "weights.pt"))
    with pytest.raises(WeightsError, match="trained with GELU; use ViT-B-16"):
        decide_activation("ViT-B-16-quickgelu", {"quick_gelu": True}, checkpoint, "gelu")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny_config(head_width=64)}))
    save(openai_state, tmp_path / "half.safetensors")
    with pytest.raises(WeightsError, match="says gelu, the weights are quickgelu"):
        FrozenClip.load(weights=tmp_path / "half.safetensors", device="cpu")


def test_openai_tag_means_quickgelu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--model ViT-B-32 --weights openai`` names a GELU configuration; the weights decide."""
    import open_clip

    monkeypatch.setenv("CLIPSEED_WEIGHTS", str(tmp_path))
    state = dict(open_clip.create_model("ViT-B-32").state_dict())
    save(state, tmp_path / "ViT-B-32-openai.safetensors")
    assert local_weights("ViT-B-32", "openai") == tmp_path / "ViT-B-32-openai.safetensors"
    clip = FrozenClip.load("ViT-B-32", "openai", "cpu")
    assert clip.info.activation == "quickgelu"
    assert clip.info.weights == "openai"
    assert clip.tower.blocks[0].activation == "quickgelu"


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(2), "b": Bomb()}, "zip.pt")
    Path("plain.pt").write_bytes(pickle.dumps({"a": Bomb()}))
    np.savez("objects.npz", a=np.array([Bomb()], dtype=object))
    for name in ("zip.pt", "plain.pt", "objects.npz"):
        with pytest.raises(WeightsError, match=name):
            FrozenClip.load(weights=tmp_path / name, device="cpu")
    assert not Path("exploded").exists()


def test_code_in_a_scripted_archive_is_not_run(openai_state: State, tmp_path: Path) -> None:
    """An archive whose object tree asks for anything but tensors and modules is refused."""
    import zipfile

    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/constants.pkl", pickle.dumps(()))
        archive.writestr("evil/data.pkl", pickle.dumps(Bomb()))
    with pytest.raises(WeightsError, match="refused, because loading it could run code"):
        FrozenClip.load(weights=path, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file; fetch it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 605143316\n",
            "a Git LFS pointer, .*git lfs pull",
        ),
        (b"\n<!DOCTYPE html>\n<html><title>Log in</title>" + b" " * 2000, "a web page .*one to log in"),
        (b"<html>" + "ä".encode() * 3000, "a web page"),
        (b"Error: access denied\nsee below\n", "a text file, not weights; it begins with 'Error: access denied'"),
        (b"a" + "ü".encode() * 3000, "a text file, not weights"),  # a character is cut in two where reading ends
        (b"\n\n", "a text file without text"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "not a readable weights file|refused"),
        (b"PK\x03\x04 truncated", "not a readable weights file|refused"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_garbage(content: bytes, message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"garbage{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        FrozenClip.load(weights=path, device="cpu")
    with pytest.raises(WeightsError, match=message):
        load_sam(path, "cpu")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for load in (lambda path: FrozenClip.load(weights=path, device="cpu"), lambda path: load_sam(path, "cpu")):
        with pytest.raises(WeightsError, match=r"pipe\.pt: (a pipe or a device|no such SAM checkpoint)"):
            load(tmp_path / "pipe.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="no weights file in this folder"):
        FrozenClip.load(weights=tmp_path / "empty", device="cpu")
    with pytest.raises(WeightsError, match="a folder, not a file of weights"):
        read_weights(tmp_path)


def test_texts_beside_the_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3)}
    save_file(tensors, tmp_path / "w.safetensors", metadata={"config": "{}"})
    np.savez(tmp_path / "w.npz", a=tensors["a"].numpy(), config=np.array("{}"))
    torch.save(tensors, tmp_path / "w.pt")
    for name, texts in (("w.safetensors", {"config": "{}"}), ("w.npz", {"config": "{}"}), ("w.pt", {})):
        found = read_weights(tmp_path / name)
        assert found.texts == texts
        assert found.state.keys() == {"a"}
        assert torch.equal(found.state["a"], tensors["a"])
        assert found.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_truncated(openai_state: State, tmp_path: Path) -> None:
    for suffix in (".pt", ".npz", ".safetensors"):
        path = save(openai_state, tmp_path / f"cut{suffix}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(WeightsError, match=f"cut{suffix}"):
            FrozenClip.load(weights=path, device="cpu")


def test_wrong_contents(openai_state: State, tmp_path: Path) -> None:
    def refused(change: Any, match: str) -> None:
        state = {key: value.clone() for key, value in openai_state.items()}
        change(state)
        path = save(state, tmp_path / "weights.pt")
        with pytest.raises(WeightsError, match=match):
            FrozenClip.load(weights=path, device="cpu")

    refused(lambda s: s.pop("visual.ln_post.weight"), r"1 tensors are missing \(first 'visual.ln_post.weight'\)")
    refused(lambda s: s.update(extra=torch.zeros(2)), "1 do not belong to it")
    refused(lambda s: s.update({"visual.ln_post.bias": torch.zeros(3)}), r"is \(3,\) instead of \(64,\)")
    refused(lambda s: s["visual.proj"].fill_(float("nan")), "'visual.proj' contains NaN")
    refused(lambda s: s.pop("text_projection"), "not a CLIP checkpoint in OpenAI's layout")
    refused(lambda s: s.clear(), "holds no tensors")
    refused(lambda s: s.update({"visual.layer1.0.conv1.weight": torch.zeros(1)}), "a CLIP ResNet")
    refused(lambda s: s.update({"visual.trunk.norm.weight": torch.zeros(1)}), "timm")


@pytest.mark.parametrize("model", ["RN50", "ViT-B-16-SigLIP", "EVA02-B-16", "coca_ViT-B-32", "convnext_base"])
def test_unsupported_towers_are_refused_with_alternatives(model: str, openai_state: State, tmp_path: Path) -> None:
    path = save(openai_state, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=r"not supported.*ViT-B-16"):
        FrozenClip.load(model, path, "cpu")


def test_supported_models() -> None:
    names = supported_models()
    assert {"ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"} <= set(names)
    assert not {"RN50", "ViT-B-16-SigLIP"} & set(names)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        FrozenClip.load(weights=tmp_path / "missing.pt", device="cpu")
    with pytest.raises(WeightsError, match=r"neither a file nor a pretrained tag \(known: openai"):
        FrozenClip.load("ViT-B-16", "nonsense", "cpu")
    with pytest.raises(UsageError, match="unknown to open_clip; did you mean"):
        FrozenClip.load("ViT-Z", "openai", "cpu")


def test_no_network_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPSEED_WEIGHTS", str(tmp_path))

    def fail(*_: Any, **__: Any) -> str:
        raise OSError("name resolution failed")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", fail)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(WeightsError, match=rf"cannot be reached.*{tmp_path}/ViT-B-16-openai.safetensors"):
        FrozenClip.load("ViT-B-16", "openai", "cpu")


def test_devices_and_precisions() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_dtype("auto", torch.device("cpu")) is torch.float32
    assert pick_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    for device in ("gpu", "cuda:x", "meta"):
        with pytest.raises(UsageError, match="--device"):
            pick_device(device)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="finds no CUDA GPU"):
            pick_device("cuda")
    with pytest.raises(UsageError, match="--precision"):
        pick_dtype("int8", torch.device("cpu"))


class Renamed(torch.nn.Module):
    """What a module of another library version may be: the same parameters, in a class that nobody knows."""

    def __init__(self, module: torch.nn.Module, names: dict[str, str] | None = None) -> None:
        super().__init__()
        for name, value in module.named_parameters(recurse=False):
            self.register_parameter((names or {}).get(name, name), value)
        for name, child in module.named_children():
            self.add_module(name, Renamed(child, names))


def released_names(model: torch.nn.Module) -> set[str]:
    """What OpenAI's convert_weights makes half precision, by the classes of modules as it does."""
    from torch import nn

    names = set()
    for prefix, module in model.named_modules():
        parts = ["text_projection", "proj"]
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            parts += ["weight", "bias"]
        if isinstance(module, nn.MultiheadAttention):
            parts += ["in_proj_weight", "in_proj_bias"]
        own = dict(module.named_parameters(recurse=False))
        names |= {f"{prefix}.{part}".removeprefix(".") for part in parts if part in own}
    return names


def test_released_rounding_goes_by_names() -> None:
    model = tiny_model()
    expected = released_names(model)
    assert len(expected) == 3 + 5 * 8  # conv1, two projections, and eight of each of the five blocks
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1e-4 * torch.rand_like(value))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for given in (model, Renamed(model)):
        for name, value in given.named_parameters():
            value.data = before[name].clone()
        round_linear_weights(given)
        after = dict(given.named_parameters())
        assert after.keys() == before.keys()
        assert {name for name in before if not torch.equal(before[name], after[name])} == expected
        for name in expected:
            assert torch.equal(after[name], before[name].half().float())


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ({"in_proj_weight": "qkv_weight"}, "transformer.resblocks.0.attn.in_proj_weight"),
        ({"proj": "projection"}, "visual.proj"),
    ],
)
def test_weights_that_are_elsewhere_are_not_left_unrounded(names: dict[str, str], missing: str) -> None:
    with pytest.raises(WeightsError, match=f"this model has no '{missing}'"):
        round_linear_weights(Renamed(tiny_model(), names))
