"""Segmenters: what was trained, as one file, and what can be done with it.

The file is safetensors. Its tensors, ``weights/NAME``, are what was trained and nothing else; the metadata ``clipseed``
is a JSON text: the kind of segmenter, its classes, its options, the frozen tower that it runs on, or whose texts it
keeps, with the SHA-256 of its weights, and where it comes from. Kinds differ in the network that they make of this;
everything else is the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from clipseed.clip.model import FrozenClip
from clipseed.data.images import AnyImage, one_or_many, opened
from clipseed.data.vocabulary import Vocabulary, load_vocabulary, parse_vocabulary
from clipseed.defaults import Precision
from clipseed.device import dtype_name, pick_device, pick_dtype
from clipseed.errors import UsageError, WeightsError
from clipseed.train.checkpoint import is_ours, read_weights, save_weights
from clipseed.train.inference import Network, ViewOptions, averaged_logits, shown
from clipseed.types import LabelMask
from clipseed.weights import read_weights as read_foreign_weights

if TYPE_CHECKING:
    from clipseed.train.bridge.network import BridgeNetwork

PLAIN_VIEW = ViewOptions()
_BATCH = 8
"""Images that :meth:`Segmenter.predict` computes at once."""


@dataclass(frozen=True)
class Placement:
    """Which CLIP a segmenter runs on, and where.

    Attributes:
        model, weights: As of :meth:`~clipseed.clip.model.FrozenClip.load`; ``None``: as recorded in the file.
        device, precision: Likewise.
    """

    model: str | None = None
    weights: str | None = None
    device: str | torch.device = "auto"
    precision: Precision = "auto"


class Segmenter:
    """A network with the names of its classes. Load one with :func:`load_segmenter`.

    Attributes:
        network: Gives logits.
        vocabulary: Classes with their texts; mask value = index + 1.
        about: What the file says of itself.
        path: The file.
    """

    def __init__(self, network: Network, vocabulary: Vocabulary, about: Mapping[str, Any], path: Path) -> None:
        self.network, self.vocabulary, self.about, self.path = network, vocabulary, about, path

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, without the background."""
        return self.vocabulary.class_names

    def logits(self, images: Tensor, view: ViewOptions = PLAIN_VIEW) -> Tensor:
        """Logits ``(B, 1 + K, h, w)`` of images ``(B, 3, H, W)`` of one size, 0 to 255."""
        with torch.inference_mode():
            return averaged_logits(self.network, images.to(self.network.device), view)

    def scores(self, image: AnyImage, view: ViewOptions = PLAIN_VIEW) -> npt.NDArray[np.float32]:
        """Probabilities ``(1 + K, H, W)`` of background and classes, at the image's size; they sum to 1.

        Raises:
            ImageError: it cannot be read.
        """
        return self._scores([opened(image)], view)[0]

    @overload
    def predict(  # type: ignore[overload-overlap]  # a path is a sequence of strings, too
        self, image: AnyImage, view: ViewOptions = ...
    ) -> LabelMask: ...

    @overload
    def predict(self, image: Sequence[AnyImage], view: ViewOptions = ...) -> list[LabelMask]: ...

    def predict(
        self, image: AnyImage | Sequence[AnyImage], view: ViewOptions = PLAIN_VIEW
    ) -> LabelMask | list[LabelMask]:
        """Label mask ``(H, W)``: 0 background, class index + 1; of a list of images, a list of masks.

        Args:
            image: A Pillow image, its file, or an array ``(H, W, 3)`` uint8. Of a list, neighbours of one size are
                computed together.
            view: Scales, mirror image, size.

        Raises:
            ImageError: it cannot be read.
        """
        listed, single = one_or_many(image)
        masks: list[LabelMask] = []
        for _, alike in groupby(map(opened, listed), lambda photo: photo.size):
            while batch := list(islice(alike, _BATCH)):
                masks += [scores.argmax(axis=0).astype(np.uint8) for scores in self._scores(batch, view)]
        return masks[0] if single else masks

    def _scores(self, photos: Sequence[Image], view: ViewOptions) -> list[npt.NDArray[np.float32]]:
        """Of images of one size."""
        logits = self.logits(torch.stack([shown(photo, self.network.patch, view) for photo in photos]), view)
        size = (photos[0].height, photos[0].width)
        return [enlarged(one[None], size)[0].softmax(dim=0).cpu().numpy() for one in logits]


def enlarged(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits ``(B, K, h, w)`` at the size of the image, bilinear with half-pixel centres."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def save_segmenter(
    path: Path, kind: str, weights: Mapping[str, Tensor], vocabulary: Vocabulary, clip: FrozenClip | None,
    about: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write a segmenter.

    Args:
        path: ``NAME.safetensors``.
        kind: One of ``KINDS``.
        weights: What was trained.
        vocabulary: Its classes.
        clip: The frozen CLIP that it runs on, or whose text features it keeps; ``None`` where neither is so.
        about: What the kind needs to make a network (``network``, ``options``), and where it comes from (``source``).

    Raises:
        StoreError: it cannot be written.
    """
    tower = {} if clip is None else {"tower": clip.manifest(), "weights": clip.location}
    save_weights(path, weights, {"kind": kind, "vocabulary": vocabulary.as_dict(), **tower, **about})


KINDS = ("weclip", "bridge")
"""What :func:`load_segmenter` can make a network of."""


@dataclass(frozen=True)
class SegmenterFile:
    """A segmenter that was read, and no CLIP yet.

    Attributes:
        weights: What was trained.
        vocabulary: Its classes.
        about: What the file says of itself; ``digest`` and ``kind`` among it.
        released: It is a checkpoint of WeCLIP's authors, with a CLIP inside.
        other_words: The vocabulary is not what it was trained with: CLIP has to read its words.
    """

    path: Path
    weights: Mapping[str, Tensor]
    vocabulary: Vocabulary
    about: Mapping[str, Any]
    released: bool = False
    other_words: bool = False

    def on(self, place: Placement) -> Segmenter:
        """The segmenter on its CLIP.

        Raises:
            WeightsError: the CLIP is not where it was, another one was named, or the weights do not fit it.
            UsageError: it cannot be asked with other words.
        """
        if self.about["kind"] == "bridge":
            return Segmenter(self._bridge(place), self.vocabulary, self.about, self.path)
        from clipseed.train.weclip.network import WeclipNetwork, refuse_other_tower, restored
        from clipseed.train.weclip.options import WeclipOptions, preset
        from clipseed.train.weclip.released import decoder_of

        if not self.released:
            clip = _tower(self.about, place, self.path)
            return Segmenter(
                restored(clip, self.weights, self.about, self.path), self.vocabulary, self.about, self.path
            )
        decoder = decoder_of(self.weights, self.path)
        clip = FrozenClip.load(place.model, place.weights or str(self.path), place.device, place.precision)
        refuse_other_tower(decoder, clip, self.path)
        options = WeclipOptions(**preset(self.vocabulary.name, released=True))
        return Segmenter(WeclipNetwork(clip, decoder, options), self.vocabulary, self.about, self.path)

    def _bridge(self, place: Placement) -> BridgeNetwork:
        from clipseed.train.bridge.network import BridgeNetwork, refuse_other_text, restored
        from clipseed.train.bridge.text import tokens_of

        device = pick_device(place.device)
        dtype = pick_dtype(place.precision, device)
        module, text = restored(self.weights, self.about, self.path), None
        network = self.about["network"]
        described = {
            "model": f"{network['backbone']} with {self.about['options']['head']}", "weights": self.path.name,
            "sha256": self.about["digest"], "precision": dtype_name(dtype),
        }  # fmt: skip
        if self.other_words:
            refuse_other_text(module, module.text, self.path)
            clip = _text_clip(self.about, place, self.path)
            text = tokens_of(clip.encode_text(self.vocabulary))
            refuse_other_text(module, text, self.path)
            described["text"] = clip.info.sha256
        return BridgeNetwork(module, device, {"model": described, "weights": None}, text, dtype)


def _text_clip(about: Mapping[str, Any], place: Placement, path: Path) -> FrozenClip:
    """The CLIP that reads other words: the one whose text features a segmenter was trained with, or that was named."""
    place = replace(place, device="cpu", precision="fp32")
    if "tower" in about:
        return _tower(about, place, path)
    if about["network"]["text"] == "random":
        raise UsageError(f"--classes: {path} was trained with random vectors in place of texts; no word means anything")
    if place.weights is None:
        raise UsageError(
            f"--classes: {path} was trained with the texts of a file; name the CLIP they are of: --weights"
        )
    return FrozenClip.load(place.model, place.weights, place.device, place.precision)


def read_segmenter(path: Path, classes: str | None = None) -> SegmenterFile:
    """Read a segmenter's file; see :func:`load_segmenter`."""
    if path.suffix != ".safetensors" or not is_ours(path):
        return _read_released(path, classes)
    tensors, about = read_weights(path)
    if about.get("kind") not in KINDS or (about["kind"] == "weclip" and "tower" not in about):
        what = "a checkpoint of training, not a segmenter" if about.get("kind") == "checkpoint" else "no segmenter"
        raise WeightsError(f"{path}: {what}; give the file that clipseed train wrote with --out")
    vocabulary = parse_vocabulary(about["vocabulary"], str(path), "segmenter")
    if about["kind"] == "bridge" and classes is not None:
        named = load_vocabulary(classes)
        if named.classes != vocabulary.classes:
            return SegmenterFile(path, tensors, named, about, other_words=True)
    refuse_other_classes(vocabulary, classes, path)
    return SegmenterFile(path, tensors, vocabulary, about)


def load_segmenter(
    path: str | Path, *, model: str | None = None, weights: str | Path | None = None,
    device: str | torch.device = "auto", precision: Precision = "auto", classes: str | None = None,
) -> Segmenter:  # fmt: skip
    """Load a segmenter for prediction.

    Args:
        path: A file of ``clipseed train``, or a checkpoint of WeCLIP's authors.
        model: Of the frozen CLIP, as of :meth:`~clipseed.clip.model.FrozenClip.load`.
        weights: Likewise; default: those it was trained on, from where they were. Of an authors' checkpoint, those
            inside.
        device: Likewise.
        precision: Likewise.
        classes: Class list of an authors' checkpoint, which does not name its own; default: VOC's or COCO's by number.
            Of a bridge that scores by text, any classes: the CLIP whose text features it keeps reads their words.

    Raises:
        WeightsError: missing, damaged, no segmenter, or for another CLIP.
        UsageError: ``classes`` are not the file's.
    """
    place = Placement(model, None if weights is None else str(weights), device, precision)
    return read_segmenter(Path(path), classes).on(place)


def refuse_other_classes(vocabulary: Vocabulary, classes: str | None, path: Path) -> None:
    """Raise :class:`~clipseed.errors.UsageError` where ``--classes`` names others than those of a segmenter."""
    if classes is None:
        return
    named = load_vocabulary(classes)
    if named.class_names != vocabulary.class_names:
        pairs = zip(named.class_names, vocabulary.class_names, strict=False)
        first = next((f"{a!r} in place of {b!r}" for a, b in pairs if a != b), "")
        raise UsageError(
            f"--classes {classes}: {len(named.classes)} classes, {path} was trained on {len(vocabulary.classes)}"
            + (f" (the first that differs: {first})" if first else "")
        )


def _tower(about: Mapping[str, Any], place: Placement, path: Path) -> FrozenClip:
    """The frozen CLIP that a file was trained on.

    Raises:
        WeightsError: it is not where it was, or another one was named.
    """
    recorded = about["tower"]
    name = recorded["model"]
    model = place.model or (None if name == "inferred" else name)
    try:
        clip = FrozenClip.load(model, place.weights or about["weights"], place.device, place.precision)
    except WeightsError as error:
        if place.weights is not None:
            raise
        where = about["weights"]
        raise WeightsError(f"{path}: its CLIP ({where}) cannot be loaded; name it with --weights. {error}") from error
    if clip.info.sha256 != recorded["sha256"]:
        raise WeightsError(
            f"{path}: was trained on {recorded['weights']} with SHA-256 {recorded['sha256'][:16]}…, not on "
            f"{clip.info.weights} with {clip.info.sha256[:16]}…; a decoder fits its own CLIP only (--weights)"
        )
    return clip


def _read_released(path: Path, classes: str | None) -> SegmenterFile:
    """A checkpoint of WeCLIP's authors: the decoder and, as a rule, the whole CLIP beside it."""
    from clipseed.train.weclip.released import decoder_of, decoder_state, is_released

    file = read_foreign_weights(path)
    if not is_released(file.state):
        raise WeightsError(f"{path}: no segmenter of clipseed, and no checkpoint of WeCLIP's authors")
    weights = decoder_state(file.state, path)
    vocabulary = released_vocabulary(decoder_of(weights, path).classes - 1, classes, path)
    return SegmenterFile(path, weights, vocabulary, {"kind": "weclip", "digest": file.sha256}, released=True)


def released_vocabulary(count: int, classes: str | None, path: Path) -> Vocabulary:
    """The class list of a decoder that names none: as given, else VOC's or COCO's.

    Raises:
        UsageError: another number of classes, or none was given.
    """
    known = {20: "voc", 80: "coco"}
    if classes is None and count not in known:
        raise UsageError(f"{path}: a decoder for {count} classes, whose names it does not tell; give --classes FILE")
    vocabulary = load_vocabulary(classes or known[count])
    if len(vocabulary.classes) != count:
        raise UsageError(f"--classes {classes}: {len(vocabulary.classes)} classes, but {path} was trained on {count}")
    return vocabulary
