"""What surrounds the bridge: backbones and their weights, texts, losses, schedule, colours, windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor

from clipseed.clip.text import TextBank
from clipseed.data.vocabulary import ClassText, Vocabulary
from clipseed.errors import InputError, UsageError, WeightsError
from clipseed.store.cam_records import Cam
from clipseed.train.bridge.backbone import make_backbone
from clipseed.train.bridge.data import soft_labels
from clipseed.train.bridge.losses import hidden, label_loss, soft_loss, without_absent
from clipseed.train.bridge.network import fresh_segmenter
from clipseed.train.bridge.options import BridgeOptions
from clipseed.train.bridge.photometric import varied
from clipseed.train.bridge.schedule import poly_factor
from clipseed.train.bridge.text import random_tokens, read_tokens, tokens_of
from clipseed.train.bridge.trainer import TextSegmentation
from clipseed.train.distributed import Team
from clipseed.train.inference import windowed_logits
from clipseed.train.onnx_file import with_fixed_padding

TINY = "test_efficientnet"
TWO = Vocabulary("two", (ClassText("cat"), ClassText("dog")))


class TwoProcesses(Team):
    """Where the other process counts as much as this one."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def total(self, count: Tensor) -> Tensor:
        return 2 * count


def test_backbones_give_the_four_strides_of_any_size() -> None:
    for name in (TINY, "test_resnet"):
        levels = make_backbone(name).eval()(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
        assert [tuple(level.shape[-2:]) for level in levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    own = timm.create_model(TINY).pretrained_cfg
    assert make_backbone(TINY).mean.flatten().tolist() == pytest.approx(own["mean"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet1", "timm has no network of this name; did you mean resnet"),
        ("hf-hub:somebody/something", "timm has no network of this name"),
        ("test_vit", r"no maps of stride 4, 8, 32 \(its strides: 16"),
        ("efficientformer_l1", "does not take images of any size"),
    ],
)
def test_other_backbones_are_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"--backbone {name}: {reason}"):
        make_backbone(name)


def test_weights_of_a_backbone(tmp_path: Path) -> None:
    """Of a whole classifier or of its maps; those of another network, or with some missing, are refused."""
    torch.manual_seed(3)
    whole = timm.create_model(TINY).eval()
    images = torch.rand(1, 3, 64, 64) * 255
    mean, std = (torch.tensor(whole.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = whole.forward_intermediates((images / 255 - mean) / std, indices=[1, 2, 3, 4], intermediates_only=True)
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "whole.pth")
    backbone = make_backbone(TINY, tmp_path / "whole.pth").eval()
    save_file(backbone.body.state_dict(), tmp_path / "maps.safetensors")
    for found in (backbone, make_backbone(TINY, tmp_path / "maps.safetensors").eval()):
        for ours, theirs in zip(found(images), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other.pth: does not fit the model: .*give weights of test_efficientnet"):
        make_backbone(TINY, tmp_path / "other.pth")
    state = whole.state_dict()
    del state["conv_stem.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(WeightsError, match=r"1 tensors are missing \(first 'conv_stem.weight'\)"):
        make_backbone(TINY, tmp_path / "less.pth")


def test_texts(tmp_path: Path) -> None:
    bank = TextBank(F.normalize(torch.randn(2, 8), dim=-1), F.normalize(torch.randn(3, 8), dim=-1), 100.0)
    tokens = tokens_of(bank)
    assert torch.equal(tokens[1:], bank.classes)
    torch.testing.assert_close(tokens[0], F.normalize(bank.background.sum(dim=0), dim=0))
    with pytest.raises(InputError, match="no words for the background"):
        tokens_of(TextBank(bank.classes, bank.background[:0], 100.0))
    assert torch.equal(random_tokens(3, 8, 1), random_tokens(3, 8, 1))
    np.save(tmp_path / "text.npy", 7 * tokens.numpy())
    torch.testing.assert_close(read_tokens(tmp_path / "text.npy", TWO), tokens)
    bad = {"rows": tokens[:2].numpy(), "whole": np.ones((3, 8), int), "nan": np.full((3, 8), np.nan, np.float32)}
    for name, values in bad.items():
        np.save(tmp_path / f"{name}.npy", values)
        with pytest.raises(InputError, match=f"{name}.npy: "):
            read_tokens(tmp_path / f"{name}.npy", TWO)
    (tmp_path / "text.txt").write_text("no numbers")
    for name in ("text.txt", "gone.npy"):
        with pytest.raises(InputError, match=f"--text .*{name}: no such file|--text .*{name}: no .npy file"):
            read_tokens(tmp_path / name, TWO)


def pixels(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, int]]:
    """Logits and label of each pixel that has one."""
    return [
        (logits[b, :, y, x], int(labels[b, y, x]))
        for b in range(len(labels)) for y in range(labels.shape[1]) for x in range(labels.shape[2])
        if labels[b, y, x] != 255
    ]  # fmt: skip


def test_label_loss_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 3, 5), dtype=torch.uint8)
    labels[0, 0] = 255
    confidence = torch.rand(2, 3, 5)
    sure = labels.masked_fill(confidence < 0.5, 255)
    for given, seen in ((None, labels), (confidence, sure)):
        each = [-row.log_softmax(0)[label] for row, label in pixels(logits, seen)]
        found = label_loss(logits, labels, given, 0.5)
        torch.testing.assert_close(found, torch.stack(each).mean())
        torch.testing.assert_close(label_loss(logits, labels, given, 0.5, TwoProcesses()), found)
    assert label_loss(logits, torch.full_like(labels, 255), None, 0.5) == 0


def test_soft_losses() -> None:
    """A plain loop; one-hot labels give cross-entropy, uniform ones no gradient; no NaN where nothing counts."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    soft, known = torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8)
    soft[0, :, 0, 0], known[1, 2, 2], soft[1, 2] = 0, 255, 0
    for kind in ("collision", "soft-ce"):
        each = []
        for b in range(2):
            for y in range(4):
                for x in range(4):
                    if known[b, y, x] == 255 or soft[b, :, y, x].sum() == 0:
                        continue
                    target, p = soft[b, :, y, x] / soft[b, :, y, x].sum(), logits[b, :, y, x].softmax(0)
                    each.append(-(target @ p).log() if kind == "collision" else -(target @ p.log()))
        found = soft_loss(logits, soft, known, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.stack(each).mean())
        (gradient,) = torch.autograd.grad(found, logits)
        assert gradient.isfinite().all()
        assert gradient[0, :, 0, 0].abs().max() == 0
        labels = soft.argmax(dim=1).to(torch.uint8)
        one_hot = F.one_hot(labels.long(), 3).permute(0, 3, 1, 2).float()
        hard = label_loss(logits, labels.masked_fill(known == 255, 255), None, 0)
        torch.testing.assert_close(soft_loss(logits, one_hot, known, kind), hard)  # type: ignore[arg-type]
    uniform = soft_loss(logits, torch.ones(2, 3, 4, 4), known, "collision")
    assert torch.autograd.grad(uniform, logits)[0].abs().max() < 1e-7


def test_absent_classes() -> None:
    """Their pixels become 255, their soft labels 0; hidden logits take no part and get no gradient."""
    labels = torch.tensor([[[0, 1, 2, 255]], [[0, 1, 2, 255]]], dtype=torch.uint8)
    allowed = torch.tensor([[True, True, False], [True, False, True]])
    soft = torch.rand(2, 3, 1, 4)
    kept, softly = without_absent(labels, soft, allowed, "ignore")
    assert kept.tolist() == [[[0, 1, 255, 255]], [[0, 255, 2, 255]]]
    assert softly is not None
    assert softly[0, 2].abs().max() == softly[1, 1].abs().max() == 0
    assert torch.equal(softly[0, :2], soft[0, :2])
    same, _ = without_absent(labels, None, allowed, "keep")
    assert same is labels
    logits = torch.randn(2, 3, 1, 4, requires_grad=True)
    loss = label_loss(hidden(logits, allowed), kept, None, 0)
    two = torch.stack([-logits[0, :2, 0, x].log_softmax(0)[x] for x in (0, 1)])
    other = torch.stack([-logits[1, [0, 2], 0, x].log_softmax(0)[x // 2] for x in (0, 2)])
    torch.testing.assert_close(loss, torch.cat([two, other]).mean())
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 2].abs().max() == logits.grad[1, 1].abs().max() == 0


def test_soft_labels_of_cams() -> None:
    maps = np.array([[[0.25, 1.0]], [[0.5, 0.5]]], np.float32)
    found = soft_labels(Cam("a", np.array([1, 4], np.int32), maps, (1, 2)))
    np.testing.assert_allclose(found[:, 0, 0], np.array([0.5, 0.25, 0.5]) / 1.25, rtol=1e-6)
    np.testing.assert_allclose(found[:, 0, 1], np.array([0.0, 1.0, 0.5]) / 1.5, rtol=1e-6)
    assert (soft_labels(Cam("a", np.array([], np.int32), maps[:0], (2, 3))) == np.ones((1, 2, 3))).all()


def test_schedule() -> None:
    assert poly_factor(0, 100, 10, 0.01) == pytest.approx(1e-6)
    assert poly_factor(5, 100, 10, 0.01) == pytest.approx((0.99 * 0.95**0.9 + 0.01) * 0.5, rel=1e-5)
    assert poly_factor(50, 100, 10, 0.01) == pytest.approx(0.99 * 0.5**0.9 + 0.01)
    assert poly_factor(100, 100, 10, 0.01) == pytest.approx(0.01)
    assert BridgeOptions().warm_up_of(20_000) == 1500
    assert BridgeOptions().warm_up_of(400) == 40


def test_rates_and_decay() -> None:
    """No decay for norms, biases and scalars; the backbone has a rate of its own; every parameter once."""
    module = fresh_segmenter(TINY, random_tokens(3, 16, 0), BridgeOptions(width=16, token_width=16, fpn_width=8), 0)
    trainer = TextSegmentation(module, BridgeOptions(lr=1e-3, backbone_lr=0.5, weight_decay=0.1), 10, labelled=False)
    names = {value: name for name, value in module.named_parameters()}
    told = {}
    for group in trainer.optimizer().param_groups:
        told |= {names[value]: (group["lr"], group["weight_decay"]) for value in group["params"]}
    assert told.keys() == set(names.values())
    assert told["backbone.body.conv_stem.weight"] == (5e-4, 0.1)
    assert told["backbone.body.bn1.weight"] == (5e-4, 0.0)
    assert told["head.bridge.blocks.0.vision_to_text.query.weight"] == (1e-3, 0.1)
    assert told["head.bridge.gamma"] == told["head.fpn.classifier.bias"] == (1e-3, 0.0)


def test_colors_follow_from_each_images_seed() -> None:
    images = torch.randint(0, 256, (3, 3, 5, 6), dtype=torch.uint8)
    found = varied(images, [5, 6, 7])
    assert torch.equal(found[1:2], varied(images[1:2], [6]))
    assert 0 <= found.min() <= found.max() <= 255
    assert any(torch.equal(varied(images[:1], [seed]), images[:1].float()) for seed in range(60))  # one in eight
    grey = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    changed = torch.stack([varied(grey, [seed])[0, :, 0, 0] for seed in range(200)])
    torch.testing.assert_close(changed[:, 0], changed[:, 2])  # saturation cannot change grey
    assert changed.min() > 30  # (100 - 32) / 2
    assert changed.max() <= (100 + 32) * 1.5


def test_padding_by_constants_is_same_padding() -> None:
    """What is exported of networks that pad by the size of the map, as TensorFlow's do."""
    options = BridgeOptions(head="fpn", fpn_width=8)
    module = fresh_segmenter("tf_mobilenetv3_small_minimal_100", random_tokens(3, 16, 0), options, 0).eval()
    fixed = with_fixed_padding(module)
    for size in ((32, 96), (64, 160)):
        images = torch.rand(1, 3, *size) * 255
        torch.testing.assert_close(fixed(images).logits, module(images).logits)
    assert sum(isinstance(layer, Conv2dSame) for layer in module.modules()) > 3  # the module itself is left alone


class Stamped:
    """Logits that are the mean of each patch, and which windows were asked for."""

    patch, device = 4, torch.device("cpu")

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def describe(self) -> dict[str, object]:
        return {}

    def logits(self, images: Tensor) -> Tensor:
        self.sizes.append((images.shape[-2], images.shape[-1]))
        return F.avg_pool2d(images.float(), 2)


def test_a_window_over_a_network_that_sees_each_patch_alone() -> None:
    """Gives what the whole image gives, whatever the window: every cell is covered, at its place."""
    images = torch.rand(2, 3, 20, 28)
    for window, stride in ((8, 4), (8, 0), (9, 5), (12, 12), (20, 3), (100, 0)):
        network = Stamped()
        found = windowed_logits(network, images, window, stride)
        torch.testing.assert_close(found, F.avg_pool2d(images, 2))
        side = -(-window // 4) * 4
        assert set(network.sizes) == {(min(side, 20), min(side, 28))}
    assert len(network.sizes) == 1
