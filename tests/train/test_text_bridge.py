"""The bridge itself: shapes, symmetry, masks, gradients, size, precision; and the heads beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.train.bridge.cost import multiply_adds, parameters
from clipseed.train.bridge.head import fused_top
from clipseed.train.bridge.network import make_head
from clipseed.train.bridge.options import BridgeOptions
from clipseed.train.bridge.text_bridge import TextBridge, cosines

HEADS = ("bridge", "fpn", "lseg", "denseclip")


def texts(count: int, width: int = 24, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def maps(batch: int = 2, channels: int = 20, height: int = 6, width: int = 5) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def small(**given: object) -> TextBridge:
    torch.manual_seed(0)
    return TextBridge(20, 24, **{"width": 32, "token_width": 16, "heads": 4, **given}).eval()  # type: ignore[arg-type]


def opened(bridge: TextBridge) -> TextBridge:
    """With texts that do change."""
    torch.nn.init.normal_(bridge.gamma)
    return bridge


@pytest.mark.parametrize("count", [1, 2, 21, 150])
@pytest.mark.parametrize("batch", [1, 3])
def test_shapes(count: int, batch: int) -> None:
    found = small()(maps(batch, height=7, width=5), texts(count))
    assert found["score"].shape == (batch, count, 7, 5)
    assert found["feat"].shape == (batch, 32, 7, 5)
    assert found["text"].shape == (batch, count, 24)
    assert found["pix"].shape == (batch, 24, 7, 5)
    assert all(value.isfinite().all() for value in found.values())
    assert found["score"].abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("mixing", ["attn", "none"])
def test_permuted_texts_permute_scores(mixing: str) -> None:
    bridge, text = opened(small(token_mixing=mixing)), texts(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    found, permuted = bridge(maps(), text)["score"], bridge(maps(), text[order])["score"]
    torch.testing.assert_close(permuted, found[:, order], atol=1e-5, rtol=0)
    assert (found - found[:, order]).abs().max() > 1e-3


def test_texts_begin_where_clip_put_them() -> None:
    bridge, text = small(), texts(5)
    found = bridge(maps(), text)
    assert (found["text"] - text).abs().max() < 1e-2
    plain = F.cosine_similarity(found["pix"][:, None], text[None, :, :, None, None], dim=2)
    torch.testing.assert_close(found["score"], plain, atol=1e-3, rtol=0)


@pytest.mark.parametrize("mixing", ["attn", "none"])
def test_a_hidden_text_changes_no_other_score(mixing: str) -> None:
    bridge, text = opened(small(token_mixing=mixing)), texts(4)
    allowed = torch.tensor([[True, False, True, True], [True, True, True, False]])
    other = text.clone()
    other[1] = texts(1, seed=9)[0]
    found, changed = bridge(maps(), text, allowed)["score"], bridge(maps(), other, allowed)["score"]
    assert torch.equal(found[0, [0, 2, 3]], changed[0, [0, 2, 3]])
    assert (found[1] - changed[1]).abs().max() > 1e-4  # the other image shows it
    assert not torch.equal(bridge(maps(), text)["score"], found)


def test_gradients_reach_everything_but_the_text() -> None:
    bridge, text, feat = small().train(), texts(4).requires_grad_(), maps().requires_grad_()
    bridge(feat, text)["score"][:, 0].sum().backward()
    assert text.grad is None
    assert feat.grad is not None
    assert feat.grad.abs().max() > 0
    for name, value in bridge.named_parameters():
        assert value.grad is not None, name
        # A constant added to all keys of a softmax changes nothing.
        assert value.grad.abs().max() > 0 or name.endswith("text_to_vision.key.bias"), name


@pytest.mark.parametrize(
    ("direction", "sees", "tells"), [("none", False, False), ("v2t", True, False), ("t2v", False, True)]
)
def test_directions(direction: str, sees: bool, tells: bool) -> None:
    """Whether texts depend on the image, and the map on the texts."""
    bridge = opened(small(direction=direction))
    text = texts(4)
    found, elsewhere = bridge(maps(), text), bridge(maps().flip(1), text)
    assert (not torch.equal(found["text"], elsewhere["text"])) is sees
    assert (not torch.equal(found["feat"], bridge(maps(), texts(4, seed=3))["feat"])) is tells


def test_budget() -> None:
    """The specification's own count at a map of 32x32 with 960 channels: 3.43 M, and 1.33 and 2.12 GMACs."""
    bridge = TextBridge(960, 512).eval()
    assert parameters(bridge) == pytest.approx(3.43e6, rel=0.02)
    assert parameters(bridge) <= 3.5e6
    feat = torch.zeros(1, 960, 32, 32)
    for count, stated in ((21, 1.33e9), (150, 2.12e9)):
        needed = multiply_adds(lambda count=count: bridge(feat, texts(count, 512)))
        assert needed == pytest.approx(stated, rel=0.03)
        assert needed <= 2.2e9
    one = multiply_adds(lambda: bridge(feat, texts(1, 512)))
    assert one < needed


def test_multiply_adds_are_counted_by_hand() -> None:
    layer, attention = torch.nn.Conv2d(3, 5, 3, padding=1, groups=1), torch.rand(2, 4, 7, 6)
    assert multiply_adds(lambda: layer(torch.zeros(1, 3, 8, 9))) == 8 * 9 * 5 * 3 * 9
    told = multiply_adds(lambda: F.scaled_dot_product_attention(attention, attention, attention))
    assert told == 2 * (2 * 4 * 7 * 7 * 6)


def test_bfloat16_agrees() -> None:
    torch.manual_seed(0)
    bridge, text = TextBridge(20, 512).eval(), texts(6, 512)
    feat = maps(2, height=24, width=24)
    exact = bridge(feat, text)["score"]
    with torch.autocast("cpu", torch.bfloat16):
        half = bridge(feat, text)
    assert half["score"].dtype == half["text"].dtype == torch.float32
    torch.testing.assert_close(half["pix"].norm(dim=1), torch.ones(2, 24, 24))
    assert (exact.argmax(1) == half["score"].argmax(1)).float().mean() > 0.99
    clear = (top := exact.topk(2, dim=1).values)[:, 0] - top[:, 1] > 0.01  # random scores lie close together
    assert (exact.argmax(1) == half["score"].argmax(1))[clear].float().mean() > 0.995


def test_cosines_of_a_plain_loop() -> None:
    pixels, text = maps(2, 24, 3, 2), texts(4)
    found = cosines(pixels, 3 * text)[0]
    for b in range(2):
        for k in range(4):
            for y in range(3):
                for x in range(2):
                    one = pixels[b, :, y, x]
                    assert found[b, k, y, x].item() == pytest.approx((one @ text[k] / one.norm()).item(), abs=1e-6)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("classes", [2, 4])
def test_heads(name: str, classes: int) -> None:
    """Logits at stride 4 of odd sizes; scores by text where they are promised, for any number of texts."""
    channels = [6, 8, 10, 12]
    options = BridgeOptions(head=name, width=16, token_width=16, heads=2, blocks=2, fpn_width=8)  # type: ignore[arg-type]
    head = make_head(channels, classes, 24, options).eval()
    sizes = ((17, 12), (9, 6), (5, 3), (3, 2))
    levels = [torch.randn(2, c, *size) for c, size in zip(channels, sizes, strict=True)]
    text = texts(classes)
    found = head(levels, text)
    assert found.logits.shape == (2, classes, 17, 12)
    assert (found.scores is None) is (name in ("fpn", "lseg"))
    other = head.by_text(levels, texts(7))
    assert (other is None) is (name == "fpn")
    if other is not None:
        assert other.shape[:2] == (2, 7)
        own = head.by_text(levels, text)
        assert torch.equal(own, found.logits if found.scores is None else found.scores)
    if name == "bridge":
        assert fused_top(levels).shape == (2, 22, 5, 3)
        alone = make_head(channels, classes, 24, BridgeOptions(width=16, token_width=16, heads=2, fpn_width=0)).eval()
        assert alone(levels, text).logits.shape == (2, classes, 5, 3)


def test_one_batch_is_learned_by_heart() -> None:
    """Four images of coloured quarters, 200 steps, more than 99 % of the pixels right."""
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (4, 1, 2, 2)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    colors = torch.randn(3, 20)
    feat = colors[labels[:, 0]].permute(0, 3, 1, 2) + 0.3 * torch.randn(4, 20, 8, 8)
    bridge, text = small(num_blocks=2).train(), texts(3)
    learning = torch.optim.AdamW(bridge.parameters(), 1e-3)
    for _ in range(200):
        learning.zero_grad()
        F.cross_entropy(bridge(feat, text)["score"] / bridge.tau, labels[:, 0]).backward()
        learning.step()
    assert (bridge.eval()(feat, text)["score"].argmax(1) == labels[:, 0]).float().mean() > 0.99
