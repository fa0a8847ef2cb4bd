"""Texts: how they compete, and prompts with learned parts against open_clip's own encode_text."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipseed.clip import FrozenClip
from clipseed.clip.text import (
    TextBank,
    embed_prompts,
    encode_embeddings,
    encode_prompts,
    encode_vocabulary,
    present_mask,
)
from clipseed.data.vocabulary import load_vocabulary
from clipseed.errors import WeightsError

from helpers.models import tiny_config, tiny_model

PROMPTS = ["a clean origami cat.", "dog", "person with clothes,people,human", "a bird, flying over a very large house"]


def bank(classes: int = 3, background: int = 2, **rule: Any) -> TextBank:
    rows = F.normalize(torch.randn(classes + background, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    return TextBank(rows[:classes], rows[classes:], 12.0, **rule)


def features(*shape: int) -> Tensor:
    return 5 * torch.randn(*shape, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rule", [{}, {"competition": "sigmoid", "logit_bias": -2.5}])
@pytest.mark.parametrize("shape", [(4,), (4, 6)])
def test_probabilities_against_a_plain_loop(rule: dict[str, Any], shape: tuple[int, ...]) -> None:
    text, seen = bank(**rule), features(*shape)
    present = present_mask([[0], [2, 1], [], [0, 1, 2]], 3)
    logits, found = text.logits(seen, present), text.probabilities(seen, present)
    assert found.shape == (*shape, 5)
    for place in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist():
        own = seen[tuple(place)].double()
        allowed = [*(k for k in range(3) if present[place[0], k]), 3, 4]
        raw = {k: 12 * float(own @ text.all[k].double() / own.norm()) + rule.get("logit_bias", 0.0) for k in allowed}
        for k in range(5):
            if k not in allowed:
                assert logits[(*place, k)] == -math.inf
                assert found[(*place, k)] == 0
                continue
            alone, total = math.exp(raw[k]), sum(map(math.exp, raw.values()))
            expected = alone / (1 + alone) if rule else alone / total
            assert float(logits[(*place, k)]) == pytest.approx(raw[k], abs=1e-4)
            assert float(found[(*place, k)]) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(text.log_probabilities(seen, present).exp(), found)
    everything = torch.ones(shape[0], 3, dtype=torch.bool)
    assert torch.equal(text.probabilities(seen), text.probabilities(seen, everything))


def test_logits_of_known_similarities() -> None:
    text, seen = bank(), features(2, 3)
    present = present_mask([[1], [0, 2]], 3)
    cosines = F.normalize(seen, dim=-1) @ text.all.T
    torch.testing.assert_close(text.logits_of(cosines, present), text.logits(seen, present))
    assert torch.equal(text.logits_of(cosines, scale=1.0), cosines)


def test_a_bias_is_for_sigmoids() -> None:
    seen = features(2)
    assert torch.equal(bank(logit_bias=3.0).logits(seen), bank().logits(seen))


@pytest.mark.parametrize("competition", ["softmax", "sigmoid"])
def test_slope_of_the_logarithm(competition: Any) -> None:
    text = bank(competition=competition, logit_bias=-1.0)
    logits = text.logits(features(4), present_mask([[0], [2, 1], [], [0, 1, 2]], 3)).requires_grad_()
    label = torch.tensor([0, 2, 4, 1])
    chance = text.probabilities_of(logits)
    (expected,) = torch.autograd.grad(chance.gather(1, label[:, None]).log().sum(), logits)
    torch.testing.assert_close(text.log_slope(chance.detach(), label), expected)


def test_who_takes_part() -> None:
    present = present_mask([[1], [], [0, 2]], 3)
    assert present.tolist() == [[False, True, False], [False] * 3, [True, False, True]]
    assert bank().competing(present)[:, 3:].all()
    alone = bank(background=0)
    assert alone.contested(present).tolist() == [False, False, True]
    assert bank().contested(present).all()
    assert replace(alone, competition="sigmoid").contested(present).all()  # each text's probability is its own


def test_a_model_with_a_bias_is_one_of_sigmoids() -> None:
    import open_clip
    from open_clip.model import CLIP

    vocabulary = load_vocabulary("toy")
    tokenizer = open_clip.SimpleTokenizer()
    plain = encode_vocabulary(tiny_model().requires_grad_(False), tokenizer, vocabulary)
    assert (plain.competition, plain.logit_bias) == ("softmax", 0.0)
    siglip = CLIP(**tiny_config(), init_logit_bias=-10.0).requires_grad_(False)
    found = encode_vocabulary(siglip, tokenizer, vocabulary)
    assert (found.competition, found.logit_bias) == ("sigmoid", -10.0)


# Prompts with learned parts -------------------------------------------------------------------------------------------


def custom(**text: Any) -> nn.Module:
    """A model whose text tower is a module of its own."""
    from open_clip.model import CustomTextCLIP

    torch.manual_seed(1)
    config = tiny_config()
    config["text_cfg"].update(text)
    model = CustomTextCLIP(**config)
    with torch.no_grad():
        for value in model.text.parameters():
            value.normal_(std=0.1)
    return model.eval()


MODELS = {
    "OpenAI": tiny_model,
    "custom": custom,
    "projection with a bias": lambda: custom(proj_bias=True),
    "end token by its id": lambda: custom(pool_type="eos", eos_id=49407),
    "no causal mask, last token": lambda: custom(no_causal_mask=True, pool_type="last"),
    "first token": lambda: custom(no_causal_mask=True, pool_type="first"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_embeddings_equal_strings(kind: str) -> None:
    import open_clip

    model: Any = MODELS[kind]()
    tokenizer = open_clip.SimpleTokenizer()
    with torch.no_grad():
        expected = model.encode_text(tokenizer(PROMPTS))
        found = embed_prompts(model, tokenizer, PROMPTS)
        ours = encode_embeddings(model, found.embeddings, found.ends)
    assert found.slots.shape == (4, 0)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(encode_prompts(model, tokenizer, PROMPTS).detach(), expected, rtol=0, atol=2e-5)


def test_slots_are_where_the_marks_are(tiny_weights: Any) -> None:
    """Learned vectors in place of words: with the embeddings of words in them, the feature is that of those words."""
    clip = FrozenClip.load(weights=tiny_weights, device="cpu")
    words = clip.embed_prompts(["red green cat.", "red green very large dog"])
    marked = clip.embed_prompts(["[*] [*] cat.", "[*][*] very large dog"])
    assert marked.slots.tolist() == [[1, 2], [1, 2]]
    between = clip.embed_prompts(["a [*] cat, [*]."])
    assert between.slots.tolist() == [[2, 5]]
    nameless = clip.embed_prompts([" ".join(["[*]"] * 16) + " ."])
    assert nameless.slots.tolist() == [list(range(1, 17))]
    assert nameless.ends.tolist() == [18]  # start, 16 vectors, the full stop, end
    red_green = words.embeddings[0, 1:3]
    expected = clip.encode_embeddings(words.embeddings, words.ends)
    for vectors in (red_green, red_green.expand(2, 2, -1)):
        filled = marked.filled(vectors)
        assert torch.equal(clip.encode_embeddings(filled.embeddings, filled.ends), expected)
    assert (clip.encode_embeddings(marked.embeddings, marked.ends) - expected).abs().max() > 1e-3


def test_gradients_reach_learned_vectors(tiny_weights: Any) -> None:
    """Of a loss on prototypes, against differences; the frozen tower gets none."""
    clip = FrozenClip.load(weights=tiny_weights, device="cpu")
    prompts = clip.embed_prompts(["[*] [*] cat.", "[*] [*] dog."])
    vectors = prompts.embeddings[0, 1:3].clone().requires_grad_()
    direction = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))

    def loss(values: Tensor) -> Tensor:
        filled = prompts.filled(values)
        return (F.normalize(clip.encode_embeddings(filled.embeddings, filled.ends), dim=-1) * direction).sum()

    value = loss(vectors)
    value.backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().min() > 0
    step = 1e-2 * vectors.grad / vectors.grad.norm()
    with torch.no_grad():
        change = (loss(vectors + step) - loss(vectors - step)) / 2
    assert float(change) == pytest.approx(float((vectors.grad * step).sum()), rel=0.02)
    assert all(parameter.grad is None for parameter in clip._model.parameters())
    with torch.inference_mode():
        assert torch.equal(loss(vectors.detach()), value.detach())


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        (["[*] [*] cat.", "[*] [*] a very large dog", "[*] [*] x", "[*] [*] cat."], 3),
        (["[*] [*] cat.", "[*] [*] a very large dog"], 1),
        (["cat [*] [*].", "a very large dog [*] [*].", "[*] [*] ."], 0),
        (["[*] [*]", "[*] [*]", "[*] [*] dog"], 4),  # more than is the same: the first two end there
        (["[*] [*] cat."], 3),
    ],
)
def test_packed_tokens(prompts: list[str], shared: int, tiny_weights: Any) -> None:
    """Each token once and no padding: features and gradients of the model's own transformer."""
    clip = FrozenClip.load(weights=tiny_weights, device="cpu")
    embedded = clip.embed_prompts(prompts)
    dice = torch.Generator().manual_seed(1)
    vectors = torch.randn(2, embedded.embeddings.shape[-1], generator=dice)
    direction = torch.randn(len(prompts), 32, generator=dice)
    found = []
    for packed in (None, shared):
        learned = vectors.clone().requires_grad_()
        filled = embedded.filled(learned)
        features = clip.encode_embeddings(filled.embeddings, filled.ends, packed)
        (features * direction).sum().backward()
        found.append((features.detach(), learned.grad))
    (features, gradient), (ours, our_gradient) = found
    torch.testing.assert_close(ours, features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_prompts_that_cannot_be_learned(tiny_weights: Any) -> None:
    clip = FrozenClip.load(weights=tiny_weights, device="cpu")
    with pytest.raises(ValueError, match=r"equally many \[\*\], not \[1, 2\]"):
        clip.embed_prompts(["[*] cat", "[*] [*] dog"])
    with pytest.raises(ValueError, match="too long for the model's 77 tokens"):
        clip.embed_prompts(["word " * 80 + "[*]"])
    masked: Any = custom(no_causal_mask=True)
    masked.text.use_pad_mask = True
    for foreign in (nn.Linear(2, 2), custom(embed_cls=True), masked):
        with pytest.raises(WeightsError, match="cannot be fed with token embeddings"):
            encode_embeddings(foreign, torch.zeros(1, 77, 64), torch.tensor([3]))
