"""Frozen CLIP: loading from any source, dense image features and text prototypes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clipseed.clip.architecture import (
    Config,
    build_model,
    decide_activation,
    inferred_config,
    named_config,
    refuse_unsupported,
    round_linear_weights,
)
from clipseed.clip.checkpoint import Activation, Checkpoint, read_checkpoint
from clipseed.clip.licenses import license_of
from clipseed.clip.text import (
    PromptEmbeddings,
    TextBank,
    Tokenizer,
    bank_of,
    embed_prompts,
    encode_embeddings,
    encode_vocabulary,
    text_tower_sha256,
)
from clipseed.clip.vision import DenseFeatures, VisionTower, tower_from
from clipseed.data.vocabulary import Vocabulary
from clipseed.defaults import MODEL, WEIGHTS, Precision
from clipseed.device import dtype_name, pick_device, pick_dtype
from clipseed.digest import file_sha256
from clipseed.errors import WeightsError
from clipseed.network import HUB, reachable

TOY_WEIGHTS = "toy"
Loaded = TypeVar("Loaded", bound="FrozenClip")


@dataclass(frozen=True)
class ModelInfo:
    """What an output file records about the model it was made with."""

    model: str
    weights: str
    sha256: str
    activation: str
    patch: int
    blocks: int
    width: int
    heads: int
    embed_dim: int
    train_grid: int
    license: str = "unknown"
    """Of the weights, as their publisher states it; ``unknown`` for files."""


class FrozenClip:
    """A CLIP model that is never trained: dense image features and text prototypes.

    Use :meth:`load`. The vision tower runs on ``device`` in ``dtype``; text is encoded once, in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        tower: VisionTower,
        info: ModelInfo,
        precision: str,
        location: str,
    ) -> None:
        self.tower = tower
        self.info = info
        self.precision = precision
        self.location = location
        """Pretrained tag, or the weights' absolute path: what :meth:`load` takes to load the same model again."""
        self._model = model
        self._tokenizer = tokenizer

    @classmethod
    def load(
        cls: type[Loaded],
        model: str | None = None,
        weights: str | Path = WEIGHTS,
        device: str | torch.device = "auto",
        precision: Precision = "auto",
        *,
        released_rounding: bool = False,
    ) -> Loaded:
        """Load a frozen CLIP.

        Args:
            model: open_clip model name; default ``ViT-B-16`` for a pretrained tag, read off the tensors for a file.
            weights: Pretrained tag (``openai``, ``laion2b_s34b_b88k``, …), a file or folder, or ``toy``.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
            precision: Type of the vision tower; ``auto`` is half precision on a GPU, and on a CPU bf16 where
                that is faster, else fp32 (:mod:`clipseed.device`).
            released_rounding: Round linear weights and position tables to half precision as CLIP-ES's released code
                does (:func:`~clipseed.clip.architecture.round_linear_weights`).

        Raises:
            WeightsError: not found, damaged, unsupported or contradictory.
            UsageError: the model has an unknown name, or the device or precision does not exist here.
        """
        device = pick_device(device)
        pick_dtype(precision, device)  # refuse unknown names before weights are read
        checkpoint, tagged, pixels = _find_weights(model, str(weights))
        network, config = _assemble(model, checkpoint, tagged)
        mean, std = pixels or _pixel_statistics(checkpoint)
        if released_rounding:
            round_linear_weights(network)
        visual: Any = network.visual
        width = visual.class_embedding.shape[-1] if hasattr(visual, "class_embedding") else None
        dtype = pick_dtype(precision, device, width, released_rounding=released_rounding)
        tower = tower_from(visual, mean, std, device, dtype, half_positions=released_rounding)
        vision = config["vision_cfg"]
        by_name = tagged is not None or str(weights) == TOY_WEIGHTS
        info = ModelInfo(
            model=model or "inferred",
            weights=str(weights) if by_name else checkpoint.path.name,
            sha256=checkpoint.sha256,
            activation="quickgelu" if config["quick_gelu"] else "gelu",
            patch=tower.patch,
            blocks=len(tower.blocks),
            width=tower.width,
            heads=tower.blocks[0].heads,
            embed_dim=config["embed_dim"],
            train_grid=vision["image_size"] // tower.patch,
            license=license_of(model, weights).name,
        )
        location = weights_location(weights) if by_name else str(checkpoint.path.resolve())
        return cls(network.to(device), _tokenizer(model, config), tower, info, dtype_name(dtype), location)

    @cached_property
    def exact(self) -> FrozenClip:
        """The same model in float32; used again where half precision gave NaN or infinity."""
        if self.tower.dtype is torch.float32:
            return self
        source: Any = self._model
        mean, std = (tuple(float(x) for x in t.flatten()) for t in (self.tower.mean, self.tower.std))
        half = self.tower.half_positions
        with torch.inference_mode(False):  # the weights stay, and may be used later where gradients are wanted
            tower = tower_from(source.visual, mean, std, self.tower.device, torch.float32, half_positions=half)
        return FrozenClip(self._model, self._tokenizer, tower, self.info, "fp32", self.location)

    def encode_text(self, vocabulary: Vocabulary) -> TextBank:
        """Unit prototypes of a vocabulary: ``(C, E)`` classes and ``(M, E)`` background words, float32."""
        return encode_vocabulary(self._model, self._tokenizer, vocabulary)

    def embed_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Token embeddings of prompts with ``[*]`` for learned vectors; see :func:`~clipseed.clip.text.embed_prompts`.

        ``encode_embeddings(found.filled(vectors).embeddings, found.ends)`` has gradients with respect to ``vectors``.
        """
        return embed_prompts(self._model, self._tokenizer, prompts)

    def encode_embeddings(self, embeddings: Tensor, ends: Tensor, shared: int | None = None) -> Tensor:
        """Text features ``(P, E)``, not normalized; see :func:`~clipseed.clip.text.encode_embeddings`."""
        return encode_embeddings(self._model, embeddings, ends, shared)

    def text_bank(self, texts: Tensor, classes: int) -> TextBank:
        """The model's competition between unit prototypes ``(C + M, E)``, of which the first are classes."""
        return bank_of(self._model, texts, classes)

    @cached_property
    def text_sha256(self) -> str:
        """Digest of the text tower's weights; see :func:`~clipseed.clip.text.text_tower_sha256`."""
        return text_tower_sha256(self._model)

    def dense(self, images: Tensor, attention_blocks: tuple[int, ...] = ()) -> DenseFeatures:
        """Dense features of images of one size: ``(B, 3, H, W)`` uint8, sides multiples of the patch size."""
        return self.tower.dense(self.tower.normalize(images), attention_blocks)

    def encode_image(self, images: Tensor) -> Tensor:
        """The model's own image features ``(B, E)``, not normalised; images as in :meth:`dense`."""
        return self.tower.encode(self.tower.normalize(images))

    def manifest(self) -> dict[str, Any]:
        """Plain description for output files."""
        return {**asdict(self.info), "precision": self.precision}


def chosen_weights(named: str | None, dataset: str) -> str:
    """Tag or file of the weights that are meant: those that were named, else the toy's own for the toy world."""
    return named or (TOY_WEIGHTS if dataset == "toy" else WEIGHTS)


def toy_weights_path() -> Path:
    """The tiny trained CLIP inside the package."""
    return Path(__file__).parent.parent / "data" / "toy" / "weights" / "clip.npz"


Pixels = tuple[tuple[float, ...], tuple[float, ...]]


def model_name(model: str | None, weights: str | Path) -> str:
    """A model for people: ``ViT-B-16 (openai)``, ``tiny.npz``."""
    name = str(weights)
    if name == TOY_WEIGHTS or _is_file(name):
        return f"{model} ({Path(name).name})" if model else Path(name).name
    return f"{model or MODEL} ({name})"


def weights_location(weights: str | Path) -> str:
    """What finds the same weights again from any folder: the tag, or the file's absolute path."""
    name = str(weights)
    return str(Path(name).resolve()) if name != TOY_WEIGHTS and _is_file(name) else name


def _is_file(weights: str) -> bool:
    suffixes = {".pt", ".pth", ".bin", ".safetensors", ".npz"}
    return Path(weights).exists() or os.sep in weights or Path(weights).suffix in suffixes


def same_model(
    recorded: Mapping[str, Any], model: str | None, weights: str | Path, device: str | torch.device,
    precision: Precision, *, released_rounding: bool = False,
) -> bool:  # fmt: skip
    """Whether :meth:`FrozenClip.load` would give the model that a manifest records, without loading it.

    The file's digest and the names decide, and what ``precision`` stands for; where the file cannot be found without
    a network, the answer is no.

    Args:
        recorded: :meth:`FrozenClip.manifest` of the model in question.
        model: As of :meth:`FrozenClip.load`, like all that follow.
        weights: Tag or file.
        device: Where it would run.
        precision: Of the vision tower.
        released_rounding: As CLIP-ES's released code.
    """
    width, name = recorded.get("width"), str(weights)
    if recorded.get("model") != (model or "inferred") or not isinstance(width, int):
        return False
    path, label = _weights_at_hand(model, name)
    if path is None or recorded.get("weights") != label:
        return False
    dtype = pick_dtype(precision, pick_device(device), width, released_rounding=released_rounding)
    return recorded.get("precision") == dtype_name(dtype) and recorded.get("sha256") == file_sha256(path)


def _weights_at_hand(model: str | None, weights: str) -> tuple[Path | None, str]:
    """The file that would be read, if it is on this machine, and what manifests call it."""
    if weights == TOY_WEIGHTS:
        return toy_weights_path(), weights
    if _is_file(weights):
        path = Path(weights)
        return (path, path.name) if path.is_file() else (None, weights)
    return local_weights(model or MODEL, weights) or _in_hub_cache(model or MODEL, weights), weights


def _in_hub_cache(model: str, tag: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from open_clip import pretrained

    repository, _, name = ((pretrained.get_pretrained_cfg(model, tag) or {}).get("hf_hub") or "").rpartition("/")
    name = name or "open_clip_pytorch_model.bin"
    names = (f"{Path(name).stem}.safetensors", "open_clip_model.safetensors", name)  # as open_clip prefers them
    found = (try_to_load_from_cache(repository, file) for file in names if repository)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _find_weights(model: str | None, weights: str) -> tuple[Checkpoint, Activation | None, Pixels | None]:
    """The checkpoint, and for a pretrained tag its activation and pixel statistics."""
    if weights == TOY_WEIGHTS:
        return read_checkpoint(toy_weights_path()), None, None
    if Path(weights).exists():
        return read_checkpoint(Path(weights)), None, None
    if _is_file(weights):
        raise WeightsError(f"--weights {weights}: no such file")
    return _from_tag(model or MODEL, weights)


def weights_folder() -> Path:
    """Where weight files can be put by hand: ``$CLIPSEED_WEIGHTS`` or ``~/.cache/clipseed``."""
    return Path(os.environ.get("CLIPSEED_WEIGHTS") or Path.home() / ".cache" / "clipseed")


def local_weights(model: str, tag: str) -> Path | None:
    """A file put by hand for a pretrained tag, or the one that OpenAI's own package downloaded."""
    bare = model.removesuffix("-quickgelu")
    names = [weights_folder() / f"{name}-{tag}{suffix}" for name in dict.fromkeys((model, bare))
             for suffix in (".safetensors", ".bin", ".pt")]  # fmt: skip
    if tag == "openai":
        names.append(Path.home() / ".cache" / "clip" / f"{bare}.pt")
    return next((path for path in names if path.is_file()), None)


def _from_tag(model: str, tag: str) -> tuple[Checkpoint, Activation, Pixels]:
    from open_clip import pretrained

    entry = pretrained.get_pretrained_cfg(model, tag)
    if not entry:
        named_config(model)  # an unknown model is what is wrong, not its tag
        tags = pretrained.list_pretrained_tags_by_model(model)
        known = ", ".join(tags) if tags else f"none for model {model!r}"
        raise WeightsError(f"--weights {tag}: neither a file nor a pretrained tag (known: {known}, toy)")
    named_config(model)  # refuse unsupported towers before downloading gigabytes
    path = local_weights(model, tag)
    if path is None:
        path = _downloaded(model, tag, entry)
    activation: Activation = "quickgelu" if entry.get("quick_gelu") else "gelu"
    return read_checkpoint(path), activation, (tuple(entry["mean"]), tuple(entry["std"]))


def _downloaded(model: str, tag: str, entry: Mapping[str, Any]) -> Path:
    """The weights file of a pretrained tag, fetched.

    Raises:
        WeightsError: it cannot be; with where to put it by hand.
    """
    from open_clip import pretrained

    hub = str(entry.get("hf_hub") or "").rstrip("/")
    where = f"https://{HUB}/{hub}" if hub else str(entry.get("url"))
    place = weights_folder() / f"{model}-{tag}.safetensors"
    by_hand = (
        f"Without network, fetch the file elsewhere and put it at {place} (or .bin, .pt), or name it with --weights "
        "FILE"
    )
    # Asked first, because the hub's own library tries for a minute, and says so in a dozen lines.
    if hub and not reachable(HUB):
        raise WeightsError(f"--weights {tag}: not here, and {where} cannot be reached. {by_hand}")
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        return Path(pretrained.download_pretrained(dict(entry)))
    except Exception as error:  # hub and network errors of several libraries
        reason = shorten(str(error), 160, placeholder=" …") or type(error).__name__
        raise WeightsError(f"--weights {tag}: cannot be downloaded from {where} ({reason}). {by_hand}") from error
    finally:
        log.setLevel(before)


def _assemble(model: str | None, checkpoint: Checkpoint, tagged: Activation | None) -> tuple[nn.Module, Config]:
    if tagged is not None:
        model = model or MODEL
    if model is not None:
        config = named_config(model)
    elif checkpoint.config is not None:
        config = dict(checkpoint.config["model_cfg"])
        refuse_unsupported(config, str(checkpoint.path))
    else:
        config = inferred_config(checkpoint.state, str(checkpoint.path))
    config = decide_activation(model, config, checkpoint, tagged)
    return build_model(config, checkpoint), config


def _pixel_statistics(checkpoint: Checkpoint) -> Pixels:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    stated = (checkpoint.config or {}).get("preprocess_cfg") or {}
    return tuple(stated.get("mean") or OPENAI_DATASET_MEAN), tuple(stated.get("std") or OPENAI_DATASET_STD)


def _tokenizer(model: str | None, config: Config) -> Tokenizer:
    import open_clip

    text = config["text_cfg"]
    if model is not None or text.get("hf_tokenizer_name"):
        try:
            return open_clip.get_tokenizer(model or f"hf-hub:{text['hf_tokenizer_name']}")  # type: ignore[no-any-return]
        except Exception as error:
            raise WeightsError(f"--model {model}: its tokenizer cannot be loaded ({error})") from error
    return open_clip.SimpleTokenizer(context_length=text["context_length"])  # type: ignore[no-any-return]
