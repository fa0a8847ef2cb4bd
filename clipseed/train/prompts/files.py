"""Files of learned prompts: the context, and what it takes to make texts of it.

Ours are safetensors of the context alone; the metadata ``clipseed`` names the class list, the prompts' layout, and the
text tower with the SHA-256 of its weights. The authors' checkpoints hold a context and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipseed.clip.model import FrozenClip
from clipseed.clip.text import TextBank
from clipseed.data.dataset import DatasetOptions
from clipseed.data.vocabulary import Vocabulary, builtin_vocabularies, load_vocabulary, parse_vocabulary
from clipseed.digest import file_sha256
from clipseed.errors import UsageError, WeightsError
from clipseed.train.checkpoint import is_ours, read_weights, save_weights
from clipseed.train.prompts.contexts import PromptTexts
from clipseed.train.prompts.layout import PromptLayout, layout_of, make_layout
from clipseed.weights import read_weights as read_foreign_weights

KIND = "prompts"
_NAMES = ("ctx", "context")
"""What the last part of a released context's name is."""


@dataclass(frozen=True)
class PromptFile:
    """Learned prompts.

    Attributes:
        path: The file.
        context: ``(M, D)`` or ``(U, M, D)`` float32.
        vocabulary: Their classes.
        layout: Of the prompts.
        text_sha256: Digest of the text tower they were learned with; ``None`` where that is not known.
        sha256: Digest of the file.
        about: What the file says of itself.
    """

    path: Path
    context: Tensor
    vocabulary: Vocabulary
    layout: PromptLayout
    text_sha256: str | None
    sha256: str
    about: Mapping[str, Any]

    def on(self, clip: FrozenClip, floor: float = 0.0) -> TextBank:
        """The prompts as texts of a CLIP that compete.

        Args:
            clip: Whose text tower reads them.
            floor: Of the softmax.

        Raises:
            WeightsError: they were learned with another text tower.
        """
        texts = PromptTexts(clip, self.layout, floor)
        refuse_other_tower(self, clip, texts.width)
        with torch.no_grad():
            return texts.bank(self.context.to(clip.tower.device))

    @property
    def words(self) -> Vocabulary:
        """The vocabulary of what is made with them: without background words where those prompts are nameless."""
        background = tuple(name for name in self.layout.names[self.layout.classes :] if name)
        return replace(self.vocabulary, background=background)

    def dataset(self, options: DatasetOptions) -> DatasetOptions:
        """A data set whose vocabulary is that of the prompts.

        Raises:
            UsageError: the options ask for other words.
        """
        if options.templates or options.background is not None:
            raise UsageError(
                "--prompts: learned prompts have no template and no other background words; leave them out"
            )
        return replace(options, classes=None, vocabulary=self.words)

    def manifest(self) -> dict[str, Any]:
        """What decides the texts, for the options of an output."""
        return {"prompts": self.sha256}


def refuse_other_tower(file: PromptFile, clip: FrozenClip, width: int) -> None:
    """Raise :class:`~clipseed.errors.WeightsError` where prompts were learned with another text tower."""
    if file.context.shape[-1] != width:
        raise WeightsError(
            f"{file.path}: context vectors of {file.context.shape[-1]} numbers, but the text tower of "
            f"{clip.info.weights} takes {width}; name the prompts' own CLIP with --weights"
        )
    if file.text_sha256 is not None and file.text_sha256 != clip.text_sha256:
        raise WeightsError(
            f"{file.path}: was learned with the text tower {file.text_sha256[:16]}…, not with that of "
            f"{clip.info.weights}, {clip.text_sha256[:16]}…; name the prompts' own CLIP with --weights"
        )


def save_prompts(
    path: Path, context: Tensor, vocabulary: Vocabulary, layout: PromptLayout, clip: FrozenClip,
    about: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write learned prompts.

    Raises:
        StoreError: they cannot be written.
    """
    save_weights(
        path, {"context": context}, {
            "kind": KIND, "vocabulary": vocabulary.as_dict(), "layout": layout.as_dict(),
            "text_sha256": clip.text_sha256, "tower": clip.manifest(), **about,
        },
    )  # fmt: skip


def read_prompts(path: Path, classes: str | None = None, dataset: str | None = None) -> PromptFile:
    """Read learned prompts, ours or a checkpoint of FMA-WSSS's authors.

    Theirs names neither classes nor layout. A context ``(M, D)`` is read as one for all names, with the name at the end
    and the class list's background words; ``(G, M, D)`` as one for each name, with the name in front and nameless
    background prompts: the two that they published.

    Args:
        path: The file.
        classes: Class list; of ours, to be checked against its own.
        dataset: Data set whose class list is that of an authors' checkpoint, where ``classes`` are not given.

    Raises:
        WeightsError: missing, damaged, or no prompts.
        UsageError: ``classes`` are not the file's, or are needed.
    """
    if not (path.suffix == ".safetensors" and is_ours(path)):
        known = builtin_vocabularies()
        return _released(path, classes or (dataset if dataset in known else None))
    tensors, about = read_weights(path)
    if about.get("kind") != KIND:
        what = "a checkpoint of training" if about.get("kind") == "checkpoint" else f"a file of {about.get('kind')}"
        raise WeightsError(f"{path}: {what}, not learned prompts; give the file that clipseed train prompts wrote")
    try:
        context, layout = tensors["context"].float(), layout_of(about["layout"])
        vocabulary = parse_vocabulary(about["vocabulary"], str(path), "prompts")
        text_sha256 = str(about["text_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its description of the prompts cannot be read ({error})") from error
    if tuple(context.shape) != layout.shape(context.shape[-1]) or len(vocabulary.classes) != layout.classes:
        raise WeightsError(f"{path}: a context of shape {tuple(context.shape)} does not fit its description")
    if classes is not None and load_vocabulary(classes).class_names != vocabulary.class_names:
        raise UsageError(f"--classes {classes}: other classes than those of {path}; leave it out")
    return PromptFile(path, context, vocabulary, layout, text_sha256, file_sha256(path), about)


def released_context(path: Path) -> tuple[Tensor, str]:
    """The context ``(M, D)`` or ``(G, M, D)`` of an authors' checkpoint, float32, and the file's digest.

    Raises:
        WeightsError: there is none in it.
    """
    file = read_foreign_weights(path)
    found = [value for name, value in file.state.items() if name.rsplit(".", 1)[-1] in _NAMES]
    if not found and len(file.state) == 1:
        found = list(file.state.values())
    if len(found) != 1 or found[0].ndim not in (2, 3):
        raise WeightsError(f"{path}: neither prompts of clipseed nor a context as FMA-WSSS's authors released it")
    context = found[0].float()
    if not torch.isfinite(context).all():
        raise WeightsError(f"{path}: its context holds NaN or infinity; the file is damaged")
    return context, file.sha256


def _released(path: Path, classes: str | None) -> PromptFile:
    context, sha256 = released_context(path)
    if classes is None:
        raise UsageError(f"{path}: a context that does not tell its classes; name them with --classes (voc, coco)")
    vocabulary = load_vocabulary(classes)
    each = context.ndim == 3
    nameless = len(context) - len(vocabulary.classes) if each else None
    if nameless is not None and nameless < 0:
        raise UsageError(f"--classes {classes}: {len(vocabulary.classes)} classes, {path} has {len(context)} contexts")
    layout = make_layout(
        vocabulary, "class" if each else "shared", "front" if each else "end", context.shape[-2], nameless
    )
    return PromptFile(path, context, vocabulary, layout, None, sha256, {"kind": KIND, "released": True})


def text_of(clip: FrozenClip, vocabulary: Vocabulary, learned: PromptFile | None, floor: float = 0.0) -> TextBank:
    """The texts of a class list: learned prompts where there are some, else its words.

    Args:
        clip: Whose text tower reads them.
        vocabulary: The class list.
        learned: Prompts of the same classes.
        floor: Of the softmax.

    Raises:
        WeightsError: the prompts were learned with another text tower.
    """
    return replace(clip.encode_text(vocabulary), floor=floor) if learned is None else learned.on(clip, floor)
