"""SAM weights and factories: sizes read off tensors, small models as arrays, and everything that is not a SAM."""

from __future__ import annotations

import json
import os
import pickle
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import SamPredictor, sam_model_registry

from clipseed.digest import file_sha256
from clipseed.errors import UsageError, WeightsError
from clipseed.sam.architecture import (
    SIZES,
    SamConfig,
    assemble,
    build_sam,
    inferred_config,
    save_sam,
    size_name,
)
from clipseed.sam.architecture import (
    load_sam as load_model,
)
from clipseed.sam.checkpoint import SamCheckpoint, read_sam_checkpoint
from clipseed.sam.load import load_sam
from clipseed.sam.model_backend import ModelBackend
from clipseed.sam.predictor_backend import PredictorBackend

from helpers.sam import SMALL, TOY, toy_sam


def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def answer(backend: Any) -> torch.Tensor:
    (embedding,) = backend.encode([photo()])
    decoded = backend.decode_prompts(embedding, points=np.array([[[30.0, 20.0]]]))
    return backend.upsample(embedding, decoded.logits[0])


def reference(sam: Any) -> np.ndarray:
    predictor = SamPredictor(sam)
    predictor.set_image(photo())
    return predictor.predict(np.array([[30.0, 20.0]]), np.array([1]), return_logits=True)[0]


def saved(path: Path, sam: Any) -> Path:
    torch.save(sam.state_dict(), path)
    return path


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_published_sizes_are_read_off_the_tensors(name: str) -> None:
    with torch.device("meta"):
        published = sam_model_registry[name]()
    state = published.state_dict()
    config = inferred_config(SamCheckpoint(Path("x.pth"), state, None, ""))
    assert config == SIZES[name]
    assert size_name(config) == name
    with torch.device("meta"):
        ours = build_sam(config)
    assert str(ours) == str(published)  # what no shape tells: activations, the norms' epsilon, strides
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in state.items()
    }


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, window_size=0, global_attn_indexes=()),
        replace(SMALL, global_attn_indexes=()),
        replace(SMALL, heads=2, depth=2, global_attn_indexes=(0,), iou_head_depth=3),
    ],
)
def test_other_sizes_are_read_off_the_tensors(config: SamConfig) -> None:
    sam = toy_sam(config)
    assert inferred_config(SamCheckpoint(Path("x.pth"), sam.state_dict(), None, "")) == config
    assert size_name(config) == "custom"


def test_a_pth_gives_the_same_logits_as_the_model_in_it(tmp_path: Path) -> None:
    backend = load_sam(saved(tmp_path / "sam.pth", toy_sam(SMALL)), "cpu")
    assert isinstance(backend, ModelBackend)
    np.testing.assert_allclose(answer(backend).numpy(), reference(toy_sam(SMALL)), atol=1e-5)
    assert backend.manifest() == {
        "size": "custom",
        "weights": "sam.pth",
        "sha256": file_sha256(tmp_path / "sam.pth"),
        "precision": "fp32",
    }


def test_npz_keeps_the_model_in_half_precision_and_its_sizes(tmp_path: Path) -> None:
    path = tmp_path / "toy.npz"
    save_sam(path, toy_sam(), TOY)
    with np.load(path, allow_pickle=False) as arrays:
        assert {arrays[key].dtype for key in arrays.files if key != "config"} == {np.dtype(np.float16)}
        assert json.loads(str(arrays["config"]))["decoder_heads"] == 2
    sam, config = assemble(read_sam_checkpoint(path))
    assert config == TOY
    expected = toy_sam()
    expected.load_state_dict({key: value.half().float() for key, value in expected.state_dict().items()})
    for key, value in expected.state_dict().items():
        assert torch.equal(sam.state_dict()[key], value), key
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in sam.parameters())
    np.testing.assert_allclose(answer(load_sam(path, "cpu")).numpy(), reference(expected), atol=1e-5)
    np.testing.assert_array_equal(load_model(path).pixel_mean.flatten(), expected.pixel_mean.flatten())


def test_safetensors_with_its_sizes_in_the_header(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    save_file(toy_sam().state_dict(), path, metadata={"config": json.dumps(asdict(TOY))})
    np.testing.assert_allclose(answer(load_sam(path, "cpu")).numpy(), reference(toy_sam()), atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision(precision: str, tmp_path: Path) -> None:
    save_sam(tmp_path / "toy.npz", toy_sam(), TOY)
    backend = load_sam(tmp_path / "toy.npz", "cpu", precision=precision)
    assert backend.manifest()["precision"] == precision
    assert torch.isfinite(answer(backend)).all()
    with pytest.raises(UsageError, match="--precision fp8"):
        load_sam(tmp_path / "toy.npz", "cpu", precision="fp8")


# Files that are not a SAM's -------------------------------------------------------------------------------------------


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        load_sam(path, "cpu", **options)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_damaged_and_foreign_files(tmp_path: Path, openai_state: dict[str, torch.Tensor]) -> None:
    refused(tmp_path / "none.pth", "no such SAM checkpoint")
    refused(tmp_path, "no such SAM checkpoint")
    for name in ("text.pth", "text.npz", "text.safetensors"):
        (tmp_path / name).write_text("not weights")
        refused(tmp_path / name, "a text file, not weights; it begins with 'not weights'")
    torch.save(openai_state, tmp_path / "clip.pth")
    refused(tmp_path / "clip.pth", "a CLIP checkpoint, not a SAM")
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    refused(tmp_path / "other.pth", "not a SAM checkpoint")
    torch.save({"a": 1}, tmp_path / "empty.pth")
    refused(tmp_path / "empty.pth", "holds no tensors")
    np.savez(tmp_path / "empty.npz", config=np.array("{}"))
    refused(tmp_path / "empty.npz", "holds no tensors")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("mask_decoder.hf_token.weight", "HQ-SAM"),
        ("image_encoder.patch_embed.seq.0.c.weight", "MobileSAM"),
        ("sam_mask_decoder.iou_token.weight", "SAM 2"),
    ],
)
def test_relatives_are_sent_to_the_factory(key: str, message: str, tmp_path: Path) -> None:
    torch.save({**toy_sam(SMALL).state_dict(), key: torch.zeros(1)}, tmp_path / "relative.pth")
    refused(tmp_path / "relative.pth", f"{message} checkpoint; use --sam-factory")


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"image_encoder.pos_embed": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    refused(tmp_path / "evil.pth", "refused, because loading it could run code")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    refused(tmp_path / "raw.pth", "refused|not a readable")
    np.savez(tmp_path / "evil.npz", weight=np.array([Evil(tmp_path / "ran")], dtype=object))
    refused(tmp_path / "evil.npz", "not a readable")
    assert not (tmp_path / "ran").exists()


def test_incomplete_and_inconsistent_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    state = toy_sam(SMALL).state_dict()

    def without(*keys: str) -> dict[str, torch.Tensor]:
        return {key: value for key, value in state.items() if key not in keys}

    torch.save(without("mask_decoder.iou_token.weight"), path)
    refused(path, "1 tensors are missing .*iou_token")
    torch.save(without("image_encoder.pos_embed"), path)
    refused(path, "parts missing .*pos_embed")
    torch.save({**state, "extra.weight": torch.zeros(1)}, path)
    refused(path, "1 do not belong to it .*extra.weight")
    torch.save({**state, "mask_decoder.iou_token.weight": torch.zeros(1, 7)}, path)
    refused(path, r"iou_token.* is \(1, 7\) instead of \(1, 256\)")
    torch.save({**state, "mask_decoder.iou_token.weight": torch.full((1, 256), torch.nan)}, path)
    refused(path, "NaN or infinity")
    saved(path, toy_sam())
    refused(path, "a decoder 32 wide; its head count is in no tensor")


def test_another_size_than_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path / "sam.pth", toy_sam(SMALL))
    refused(path, "a custom checkpoint, but vit_h is asked for", size="vit_h")
    with pytest.raises(UsageError, match="SAM size vit_g"):
        load_sam(path, "cpu", size="vit_g")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not readable"),
        ("[]", "not readable"),
        ('{"colour": 3}', "unknown sizes in its configuration: colour"),
        (json.dumps({**asdict(TOY), "heads": 5}), "fit|describes no possible SAM"),
        (json.dumps({**asdict(TOY), "heads": "three"}), "describes no possible SAM"),
        (json.dumps({**asdict(TOY), "patch_size": 0}), "describes no possible SAM"),
        (json.dumps({**asdict(TOY), "out_chans": 30}), "describes no possible SAM"),
        (json.dumps({**asdict(TOY), "depth": 4}), "does not fit the model"),
    ],
)
def test_wrong_configurations(config: str, message: str, tmp_path: Path) -> None:
    state = {key: value.numpy() for key, value in toy_sam().state_dict().items()}
    np.savez(tmp_path / "toy.npz", config=np.array(config), **state)
    refused(tmp_path / "toy.npz", message)


def test_weights_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    sam = toy_sam()
    sam.mask_decoder.iou_token.weight.data[0, 0] = 1e6
    with pytest.raises(WeightsError, match="does not fit into half precision"):
        save_sam(tmp_path / "toy.npz", sam, TOY)
    assert not (tmp_path / "toy.npz").exists()


def test_without_segment_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sam(tmp_path / "toy.npz", toy_sam(), TOY)
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    monkeypatch.setitem(sys.modules, "segment_anything.modeling", None)
    with pytest.raises(UsageError, match=r"pip install 'clipseed\[sam\]'"):
        load_sam(tmp_path / "toy.npz", "cpu")


# Factories ------------------------------------------------------------------------------------------------------------

FACTORIES = """
from segment_anything import SamPredictor
from helpers.sam import SMALL, toy_sam

seen = []

def model(checkpoint, device):
    seen.append((checkpoint, device))
    return toy_sam(SMALL)

def predictor(checkpoint, device):
    return SamPredictor(toy_sam(SMALL).to(device))

def nothing(checkpoint, device):
    return None

def broken(checkpoint, device):
    raise KeyError("weights")

def sizeless(checkpoint, device):
    sam = toy_sam(SMALL)
    del sam.image_encoder.img_size
    return sam

def bare(checkpoint, device):
    class Predictor:
        def set_image(self, image): ...
        def predict_torch(self, points, labels): ...
    return Predictor()

def greedy(checkpoint, device):
    sam = toy_sam(SMALL)
    plain = sam.mask_decoder.forward
    class Decoder(type(sam.mask_decoder)):
        def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings,
                    multimask_output, hq_token_only, interm_embeddings): ...
    sam.mask_decoder.__class__ = Decoder
    return sam

number = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "my_sam_factories.py").write_text(FACTORIES)
    (tmp_path / "my_sam_broken.py").write_text("import no_such_module_anywhere")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_sam_factories", "my_sam_broken"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("factories")
def test_a_factory_gives_a_model(tmp_path: Path) -> None:
    path = list(sys.path)
    backend = load_sam(None, "cpu", factory="my_sam_factories:model", precision="bf16")
    assert isinstance(backend, ModelBackend)
    assert sys.path == path
    assert backend.manifest() == {
        "size": "my_sam_factories:model",
        "weights": None,
        "sha256": None,
        "precision": "bf16",
    }
    (tmp_path / "file.bin").write_bytes(b"weights")
    described = load_sam(tmp_path / "file.bin", "cpu", factory="my_sam_factories:model").manifest()
    assert (described["weights"], described["sha256"]) == ("file.bin", file_sha256(tmp_path / "file.bin"))
    assert sys.modules["my_sam_factories"].seen == [(None, "cpu"), (str(tmp_path / "file.bin"), "cpu")]


@pytest.mark.usefixtures("factories")
def test_a_factory_gives_a_predictor() -> None:
    backend = load_sam(None, "cpu", factory="my_sam_factories:predictor")
    assert isinstance(backend, PredictorBackend)
    assert backend.manifest()["precision"] == "predictor"
    np.testing.assert_allclose(answer(backend).numpy(), reference(toy_sam(SMALL)), atol=1e-5)
    with pytest.raises(UsageError, match="a predictor chooses its own"):
        load_sam(None, "cpu", factory="my_sam_factories:predictor", precision="bf16")


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("my_sam_factories", "write it as MODULE:FUNCTION"),
        (":model", "write it as MODULE:FUNCTION"),
        ("no_such_module_anywhere:model", "cannot be imported"),
        ("my_sam_broken:model", "cannot be imported"),
        ("..:model", "cannot be imported"),
        ("my_sam_factories:absent", "has no function 'absent'"),
        ("my_sam_factories:number", "has no function 'number'"),
        ("my_sam_factories:nothing", "returned NoneType; needed is"),
        ("my_sam_factories:broken", "failed .KeyError"),
        ("my_sam_factories:sizeless", "image_encoder has no img_size"),
        ("my_sam_factories:bare", "no transform.target_length"),
        ("my_sam_factories:greedy", "also wants hq_token_only, interm_embeddings; return its predictor"),
    ],
)
def test_factories_that_do_not_work(factory: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_sam(None, "cpu", factory=factory)


def test_neither_checkpoint_nor_factory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--checkpoint FILE"):
        load_sam(None, "cpu")
    with pytest.raises(WeightsError, match="no such SAM checkpoint"):
        load_sam(tmp_path / "none.pth", "cpu", factory="json:loads")
