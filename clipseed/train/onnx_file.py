"""A light segmenter as an ONNX file, which runs without torch and without clipseed; and the same with 8-bit weights.

Input ``images``: ``(B, 3, H, W)`` float32, RGB from 0 to 255, sides multiples of 32; normalisation is inside. Outputs:
``logits`` ``(B, 1 + K, h, w)`` float32 and ``labels`` ``(B, H, W)`` uint8, the class of each pixel: 0 background, class
index + 1. The metadata ``clipseed`` is a JSON text with the classes and with what was done to the pixels.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from clipseed.errors import ClipseedError, UsageError
from clipseed.store.files import replacing
from clipseed.train.bridge.backbone import COARSEST
from clipseed.train.bridge.network import BridgeNetwork, TextSegmenter
from clipseed.train.segmenter import Segmenter, enlarged, load_segmenter

METADATA = "clipseed"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class _Deployed(nn.Module):
    def __init__(self, module: TextSegmenter) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.module(images).logits
        size = (images.shape[-2], images.shape[-1])
        return logits, enlarged(logits, size).argmax(dim=1).to(torch.uint8)


def export_onnx(segmenter: Path, out: Path) -> dict[str, Any]:
    """Write a segmenter as ONNX; returns the metadata.

    Args:
        segmenter: File of ``clipseed train bridge``.
        out: ``NAME.onnx``.

    Raises:
        UsageError: packages are missing, or the segmenter needs a frozen CLIP.
        WeightsError: the file is missing, or damaged.
        StoreError: ``out`` cannot be written.
    """
    refuse_missing_packages()
    import onnx

    loaded = load_segmenter(segmenter, device="cpu", precision="fp32")
    network = loaded.network
    if not isinstance(network, BridgeNetwork):
        raise UsageError(f"{segmenter}: runs on a frozen CLIP; only segmenters of clipseed train bridge stand alone")
    about = metadata(loaded, network.module)
    example = torch.zeros(2, 3, 3 * COARSEST, 4 * COARSEST)
    dynamic = {0: torch.export.Dim("batch"), 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with _quiet(), torch.no_grad():
        deployed = _Deployed(with_fixed_padding(network.module)).eval()
        program = torch.onnx.export(
            deployed, (example,), dynamo=True, dynamic_shapes=(dynamic,), opset_version=18,
            input_names=["images"], output_names=["logits", "labels"], verbose=False,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(about)
    content = model.SerializeToString()
    onnx.checker.check_model(content)
    with replacing(out) as temporary:
        temporary.write_bytes(content)
    return about


def with_fixed_padding(module: TextSegmenter) -> TextSegmenter:
    """A copy in which convolutions that pad as TensorFlow does ("same") pad by constants.

    Their padding depends on the size of the map, which makes the exporter reason about symbols without end. Where sides
    are multiples of the stride, as everywhere in an image of whole multiples of 32, it is ``(k - 1) d + 1 - s``.
    """
    fixed = copy.deepcopy(module)
    for parent in list(fixed.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, Conv2dSame):
                setattr(parent, name, _Padded(layer))
    return fixed


class _Padded(nn.Module):
    """A "same" convolution on maps whose sides are multiples of its stride."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        extra = [
            max(0, (kernel - 1) * dilation + 1 - stride)
            for kernel, dilation, stride in zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        ]
        (height, width) = extra
        self.padding = (width // 2, width - width // 2, height // 2, height - height // 2)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        padded = F.pad(x, self.padding)
        return F.conv2d(padded, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)


def metadata(segmenter: Segmenter, module: TextSegmenter) -> dict[str, Any]:
    """What an ONNX file says of itself."""
    return {
        "classes": ["background", *segmenter.classes],
        "multiple": COARSEST,
        "pixels": "RGB from 0 to 255, float32; stretch sides to multiples; normalisation is inside",
        "mean": module.backbone.mean.flatten().tolist(),
        "std": module.backbone.std.flatten().tolist(),
        "backbone": module.backbone.name,
        "head": segmenter.about["options"]["head"],
        "segmenter": segmenter.about["digest"],
    }


def quantize_onnx(source: Path, out: Path) -> None:
    """Write the same network with 8-bit weights, its activations measured while it runs (dynamic quantisation).

    Convolutions and products are replaced by onnxruntime's integer ones.

    Raises:
        UsageError: packages are missing.
        ClipseedError: onnxruntime cannot quantise this network.
        StoreError: ``out`` cannot be written.
    """
    refuse_missing_packages()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with replacing(out) as temporary, _quiet():
        try:
            quantize_dynamic(source, temporary, per_channel=False, weight_type=QuantType.QUInt8)
        except Exception as error:  # of whatever kind its passes raise
            raise ClipseedError(f"--int8: onnxruntime cannot quantise {source} ({str(error)[:160]})") from error


def refuse_missing_packages() -> None:
    """Raise :class:`~clipseed.errors.UsageError` naming the extra where a package for ONNX is missing."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise UsageError(f"ONNX files need {', '.join(missing)}, not installed here: pip install 'clipseed[onnx]'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporter and quantiser print."""
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)
