"""Learned prompts apart from released numbers: layouts, files, caches, and batches without anything to learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torchvision.tv_tensors import Image, Mask

from clipseed.cam.gradcam import gradcam, run_last_block
from clipseed.clip.model import FrozenClip
from clipseed.data.vocabulary import load_vocabulary
from clipseed.errors import InputError, UsageError, WeightsError
from clipseed.train.augment import Augmentation, Jitter
from clipseed.train.checkpoint import save_weights
from clipseed.train.crops import Crops
from clipseed.train.prompts.contexts import LearnedContext, PromptTexts, fresh_context
from clipseed.train.prompts.files import read_prompts, save_prompts
from clipseed.train.prompts.layout import layout_of, make_layout
from clipseed.train.prompts.losses import activation_loss, contrastive_loss
from clipseed.train.prompts.options import PromptOptions
from clipseed.train.prompts.trainers import ClassificationPrompts, SegmentationPrompts, basis_of, cams_from_bases

TOY = load_vocabulary("toy")


@pytest.fixture(scope="module")
def clip() -> FrozenClip:
    return FrozenClip.load(weights="toy", device="cpu", precision="fp32")


def test_layouts(tmp_path: Path) -> None:
    """Where names stand, nameless prompts, and who shares a context."""
    voc = load_vocabulary("voc")
    shared = make_layout(voc, "shared", "end", 4, None)
    assert (len(shared.names), shared.classes, shared.contexts) == (45, 20, 1)
    assert shared.prompts[2] == "[*] [*] [*] [*] bird avian."
    assert shared.prompts[14] == "[*] [*] [*] [*] person with clothes,people,human."
    each = make_layout(voc, "class", "front", 3, 25)
    assert (each.contexts, each.prompts[0], each.prompts[-1]) == (45, "aeroplane [*] [*] [*].", "[*] [*] [*].")
    assert make_layout(voc, "shared", "middle", 5, 0).prompts[0] == "[*] [*] aeroplane [*] [*] [*]."
    assert (shared.shape(8), each.shape(8)) == ((4, 8), (45, 3, 8))
    (tmp_path / "groups.yaml").write_text("cat: pets\ndog: pets\nbackground: rest\n")
    groups = make_layout(voc, str(tmp_path / "groups.yaml"), "end", 2, 2).groups
    assert groups[7] == groups[11] != groups[0]
    assert groups[-1] == groups[-2] not in groups[:20]
    assert layout_of(each.as_dict()) == each
    (tmp_path / "groups.yaml").write_text("unicorn: pets\n")
    with pytest.raises(UsageError, match="'unicorn' is no class of voc"):
        make_layout(voc, str(tmp_path / "groups.yaml"), "end", 2, None)
    (tmp_path / "groups.yaml").write_text("- cat\n")
    with pytest.raises(InputError, match="a mapping"):
        make_layout(voc, str(tmp_path / "groups.yaml"), "end", 2, None)


def test_a_context_has_a_seed_of_its_own() -> None:
    layout = make_layout(TOY, "class", "front", 16, 8)
    torch.manual_seed(1)
    one = fresh_context(layout, 64, 0.0125, 3)
    torch.manual_seed(2)
    assert torch.equal(one, fresh_context(layout, 64, 0.0125, 3))
    assert not torch.equal(one, fresh_context(layout, 64, 0.0125, 4))
    assert one.std().item() == pytest.approx(0.0125, rel=0.05)


def test_files(tmp_path: Path, clip: FrozenClip) -> None:
    """The context alone, read back to the same texts; other towers, other classes and other files are refused."""
    layout = make_layout(TOY, "shared", "end", 4, None)
    texts = PromptTexts(clip, layout)
    context = fresh_context(layout, texts.width, 0.3, 0)
    path = tmp_path / "p.safetensors"
    save_prompts(path, context, TOY, layout, clip, {"task": "classification"})
    with safe_open(path, "pt") as opened:
        assert list(opened.keys()) == ["weights/context"]
    file = read_prompts(path)
    assert (file.layout, file.vocabulary.class_names) == (layout, TOY.class_names)
    bank, expected = file.on(clip), texts.bank(context)
    assert torch.equal(bank.all, expected.all)
    # Without learned vectors this is a text like any other.
    words = clip.encode_embeddings(texts.embedded.embeddings, texts.embedded.ends)
    plain = clip.encode_text(load_vocabulary("toy"))
    assert (F.normalize(words, dim=1)[:10] - plain.classes).abs().max() > 1e-3
    other = tmp_path / "other.safetensors"
    save_weights(other, {"context": context}, {"kind": "weclip"})
    with pytest.raises(WeightsError, match="not learned prompts"):
        read_prompts(other)
    about = dict(file.about) | {"text_sha256": "0" * 64}
    about.pop("digest")
    save_weights(other, {"context": context}, about)
    with pytest.raises(WeightsError, match="was learned with the text tower 0000"):
        read_prompts(other).on(clip)
    with pytest.raises(UsageError, match="other classes"):
        read_prompts(path, "voc")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(WeightsError, match="damaged"):
        read_prompts(path)


def test_released_contexts(tmp_path: Path, clip: FrozenClip) -> None:
    """The authors' checkpoints hold a context and nothing else; its shape tells the layout."""
    shared, each = torch.randn(16, 64), torch.randn(18, 4, 64)
    torch.save({"prompt_learner.ctx": shared}, tmp_path / "shared.pth")
    torch.save({"state_dict": {"ctx": each.half()}}, tmp_path / "each.pth")
    file = read_prompts(tmp_path / "shared.pth", "toy")
    assert (file.layout.position, file.layout.shared, file.layout.names[-1]) == ("end", True, TOY.background[-1])
    assert torch.equal(file.context, shared)
    file = read_prompts(tmp_path / "each.pth", None, "toy")
    assert (file.layout.position, file.layout.contexts, file.layout.names[10:]) == ("front", 18, ("",) * 8)
    assert file.words.background == ()
    width = clip.embed_prompts(["[*] cat."]).embeddings.shape[-1]
    torch.save({"ctx": torch.randn(4, width + 1)}, tmp_path / "wide.pth")
    with pytest.raises(WeightsError, match=rf"vectors of {width + 1} numbers.*takes {width}"):
        read_prompts(tmp_path / "wide.pth", "toy").on(clip)
    with pytest.raises(UsageError, match="name them with --classes"):
        read_prompts(tmp_path / "shared.pth")
    torch.save({"a": shared, "b": shared}, tmp_path / "two.pth")
    with pytest.raises(WeightsError, match="neither prompts of clipseed"):
        read_prompts(tmp_path / "two.pth", "toy")


def crops(clip: FrozenClip, labels: list[tuple[int, ...]]) -> Crops:
    dice = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(labels), 3, 48, 64), generator=dice, dtype=torch.uint8)
    known = torch.zeros(len(labels), 48, 64, dtype=torch.uint8)
    for row, present in enumerate(labels):
        for place, label in enumerate(present):
            known[row, 8 * place : 8 * place + 6, 10:30] = label + 1
    known[:, -4:] = 255
    return Crops(pixels, known, labels, indices=list(range(len(labels))), images=list(pixels))


def test_cached_maps_are_the_maps(clip: FrozenClip) -> None:
    """Through the cached basis, losses and gradients are those of the closed form; unseen classes are not encoded."""
    layout = make_layout(TOY, "class", "front", 3, 4)
    texts = PromptTexts(clip, layout)
    batch = crops(clip, [(1, 4), (), (7,)])
    found = []
    for cached in (False, True):
        learned = LearnedContext(fresh_context(layout, texts.width, 0.3, 0))
        trainer = SegmentationPrompts(clip.tower, texts, learned, PromptOptions(), 10, cached=cached)
        losses = trainer.losses(batch, 0)
        losses["loss"].backward()
        assert learned.context.grad is not None
        found.append((losses["loss"].detach(), learned.context.grad))
    (plain, gradient), (again, cached_gradient) = found
    assert plain > 0
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=0)
    assert (gradient - cached_gradient).abs().max() <= 1e-3 * gradient.abs().max()
    absent = [k for k in range(10) if k not in (1, 4, 7)]
    assert not gradient[absent].any()
    assert (gradient[[1, 4, 7, *range(10, 14)]].abs().amax(dim=(1, 2)) > 0).all()
    # And the maps one by one.
    text = texts.bank(learned.context.detach())
    bases = [basis_of(clip.tower, image[None]) for image in batch.images]
    features = torch.cat([basis.feature for basis in bases])
    dense = clip.tower.dense(clip.tower.normalize(batch.pixels))
    expected = gradcam(clip.tower, run_last_block(clip.tower, dense.tokens), text, batch.labels, dense.grid)
    ours = cams_from_bases(bases, features, text, batch.labels, dense.grid)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_nothing_to_learn_from(clip: FrozenClip) -> None:
    """Batches without any class, and seeds that are all background or all 255: a loss of 0 and a gradient of 0."""
    layout = make_layout(TOY, "shared", "end", 2, None)
    texts = PromptTexts(clip, layout)
    learned = LearnedContext(fresh_context(layout, texts.width, 0.3, 0))
    batch = crops(clip, [(), ()])
    for trainer in (
        ClassificationPrompts(clip.tower, texts, learned, PromptOptions(), 5),
        SegmentationPrompts(clip.tower, texts, learned, PromptOptions(), 5),
        SegmentationPrompts(clip.tower, texts, learned, PromptOptions(positives="image"), 5, cached=True),
    ):
        learned.zero_grad()
        losses = trainer.losses(batch, 0)
        losses["loss"].backward()
        assert losses["loss"].item() == 0
        assert all(torch.isfinite(value) for value in losses.values())
        assert learned.context.grad is not None
        assert not learned.context.grad.any()
    # All classes shown is as useless as none; maps without any pixel that counts cost nothing.
    logits = torch.randn(2, 3, requires_grad=True)
    assert contrastive_loss(logits, torch.tensor([[True] * 3, [False] * 3])).item() == 0
    cams = torch.randn(1, 3, 4, requires_grad=True)
    zero, one = torch.zeros(1, dtype=torch.long), torch.full((1, 6, 8), 255)
    for reduction in ("pixels", "sides", "pairs"):
        assert sum(activation_loss(cams, zero, zero, one, reduction)).item() == 0  # type: ignore[arg-type]


def test_crops_of_fma() -> None:
    """The longer side is drawn, the shorter one never below the crop; colours change and masks do not."""
    mask = torch.zeros(60, 90, dtype=torch.uint8)
    mask[20:40, 30:60] = 7
    image = 40 + 20 * mask[None].repeat(3, 1, 1)
    for seed in range(4):
        plain = Augmentation(48, mirror=0, sides=(50, 100))(seed, Image(image), Mask(mask))
        assert plain[0].shape == (3, 48, 48)
        assert plain[0].min() > 20  # nothing around the image: its shorter side is at least the crop
        assert plain[1].max() == 7
    # A range that is too small for the crop: the shorter side is the crop's.
    (whole,) = Augmentation(48, mirror=0, sides=(10, 10))(0, Mask(torch.arange(60)[:, None].repeat(1, 90).byte()))
    assert (int(whole.min()), int(whole.max())) == (0, 59)
    drawn = [Augmentation(48, mirror=0, sides=(96, 96), jitter=Jitter())(s, Image(image), Mask(mask)) for s in range(8)]
    still = [Augmentation(48, mirror=0, sides=(96, 96))(s, Image(image), Mask(mask)) for s in range(8)]
    for (colours, labels), (before, same) in zip(drawn, still, strict=True):
        assert torch.equal(labels, same)
        assert (colours.float() - before.float()).abs().max() <= 25 * 1.4 + 0.4 * 180 + 1
    assert len({tuple(colours[:, 0, 0].tolist()) for colours, _ in drawn}) > 4
    jitter = Jitter(brightness=0, contrast=(1, 1), saturation=(0, 0), hue=0)
    red = torch.tensor([200, 20, 20], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    faded = [jitter(red, torch.Generator().manual_seed(seed)) for seed in range(8)]
    spans = {int(pixels.max()) - int(pixels.min()) for pixels in faded}
    assert spans == {0, 180}  # half of them grey
    np.testing.assert_array_equal(faded[0], jitter(red, torch.Generator().manual_seed(0)))
