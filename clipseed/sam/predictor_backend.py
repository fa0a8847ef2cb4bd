"""Masks from anything with SAM's predictor interface: HQ-SAM, MobileSAM and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipseed.errors import ImageError
from clipseed.sam.backend import Decoded, Embedding, Floats, Pixels, checked, fit_prompts
from clipseed.sam.model_backend import SamInfo


class PredictorBackend:
    """A predictor with ``set_image`` and ``predict_torch``, one crop at a time.

    Such a predictor enlarges all masks itself, so :meth:`upsample` has nothing left to do, and filters come after.
    """

    def __init__(self, predictor: Any, device: torch.device, info: SamInfo) -> None:
        self.device, self.info = torch.device(getattr(predictor, "device", device)), info
        self._predictor = predictor
        self._current: Embedding | None = None
        self.side = int(predictor.transform.target_length)
        self.mask_threshold = float(getattr(getattr(predictor, "model", None), "mask_threshold", 0.0))
        self.crops_at_once = 1
        self.working_pixels = 0

    def encode(self, crops: Sequence[Pixels]) -> list[Embedding]:
        """Note the crops; the predictor keeps one at a time, so each is encoded when it is first asked about.

        Raises:
            ImageError: a crop is so thin that the predictor would shrink it to nothing.
        """
        for crop in crops:
            height, width = crop.shape[:2]
            if self.side * min(height, width) / max(height, width) < 0.5:
                raise ImageError(f"a crop of {width}x{height} pixels is too thin for this SAM predictor")
        return [Embedding((crop.shape[0], crop.shape[1]), crop) for crop in crops]

    def decode_prompts(
        self,
        embedding: Embedding,
        boxes: Floats | None = None,
        points: Floats | None = None,
        point_labels: npt.NDArray[np.integer] | None = None,
    ) -> Decoded:
        """Logits ``(P, M, H, W)`` at the crop's size and predicted IoU ``(P, M)``."""
        # Not inference mode, whatever the caller has: the code is not ours, and may use tensors elsewhere.
        with torch.inference_mode(False), torch.no_grad():
            prompts = fit_prompts(embedding.size, self.side, self.device, boxes, points, point_labels)
            if prompts.number == 0:
                return Decoded(torch.zeros(0, 3, *embedding.size), torch.zeros(0, 3))
            if self._current is not embedding:
                self._predictor.set_image(embedding.content)
                self._current = embedding
            logits, iou, *_ = self._predictor.predict_torch(
                prompts.points, prompts.labels, boxes=prompts.boxes, multimask_output=True, return_logits=True
            )
        return checked(logits, iou, prompts.number)

    def upsample(self, embedding: Embedding, logits: Tensor) -> Tensor:
        """The logits: they have the crop's size."""
        return logits

    def manifest(self) -> dict[str, Any]:
        """Plain description for output files."""
        return {**asdict(self.info), "precision": "predictor"}
