"""Text prototypes: the unit vectors that image features are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipseed.data.vocabulary import Vocabulary

Tokenizer = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class TextBank:
    """Unit prototypes of a vocabulary, float32.

    Attributes:
        classes: ``(C, E)``, in class order.
        background: ``(M, E)``; ``M`` may be 0.
        logit_scale: Factor between cosine similarity and logit (the exponential already taken).
    """

    classes: Tensor
    background: Tensor
    logit_scale: float

    @property
    def all(self) -> Tensor:
        """``(C + M, E)``, classes first."""
        return torch.cat([self.classes, self.background])

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


@torch.inference_mode()
def encode_prompts(model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[str]) -> Tensor:
    """Text features ``(P, E)`` of whole prompts, not normalised."""
    device = next(model.parameters()).device
    features = [_encode(model, tokenizer(list(prompts[k : k + 256])).to(device)) for k in range(0, len(prompts), 256)]
    return torch.cat(features).float()


def _encode(model: Any, tokens: Tensor) -> Tensor:
    causal = getattr(model, "attn_mask", None)
    if causal is None or getattr(model, "text_pool_type", None) != "argmax":
        return torch.as_tensor(model.encode_text(tokens))
    # Under a causal mask nothing behind the end-of-text token is ever read, so the padding need not be computed.
    length = int(tokens.argmax(dim=-1).max()) + 1
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=causal[:length, :length]))
    x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]
    projection = model.text_projection
    return torch.as_tensor(projection(x) if isinstance(projection, nn.Module) else x @ projection)


def prototypes(
    model: nn.Module, tokenizer: Tokenizer, phrases: Sequence[str], templates: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Unit prototypes ``(P, E)`` of phrases, and the raw features ``(P, T, E)`` they come from.

    Each template's feature is normalised, then they are averaged and the average normalised (CLIP-ES, section 3.1).
    """
    prompts = [template.format(phrase) for phrase in phrases for template in templates]
    raw = encode_prompts(model, tokenizer, prompts)
    raw = raw.view(len(phrases), len(templates), -1)
    return F.normalize(F.normalize(raw, dim=-1).mean(dim=1), dim=-1), raw


def encode_vocabulary(model: nn.Module, tokenizer: Tokenizer, vocabulary: Vocabulary) -> TextBank:
    """Prototypes of a vocabulary's classes and background words."""
    phrases = [item.prompt for item in vocabulary.classes] + list(vocabulary.background)
    bank, _ = prototypes(model, tokenizer, phrases, vocabulary.templates)
    count = len(vocabulary.classes)
    scale: Any = model.logit_scale
    return TextBank(bank[:count], bank[count:], float(scale.detach().float().exp()))
