"""The confidence-guided loss against numbers worked out by hand, and the released code's form against the paper's."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.train import ConfidenceGuidedLoss, confidence_guided_loss

LN2, LN4, LN43 = math.log(2), math.log(4), math.log(4 / 3)


def three_pixels() -> tuple[Tensor, Tensor, Tensor]:
    """Three pixels of two classes whose probabilities for class 1 are 3/4, 1/2 and 1/4; all labelled 1."""
    probability = torch.tensor([0.75, 0.5, 0.25])
    logits = torch.stack([torch.zeros(3), torch.logit(probability)]).view(1, 2, 1, 3)
    return logits, torch.ones(1, 1, 3, dtype=torch.int64), torch.tensor([[[0.99, 0.95, 0.2]]])


def random_case(size: tuple[int, int] = (7, 9)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, *size, generator=generator)
    labels = torch.randint(0, 5, (2, *size), generator=generator)
    labels[0, 0] = 255
    return logits, labels, torch.rand(2, *size, generator=generator)


def test_by_hand() -> None:
    logits, labels, confidence = three_pixels()
    every = confidence_guided_loss(logits, labels)
    assert float(every) == pytest.approx((LN43 + LN2 + LN4) / 3)
    # 0.95 itself counts, 0.2 does not.
    assert float(confidence_guided_loss(logits, labels, confidence)) == pytest.approx((LN43 + LN2) / 2)
    assert float(confidence_guided_loss(logits, labels, confidence, threshold=0.96)) == pytest.approx(LN43)
    assert float(confidence_guided_loss(logits, labels, confidence, reduction="sum")) == pytest.approx(LN43 + LN2)
    each = confidence_guided_loss(logits, labels, confidence, reduction="none")
    torch.testing.assert_close(each, torch.tensor([[[LN43, LN2, 0.0]]]))
    labels[..., 0] = 255  # never counts, however confident
    assert float(confidence_guided_loss(logits, labels, confidence)) == pytest.approx(LN2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64])
def test_both_forms_agree(reduction: str, kind: torch.dtype) -> None:
    """255 written where ``max Q < 0.95``, as the released code does, equals handing over the confidence."""
    logits, labels, confidence = random_case()
    confidence = (0.9 + 0.1 * confidence).to(kind)
    confidence[1, 2, 3] = 0.95
    written = labels.masked_fill(confidence < 0.95, 255)
    found = []
    for arguments in ((labels, confidence), (written, None), (written.byte(), None)):
        leaf = logits.clone().requires_grad_()
        loss = confidence_guided_loss(leaf, *arguments, reduction=reduction)
        loss.sum().backward()
        found.append((loss.detach(), leaf.grad))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])
    if reduction == "mean":
        torch.testing.assert_close(found[0][0], F.cross_entropy(logits, written, ignore_index=255))


def test_gradient_is_zero_outside_confident_pixels() -> None:
    logits, labels, confidence = random_case()
    logits.requires_grad_()
    confidence_guided_loss(logits, labels, confidence, threshold=0.5).backward()
    counts = (confidence >= 0.5) & (labels != 255)
    assert 0 < int(counts.sum()) < counts.numel()
    touched = (logits.grad != 0).all(dim=1)
    assert torch.equal(touched, counts)
    assert (logits.grad.movedim(1, -1)[~counts] == 0).all()
    # At a pixel that counts it is (softmax - one-hot) / how many count.
    expected = (logits.detach().softmax(1) - F.one_hot(labels % 255, 5).movedim(-1, 1)) / counts.sum()
    torch.testing.assert_close(logits.grad.movedim(1, -1)[counts], expected.movedim(1, -1)[counts])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_confident_pixel_gives_zero(reduction: str) -> None:
    logits, labels, confidence = random_case()
    for arguments in ((labels, confidence * 0.5), (torch.full_like(labels, 255), None)):
        leaf = logits.clone().requires_grad_()
        loss = confidence_guided_loss(leaf, *arguments, reduction=reduction)
        loss.sum().backward()
        assert (loss == 0).all()
        assert (leaf.grad == 0).all()


def test_smaller_logits_are_upsampled() -> None:
    logits, _, _ = random_case((3, 4))
    _, labels, confidence = random_case((12, 17))
    larger = F.interpolate(logits, size=(12, 17), mode="bilinear", align_corners=False)
    found = confidence_guided_loss(logits, labels, confidence, threshold=0.5)
    assert torch.equal(found, confidence_guided_loss(larger, labels, confidence, threshold=0.5))
    # By hand: 2 columns to 4 at half-pixel centres are 0, 1/4, 3/4 and 1 of the way.
    ramp = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2) * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    each = confidence_guided_loss(ramp, torch.zeros(1, 1, 4, dtype=torch.uint8), reduction="none")
    torch.testing.assert_close(each.flatten(), F.softplus(torch.tensor([0.0, 1.0, 3.0, 4.0])))


def test_half_precision_is_computed_in_single() -> None:
    logits, labels, confidence = random_case()
    half = logits.half().requires_grad_()
    loss = confidence_guided_loss(half, labels, confidence, threshold=0.5)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, confidence_guided_loss(half.detach().float(), labels, confidence, threshold=0.5))
    loss.backward()
    assert half.grad.dtype == torch.float16
    assert confidence_guided_loss(logits.double(), labels).dtype == torch.float64


def test_gradients_are_exact() -> None:
    logits, _, _ = random_case((3, 3))
    _, labels, confidence = random_case((6, 5))

    def loss(x: Tensor) -> Tensor:
        return confidence_guided_loss(x, labels, confidence, threshold=0.4)

    assert torch.autograd.gradcheck(loss, logits.double().requires_grad_())


def test_module() -> None:
    logits, labels, confidence = random_case()
    module = ConfidenceGuidedLoss(0.5)
    assert torch.equal(
        module(logits, labels, confidence), confidence_guided_loss(logits, labels, confidence, threshold=0.5)
    )
    assert torch.equal(module(logits, labels), confidence_guided_loss(logits, labels))
    assert repr(module) == "ConfidenceGuidedLoss(threshold=0.5, ignore_index=255, reduction='mean')"
    assert not list(module.parameters())
    assert ConfidenceGuidedLoss().threshold == 0.95
    with pytest.raises(ValueError, match="threshold 95: give a number from 0 to 1"):
        ConfidenceGuidedLoss(95)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(5, 7, 9)}, r"logits: expected floating \(B, C, h, w\), got float32 \(5, 7, 9\)"),
        ({"logits": torch.zeros(2, 5, 7, 9, dtype=torch.int64)}, "logits: expected floating"),
        ({"labels": torch.zeros(2, 1, 7, 9, dtype=torch.int64)}, r"labels: expected integers \(B, H, W\)"),
        ({"labels": torch.zeros(2, 7, 9)}, "labels: expected integers"),
        ({"labels": torch.zeros(2, 7, 9, dtype=torch.bool)}, "labels: expected integers"),
        ({"labels": torch.zeros(3, 7, 9, dtype=torch.int64)}, "2 images in the logits, 3 in the labels"),
        ({"labels": torch.zeros(2, 7, 8, dtype=torch.int64), "confidence": None}, "are larger than the labels"),
        ({"labels": torch.full((2, 7, 9), 5)}, r"labels \[5\] are neither 0 to 4 nor ignore_index 255"),
        ({"labels": torch.full((2, 7, 9), -1)}, r"labels \[-1\] are neither"),
        ({"labels": torch.full((2, 7, 9), 255), "ignore_index": -100}, r"labels \[255\] are neither"),
        ({"logits": torch.zeros(0, 5, 7, 9), "labels": torch.zeros(0, 7, 9, dtype=torch.int64)}, "nothing to compare"),
        ({"confidence": torch.zeros(2, 7, 8)}, r"confidence: expected floating \(2, 7, 9\)"),
        ({"confidence": torch.zeros(2, 7, 9, dtype=torch.uint8)}, "confidence: expected floating"),
        ({"confidence": torch.full((2, 7, 9), 1.5)}, "confidence: expected values from 0 to 1, got 1.5 to 1.5"),
        ({"confidence": torch.full((2, 7, 9), math.nan)}, "confidence: expected values from 0 to 1, got nan"),
        ({"threshold": -0.1}, "threshold -0.1: give a number from 0 to 1"),
        ({"threshold": math.nan}, "threshold nan"),
        ({"reduction": "max"}, "reduction 'max': choose one of mean, sum, none"),
    ],
)
def test_wrong_input(change: dict[str, object], message: str) -> None:
    logits, labels, confidence = random_case()
    with pytest.raises(ValueError, match=message):
        confidence_guided_loss(**{"logits": logits, "labels": labels, "confidence": confidence, **change})


def test_negative_ignore_index() -> None:
    logits, labels, _ = random_case()
    moved = torch.where(labels == 255, -100, labels)
    assert torch.equal(confidence_guided_loss(logits, moved, ignore_index=-100), confidence_guided_loss(logits, labels))
    narrow = labels.masked_fill(labels == 255, 156).byte()  # -100 in 8 bits
    with pytest.raises(ValueError, match=r"labels \[156\] are neither"):
        confidence_guided_loss(logits, narrow, ignore_index=-100)


def test_the_package_does_not_import_it() -> None:
    code = "import clipseed, sys; sys.exit('clipseed.train' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
