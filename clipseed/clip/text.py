"""Text: the unit vectors that image features are compared with, how they compete, and prompts with learned parts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipseed.data.vocabulary import Vocabulary
from clipseed.errors import WeightsError

Tokenizer = Callable[[list[str]], Tensor]
Competition = Literal["softmax", "sigmoid"]

SLOT = "[*]"
"""In a prompt: one token to be replaced by a learned vector."""
_STAND_INS = (" x ", " y ")
"""Words of one token each; where two prompts that differ by them differ in tokens, there the slots are."""


@dataclass(frozen=True)
class TextBank:
    """Unit prototypes of a vocabulary, float32, and the rule that turns similarities into probabilities.

    The only place where texts compete. Absent classes take no part in it, background words always do (CLIP-ES, section
    3.2).

    Attributes:
        classes: ``(C, E)``, in class order.
        background: ``(M, E)``; ``M`` may be 0.
        logit_scale: Factor between cosine similarity and logit (the exponential already taken).
        competition: ``softmax``: the texts share one probability (CLIP). ``sigmoid``: each has its own (SigLIP).
        logit_bias: Added to every logit, which matters to ``sigmoid`` alone.
        floor: Of the softmax, see :func:`masked_softmax`; 0 for the exact one.
    """

    classes: Tensor
    background: Tensor
    logit_scale: float
    competition: Competition = "softmax"
    logit_bias: float = 0.0
    floor: float = 0.0

    @property
    def all(self) -> Tensor:
        """``(C + M, E)``, classes first."""
        return torch.cat([self.classes, self.background])

    def logits(self, features: Tensor, present: Tensor | None = None) -> Tensor:
        """Logits of all texts ``(B, …, C + M)``, float32.

        Args:
            features: ``(B, …, E)`` of any length.
            present: ``(B, C)`` booleans; other classes are -inf. Default: all classes take part.
        """
        words = self.all.to(features.device)
        return self._competing(self.logit_scale * F.normalize(features.float(), dim=-1) @ words.T, present)

    def logits_of(self, similarities: Tensor, present: Tensor | None = None, scale: float | None = None) -> Tensor:
        """The same from similarities ``(B, …, C + M)`` that are known; ``scale`` in place of the model's own."""
        return self._competing((self.logit_scale if scale is None else scale) * similarities, present)

    def probabilities(self, features: Tensor, present: Tensor | None = None) -> Tensor:
        """Probabilities of all texts ``(B, …, C + M)``, those of absent classes 0; arguments as of :meth:`logits`."""
        if self.floored:
            logits = self.logits(features)
            kept = torch.ones_like(logits, dtype=torch.bool)
            if present is not None:
                competing = self.competing(present)
                kept &= competing.view(len(competing), *(1,) * (logits.ndim - 2), -1)
            return masked_softmax(logits, kept, self.floor)
        return self.probabilities_of(self.logits(features, present))

    @property
    def floored(self) -> bool:
        """Whether probabilities are those of :func:`masked_softmax` with its constant."""
        return self.floor > 0 and self.competition == "softmax"

    def probabilities_of(self, logits: Tensor) -> Tensor:
        """The same from :meth:`logits`."""
        return logits.softmax(dim=-1) if self.competition == "softmax" else logits.sigmoid()

    def log_probabilities(self, features: Tensor, present: Tensor | None = None) -> Tensor:
        """Logarithms of :meth:`probabilities`, also where those are too small for single precision."""
        logits = self.logits(features, present)
        return logits.log_softmax(dim=-1) if self.competition == "softmax" else F.logsigmoid(logits)

    def log_slope(self, probability: Tensor, label: Tensor, strongest: Tensor | None = None) -> Tensor:
        """Derivative ``(P, C + M)`` of the logarithm of one text's probability with respect to all logits.

        Args:
            probability: ``(P, C + M)``.
            label: ``(P,)`` the text of each row.
            strongest: ``(P,)`` the text with the largest logit of all, where the softmax has a floor: what is missing
                to a sum of 1 grows with it.
        """
        own = F.one_hot(label, probability.shape[-1]).to(probability.dtype)
        if self.competition == "sigmoid":
            return own * (1 - probability)
        slope = own - probability
        if strongest is None:
            return slope
        missing = 1 - probability.sum(dim=-1, keepdim=True)
        return slope - missing * F.one_hot(strongest, probability.shape[-1]).to(probability.dtype)

    def contested(self, present: Tensor) -> Tensor:
        """Whether a probability tells anything ``(B,)``: the only text of a softmax is certain, whatever it is."""
        alone = self.competing(present).sum(dim=-1) < 2
        return ~alone if self.competition == "softmax" else torch.ones_like(alone)

    def competing(self, present: Tensor) -> Tensor:
        """Which texts compete with each other in each image: its present classes, and every background word.

        This is the one rule of what a class is compared with (CLIP-ES, section 3.2). Maps with a softmax
        (softmax-GradCAM and the dense methods) follow it. Tagging follows it too; which classes are present is what it
        is to find out, so all of them compete. Two things differ for a reason:

        - Where nothing competes (one class, no background word) its probability is 1 whatever the image shows. Its
          gradient is zero, so softmax-GradCAM has an empty map, as the released code has; the dense methods, which
          have a cosine for every patch, fall back to that. Plain Grad-CAM never compares.
        - Sharpness (``clipseed prompts``) compares all classes, without background words: it is linear in the scores,
          so that a template under which every image looks like grass would score best.

        Args:
            present: ``(B, C)`` booleans.

        Returns:
            ``(B, C + M)`` booleans, classes first.
        """
        return F.pad(present, (0, len(self.background)), value=True)

    def _competing(self, logits: Tensor, present: Tensor | None) -> Tensor:
        if self.competition == "sigmoid":
            logits = logits + self.logit_bias
        if present is None:
            return logits
        absent = ~self.competing(present)
        while absent.ndim < logits.ndim:
            absent = absent.unsqueeze(-2)
        return logits.masked_fill(absent, float("-inf"))


def masked_softmax(logits: Tensor, kept: Tensor, floor: float = 0.0) -> Tensor:
    """Softmax over the kept entries of ``(…, C)``; the others are 0.

    Args:
        logits: Any.
        kept: Of the same shape, booleans.
        floor: Added to the sum of exponentials, which are those of the distances to the largest of *all* logits: of an
            image whose strongest class is left out by far, all probabilities shrink. FMA-WSSS's released code: 1e-5.
            0: the exact softmax, where rows without any kept entry are 0.
    """
    if floor:
        rows = kept * (logits - logits.amax(dim=-1, keepdim=True)).exp()
        return rows / (rows.sum(dim=-1, keepdim=True) + floor)
    return logits.masked_fill(~kept, float("-inf")).softmax(dim=-1).masked_fill(~kept, 0)


def present_mask(labels: Sequence[Sequence[int]], classes: int, device: torch.device | str = "cpu") -> Tensor:
    """``(B, C)``: true where an image has the label."""
    mask = torch.zeros(len(labels), classes, dtype=torch.bool, device=device)
    pairs = [(row, label) for row, present in enumerate(labels) for label in present]
    index = torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2)
    mask[index[:, 0], index[:, 1]] = True
    return mask


@dataclass(frozen=True)
class PromptEmbeddings:
    """Prompts as the text tower's input, before positions are added.

    Attributes:
        embeddings: ``(P, L, D)`` token embeddings, L the model's context length.
        ends: ``(P,)`` position at which each prompt's feature is read: its end-of-text token.
        slots: ``(P, n)`` positions of the tokens that stand for learned vectors (:data:`SLOT`), in order.
        tokens: ``(P, L)`` token ids, with that of the word ``x`` in the slots.
    """

    embeddings: Tensor
    ends: Tensor
    slots: Tensor
    tokens: Tensor

    def take(self, rows: Tensor) -> PromptEmbeddings:
        """Some of the prompts."""
        return PromptEmbeddings(self.embeddings[rows], self.ends[rows], self.slots[rows], self.tokens[rows])

    def filled(self, vectors: Tensor) -> PromptEmbeddings:
        """The same with ``vectors`` in the slots: ``(n, D)`` for all prompts alike, or ``(P, n, D)``."""
        count, slots = self.slots.shape
        rows = torch.arange(count, device=self.slots.device)[:, None]
        embeddings = self.embeddings.clone()
        embeddings[rows, self.slots] = vectors.to(embeddings.dtype).expand(count, slots, -1)
        return replace(self, embeddings=embeddings)


def embed_prompts(model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[str]) -> PromptEmbeddings:
    """Token embeddings of prompts, in which ``[*]`` marks a token that is to be replaced by a learned vector.

    ``"[*] [*] [*] cat."`` has three slots before the words; ``"a photo of a cat."`` has none. What stands in the slots
    at first is the embedding of some word, as good a start as any.

    Raises:
        WeightsError: the text tower is not open_clip's own.
        ValueError: the prompts do not have equally many slots, or one is longer than the context.
    """
    text = _own_tower(model)
    counts = {prompt.count(SLOT) for prompt in prompts}
    if len(counts) != 1:
        raise ValueError(f"all prompts must have equally many {SLOT}, not {sorted(counts)}")
    tokens, other = (tokenizer([prompt.replace(SLOT, word) for prompt in prompts]) for word in _STAND_INS)
    differs = tokens != other
    if differs.sum(dim=1).tolist() != [prompt.count(SLOT) for prompt in prompts]:
        raise ValueError(f"a prompt is too long for the model's {tokens.shape[1]} tokens: {SLOT} is cut off")
    tokens = tokens.to(text.token_embedding.weight.device)
    slots = differs.nonzero()[:, 1].view(len(prompts), -1).to(tokens.device)
    return PromptEmbeddings(text.token_embedding(tokens), _ends(text, tokens), slots, tokens)


def encode_embeddings(model: nn.Module, embeddings: Tensor, ends: Tensor, shared: int | None = None) -> Tensor:
    """Text features ``(P, E)`` of token embeddings, not normalized; gradients flow through to them.

    Args:
        model: open_clip's; frozen or not.
        embeddings: ``(P, L, D)`` before positions are added, L at most the context length.
        ends: ``(P,)`` positions at which to read the features.
        shared: Compute no token twice and no padding, with so many first tokens that are the same in all prompts (0:
            none are): for prompts that are learned. ``None``: as the model does it.

    Raises:
        WeightsError: the text tower is not open_clip's own.
    """
    text = _own_tower(model)
    causal = text.attn_mask
    # Under a causal mask nothing behind the end-of-text token is ever read, so the padding need not be computed.
    length = embeddings.shape[1] if causal is None else int(ends.max()) + 1
    x = embeddings[:, :length] + text.positional_embedding[:length]
    if shared is not None and causal is not None and _is_plain(text.transformer):
        x = _packed(text.transformer, x, ends, min(shared, int(ends.min())), causal[:length, :length])
    else:
        x = text.transformer(x, attn_mask=None if causal is None else causal[:length, :length])
        x = x[torch.arange(len(x), device=x.device), ends]
    x = text.ln_final(x)
    projection = text.text_projection
    if projection is None:
        return torch.as_tensor(x)
    return torch.as_tensor(projection(x) if isinstance(projection, nn.Module) else x @ projection)


def _is_plain(transformer: Any) -> bool:
    """Whether its blocks are open_clip's plain ones, whose parts can be run apart."""
    names = ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2")
    return all(
        all(hasattr(block, name) for name in names) and getattr(block.attn, "in_proj_weight", None) is not None
        for block in transformer.resblocks
    )


def _packed(transformer: Any, x: Tensor, ends: Tensor, shared: int, mask: Tensor) -> Tensor:
    """Output of a causal transformer at the ends of prompts ``(P, L, D)``: ``(P, D)``.

    Tokens stand in one row, the shared ones once and no padding, for all but attention: its queries and keys are laid
    out in rows of equal length, where the causal mask hides what is behind an end. The last block is asked about the
    ends only.
    """
    count, length = x.shape[:2]
    inside = torch.arange(shared, length, device=x.device) <= ends[:, None]
    places = inside.flatten().nonzero()[:, 0]
    last = shared - 1 + inside.sum(dim=1).cumsum(dim=0)
    tokens = torch.cat([x[0, :shared], x[:, shared:].flatten(0, 1).index_select(0, places)])
    mask = mask.to(x.dtype)
    *before, final = transformer.resblocks

    def rows(packed: Tensor) -> Tensor:
        """``(T, h, d)`` behind the shared tokens, in rows: ``(P, h, L - shared, d)``."""
        laid = packed.new_zeros(count * (length - shared), *packed.shape[1:]).index_copy(0, places, packed[shared:])
        return laid.view(count, length - shared, *packed.shape[1:]).transpose(1, 2)

    def seen(packed: Tensor) -> Tensor:
        """Keys or values of each prompt, with the shared ones in front: ``(P, h, L, d)``."""
        front = packed[:shared].transpose(0, 1).expand(count, -1, -1, -1)
        return torch.cat([front, rows(packed)], dim=2)

    for block in before:
        q, k, v = _heads(block, tokens)
        start = _attended(q[:shared], k[:shared], v[:shared], mask[:shared, :shared]) if shared else tokens[:0]
        attended = F.scaled_dot_product_attention(rows(q), seen(k), seen(v), attn_mask=mask[shared:])
        attended = attended.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, places)
        tokens = _finished(block, tokens, torch.cat([start, attended]))
    q, k, v = _heads(final, tokens)
    attended = F.scaled_dot_product_attention(
        q[last].unsqueeze(2), seen(k), seen(v), attn_mask=mask[ends].view(count, 1, 1, length)
    )
    return _finished(final, tokens[last], attended.flatten(1))


def _heads(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a block, ``(T, heads, d)`` each."""
    attention = block.attn
    joined = F.linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = joined.view(len(tokens), 3, attention.num_heads, -1).unbind(dim=1)
    return q, k, v


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one row of tokens to itself: ``(T, heads * d)``."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1).flatten(1)


def _finished(block: Any, tokens: Tensor, attended: Tensor) -> Tensor:
    """A block's output ``(T, D)``, given what its heads saw."""
    tokens = tokens + block.ls_1(block.attn.out_proj(attended))
    return torch.as_tensor(tokens + block.ls_2(block.mlp(block.ln_2(tokens))))


def text_tower_sha256(model: nn.Module) -> str:
    """SHA-256 of the text tower's weights as float32: whatever file or type they come in, the same weights have one."""
    text = _own_tower(model)
    parts = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
    digest = hashlib.sha256()
    for name, value in sorted(text.state_dict().items()):
        if name.split(".")[0] in parts:
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def encode_prompts(model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[str]) -> Tensor:
    """Text features ``(P, E)`` of whole prompts, not normalized."""
    device = next(model.parameters()).device
    features = [_encode(model, tokenizer(list(prompts[k : k + 256])).to(device)) for k in range(0, len(prompts), 256)]
    return torch.cat(features).float()


def _encode(model: Any, tokens: Tensor) -> Tensor:
    if not _is_own_tower(_tower_of(model)):
        return torch.as_tensor(model.encode_text(tokens))
    text = _own_tower(model)
    return encode_embeddings(model, text.token_embedding(tokens), _ends(text, tokens))


def _tower_of(model: Any) -> Any:
    """The module that holds the text tower's parts: the model itself, or what open_clip calls custom text."""
    return getattr(model, "text", model)


def _is_own_tower(text: Any) -> bool:
    """Whether features follow from token embeddings alone: no class token behind them, no mask of the padding."""
    return (
        all(hasattr(text, name) for name in ("token_embedding", "positional_embedding", "ln_final", "attn_mask"))
        and getattr(text, "cls_emb", None) is None
        and not getattr(text, "use_pad_mask", False)
        and _pooling(text) != "none"
    )


def _own_tower(model: Any) -> Any:
    text = _tower_of(model)
    if not _is_own_tower(text):
        raise WeightsError(
            f"the text tower {type(text).__name__} cannot be fed with token embeddings; learned prompts need a model "
            "with open_clip's own text transformer, such as ViT-B-16"
        )
    return text


def _pooling(text: Any) -> str:
    return str(getattr(text, "text_pool_type", None) or getattr(text, "pool_type", "argmax"))


def _ends(text: Any, tokens: Tensor) -> Tensor:
    """Where open_clip reads the features of token ids ``(P, L)``."""
    pooling = _pooling(text)
    if pooling == "eos":
        end = getattr(text, "text_eos_id", None) or text.eos_id
        return torch.as_tensor((tokens == end).int().argmax(dim=-1))
    if pooling == "argmax":
        return tokens.argmax(dim=-1)
    return torch.full((len(tokens),), 0 if pooling == "first" else tokens.shape[1] - 1, device=tokens.device)


def prototypes(
    model: nn.Module, tokenizer: Tokenizer, phrases: Sequence[str], templates: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Unit prototypes ``(P, E)`` of phrases, and the raw features ``(P, T, E)`` they come from.

    Each template's feature is normalized, then they are averaged and the average normalized (CLIP-ES, section 3.1).
    """
    prompts = [template.format(phrase) for phrase in phrases for template in templates]
    raw = encode_prompts(model, tokenizer, prompts)
    raw = raw.view(len(phrases), len(templates), -1)
    return F.normalize(F.normalize(raw, dim=-1).mean(dim=1), dim=-1), raw


def encode_vocabulary(model: nn.Module, tokenizer: Tokenizer, vocabulary: Vocabulary) -> TextBank:
    """Prototypes of a vocabulary's classes and background words."""
    phrases = [item.prompt for item in vocabulary.classes] + list(vocabulary.background)
    bank, _ = prototypes(model, tokenizer, phrases, vocabulary.templates)
    return bank_of(model, bank, len(vocabulary.classes))


def bank_of(model: Any, texts: Tensor, classes: int) -> TextBank:
    """A model's own competition between unit prototypes ``(C + M, E)``, of which the first are classes."""
    bias: Any = getattr(model, "logit_bias", None)  # which only models trained with a sigmoid have
    bank = TextBank(texts[:classes], texts[classes:], float(model.logit_scale.detach().float().exp()))
    return bank if bias is None else replace(bank, competition="sigmoid", logit_bias=float(bias))
