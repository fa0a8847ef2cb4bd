"""Masks straight from a plain SAM: crops encoded together, only the wanted masks drawn and enlarged."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipseed.device import dtype_name
from clipseed.errors import ImageError, UsageError
from clipseed.sam.backend import Decoded, Embedding, Floats, Pixels, checked, fit_prompts, fitted_size
from clipseed.sam.decoder import FINER, ImageSide, PlainDecoder
from clipseed.sam.encoder import PlainEncoder
from clipseed.sam.plain import has_plain_decoder, has_plain_encoder

_PIXELS_AT_ONCE = {"cpu": 1024 * 1024}
_GPU_PIXELS_AT_ONCE = 8 * 1024 * 1024
"""Pixels encoded in one pass. On a CPU a batch of full-sized crops gains nothing and costs gigabytes."""

_DECODER_ARGUMENTS = {
    "image_embeddings", "image_pe", "sparse_prompt_embeddings", "dense_prompt_embeddings", "multimask_output"
}  # fmt: skip


@dataclass(frozen=True)
class SamInfo:
    """What an output file records about the SAM it was made with.

    Attributes:
        size: ``vit_b``, ``vit_l``, ``vit_h``, ``custom``, or the factory's name.
        weights: Name of the checkpoint file, if any.
        sha256: Digest of that file.
    """

    size: str
    weights: str | None
    sha256: str | None


class _Last(threading.local):
    """The embedding that prompts were last about, and what they share of it; each thread has its own."""

    embedding: Embedding | None = None
    side: ImageSide | None = None


class ModelBackend:
    """A model with SAM's image encoder, prompt encoder and mask decoder (also MobileSAM's).

    The encoder runs in ``dtype``, its features return to float32; prompts are float32 always, because their position
    code is computed in it. The model is moved and cast in place. segment_anything's own modules run as
    :class:`~clipseed.sam.encoder.PlainEncoder` and :class:`~clipseed.sam.decoder.PlainDecoder`, the latter with its
    places in bfloat16 where the encoder is; all others run as they are, the decoder in float32.

    Raises:
        UsageError: the mask decoder wants more than SAM's does.
    """

    def __init__(self, sam: Any, device: torch.device, dtype: torch.dtype, info: SamInfo) -> None:
        _check_decoder(sam, info)
        self.device, self.dtype, self.info = device, dtype, info
        self.sam = sam.requires_grad_(False).eval().float().to(device)
        self.sam.image_encoder.to(dtype)
        self.side: int = sam.image_encoder.img_size
        self.mask_threshold = float(getattr(sam, "mask_threshold", 0.0))
        self.crops_at_once = max(1, _PIXELS_AT_ONCE.get(device.type, _GPU_PIXELS_AT_ONCE) // self.side**2)
        self.working_pixels = self.side**2
        self._dense_code: Tensor = self.sam.prompt_encoder.get_dense_pe()
        self._plain = None
        if has_plain_decoder(sam):
            # Only bfloat16 has float32's range; in float16 a score may become NaN unnoticed.
            places = dtype if dtype is torch.bfloat16 else torch.float32
            self._plain = PlainDecoder(self.sam.mask_decoder, self._dense_code, places)
        self._encoder = PlainEncoder(self.sam.image_encoder) if has_plain_encoder(sam) else self.sam.image_encoder
        self._patch = self.side // self._dense_code.shape[-1]
        self._last = _Last()

    @property
    def small(self) -> bool:
        """Whether its operations are too small to share cores, and its modules known to run in several threads."""
        return self.crops_at_once > 1 and self._plain is not None and isinstance(self._encoder, PlainEncoder)

    def encode(self, crops: Sequence[Pixels]) -> list[Embedding]:
        """Image features ``(1, E, h, w)`` float32 of each crop, in one forward pass.

        Raises:
            ImageError: half precision is not enough for a crop.
        """
        batch = torch.stack([self._prepare(crop) for crop in crops])
        with self._exact_convolutions():
            features = self._encoder(batch.to(self.dtype)).float()
        if self.dtype is not torch.float32 and not torch.isfinite(features).all():
            raise ImageError("SAM's features exceed half precision; give --precision fp32")
        return [Embedding(_size(crop), features[i : i + 1]) for i, crop in enumerate(crops)]

    def decode_prompts(
        self,
        embedding: Embedding,
        boxes: Floats | None = None,
        points: Floats | None = None,
        point_labels: npt.NDArray[np.integer] | None = None,
    ) -> Decoded:
        """Three masks for each prompt; see :class:`~clipseed.sam.backend.SamBackend`."""
        prompts = fit_prompts(embedding.size, self.side, self.device, boxes, points, point_labels)
        if prompts.number == 0:
            height, width = (4 * length for length in embedding.content.shape[-2:])
            return Decoded(embedding.content.new_zeros(0, 3, height, width), embedding.content.new_zeros(0, 3))
        pairs = None if prompts.points is None else (prompts.points, prompts.labels)
        sparse, dense = self.sam.prompt_encoder(points=pairs, boxes=prompts.boxes, masks=None)
        if self._plain:
            last = self._last
            if last.embedding is not embedding or last.side is None:
                last.embedding, last.side = embedding, self._plain.image_side(embedding.content, dense[:1])
            return self._plain.answer(last.side, sparse, self._shown(embedding.size))
        logits, iou = self.sam.mask_decoder(
            image_embeddings=embedding.content,
            image_pe=self._dense_code,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        return checked(logits, iou, prompts.number)

    def upsample(self, embedding: Embedding, logits: Tensor) -> Tensor:
        """Bilinear in SAM's two steps: to the square that the encoder saw, without its padding to the crop's size."""
        height, width = fitted_size(embedding.size, self.side)
        square = (self.side, self.side)
        if self._plain:  # the padding may be missing
            square = (logits.shape[1] * self._patch // FINER, logits.shape[2] * self._patch // FINER)
        fitted = F.interpolate(logits[None], square, mode="bilinear", align_corners=False)[..., :height, :width]
        return F.interpolate(fitted, embedding.size, mode="bilinear", align_corners=False)[0]

    def _shown(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of places that a crop's masks depend on, the others being padding.

        A pixel depends on the fine pixels, ``FINER`` to a place, on both sides of it: on less than half a place more.
        """
        if self._patch % FINER:  # a part of the square would have no whole number of pixels
            return (self.side // self._patch, self.side // self._patch)
        height, width = (math.ceil(length / self._patch + 0.5) for length in fitted_size(size, self.side))
        return (min(height, self.side // self._patch), min(width, self.side // self._patch))

    def manifest(self) -> dict[str, Any]:
        """Plain description for output files."""
        return {**asdict(self.info), "precision": dtype_name(self.dtype)}

    def _exact_convolutions(self) -> AbstractContextManager[None]:
        """In float32 a GPU computes convolutions in it, which cuDNN rounds to TF32 unless told otherwise."""
        if self.device.type != "cuda" or self.dtype is not torch.float32:
            return nullcontext()
        context: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        return context

    def _prepare(self, crop: Pixels) -> Tensor:
        """Fitted into the square, normalised, and padded with zeros at the right and below."""
        height, width = fitted_size(_size(crop), self.side)
        resized = Image.fromarray(crop).resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(resized)).to(self.device).permute(2, 0, 1)
        normal: Tensor = (pixels - self.sam.pixel_mean) / self.sam.pixel_std
        return F.pad(normal, (0, self.side - width, 0, self.side - height))


def _size(crop: Pixels) -> tuple[int, int]:
    return (crop.shape[0], crop.shape[1])


def _check_decoder(sam: Any, info: SamInfo) -> None:
    parameters = inspect.signature(sam.mask_decoder.forward).parameters.values()
    required = {item.name for item in parameters if item.default is item.empty and item.kind is not item.VAR_KEYWORD}
    if extra := sorted(required - _DECODER_ARGUMENTS):
        raise UsageError(
            f"--sam-factory: the mask decoder of {info.size} also wants {', '.join(extra)}; return its predictor "
            "(with set_image and predict_torch) instead of the model"
        )
