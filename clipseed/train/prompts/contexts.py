"""From context vectors to the prototypes of a text bank, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipseed.clip.model import FrozenClip
from clipseed.clip.text import TextBank
from clipseed.errors import UsageError
from clipseed.train.prompts.layout import PromptLayout


class LearnedContext(nn.Module):
    """What is trained: ``context`` ``(M, D)`` or ``(U, M, D)``, nothing else."""

    def __init__(self, context: Tensor) -> None:
        super().__init__()
        self.context = nn.Parameter(context)


def fresh_context(layout: PromptLayout, width: int, deviation: float, seed: int) -> Tensor:
    """Context from a normal distribution around 0, out of a generator of its own.

    Args:
        layout: Of the prompts.
        width: Of a token embedding.
        deviation: Of the distribution; 0.015 and 0.0125 in FMA-WSSS.
        seed: Has nothing to do with the order of images.
    """
    return deviation * torch.randn(layout.shape(width), generator=torch.Generator().manual_seed(seed))


def context_of_words(clip: FrozenClip, words: str) -> Tensor:
    """Token embeddings of some words ``(M, D)``, to begin with: ``a clean origami`` is CLIP-ES's template."""
    with torch.no_grad():
        embedded = clip.embed_prompts([words])
    return embedded.embeddings[0, 1 : int(embedded.ends[0])].cpu().clone()


class PromptTexts:
    """Text features of a layout's prompts with any context in them.

    Args:
        clip: Frozen.
        layout: Of the prompts, which are embedded once.
        floor: Of the softmax, see :class:`~clipseed.clip.text.TextBank`.

    Raises:
        UsageError: a prompt is longer than the text tower's context.
        WeightsError: the text tower cannot be fed with embeddings.
    """

    def __init__(self, clip: FrozenClip, layout: PromptLayout, floor: float = 0.0) -> None:
        self.layout, self._clip, self._floor = layout, clip, floor
        try:
            with torch.no_grad():
                self.embedded = clip.embed_prompts(layout.prompts)
        except ValueError as error:
            raise UsageError(f"--context-length {layout.length}: {error}") from error
        self._groups = torch.tensor(layout.groups, device=self.embedded.ends.device)
        # All prompts begin with one token. With names at the end, those of one context are the same up to its last.
        alike = layout.contexts == 1 and layout.position == "end"
        self._shared = 1 + layout.length if alike else 1

    @property
    def width(self) -> int:
        """Of a token embedding, D."""
        return int(self.embedded.embeddings.shape[-1])

    def features(self, context: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Unit text features of the prompts ``(G, E)``, or of some of them ``(R, E)``; float32."""
        groups, prompts = self._groups, self.embedded
        if rows is not None:
            chosen = torch.tensor(rows, dtype=torch.long, device=groups.device)
            groups, prompts = groups[chosen], prompts.take(chosen)
        filled = prompts.filled(context if context.ndim == 2 else context[groups])
        return F.normalize(self._clip.encode_embeddings(filled.embeddings, filled.ends, self._shared).float(), dim=-1)

    def compared(self, features: Tensor) -> TextBank:
        """Unit features of the classes ``(F, E)`` as texts that are compared with images, without any background."""
        return self._clip.text_bank(features, len(features))

    def bank(self, context: Tensor, present: Sequence[int] | None = None) -> TextBank:
        """The prompts as texts that compete.

        Args:
            context: To put in.
            present: Encode only these classes and the background: the others take no part, and their prototypes are 0.
                Ignored where the softmax looks at all of them.
        """
        layout = self.layout
        if present is None or self._floor or len(set(present)) == layout.classes:
            texts = self.features(context)
        else:
            rows = [*sorted(set(present)), *range(layout.classes, len(layout.names))]
            some = self.features(context, rows)
            texts = some.new_zeros(len(layout.names), some.shape[1])
            texts = texts.index_copy(0, torch.tensor(rows, dtype=torch.long, device=some.device), some)
        return replace(self._clip.text_bank(texts, layout.classes), floor=self._floor)
