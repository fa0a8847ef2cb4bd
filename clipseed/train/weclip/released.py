"""The authors' checkpoints: their names for the decoder's tensors, in ours.

The CLIP that lies beside the decoder is read by :func:`clipseed.clip.checkpoint.clip_state`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from clipseed.errors import WeightsError
from clipseed.train.weclip.decoder import Decoder
from clipseed.weights import check_fit, count_blocks

HEADS = 8
"""What the authors' code fixes, and tensors do not tell."""

_FUSION, _DECODER = ("decoder_fts_fuse.", "fuse."), ("decoder.", "dec.")
_NAMES = (
    (r"linears_modulelist\.(\d+)\.proj\.", r"projections.\1.first."),
    (r"linears_modulelist\.(\d+)\.proj_2\.", r"projections.\1.second."),
    (r"linear_fuse\.", "fusion."),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"blocks.\1.qkv."),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"blocks.\1.out."),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.", r"blocks.\1.norm_\2."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.up."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.down."),
    (r"linear_pred\.", "head."),
)


def is_released(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors are named as those of the authors' decoder."""
    return any(key.startswith(prefix + "linear_fuse.") for key in state for prefix in _FUSION)


def decoder_state(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The decoder's tensors of an authors' checkpoint under our names, float32.

    Raises:
        WeightsError: a tensor of the decoder has a name that theirs does not.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        rest = next((key.removeprefix(prefix) for prefix in _FUSION + _DECODER if key.startswith(prefix)), None)
        if rest is None:
            continue
        name = next((re.sub(pattern, ours, rest) for pattern, ours in _NAMES if re.match(pattern, rest)), None)
        if name is None:
            raise WeightsError(f"{path}: {key!r} is no tensor of WeCLIP's decoder as its authors released it")
        # Convolutions of one pixel are linear layers.
        found[name] = (value.flatten(1) if value.ndim == 4 else value).float()
    return found


def decoder_of(state: Mapping[str, Tensor], path: Path, heads: int = HEADS) -> Decoder:
    """A decoder with the tensors of :func:`decoder_state`, whose sizes are read off them.

    Raises:
        WeightsError: tensors are missing or do not fit each other.
    """
    needed = ("projections.0.first.weight", "fusion.weight", "blocks.0.qkv.weight", "head.weight")
    if missing := [name for name in needed if name not in state]:
        raise WeightsError(f"{path}: no decoder of WeCLIP; it lacks {missing[0]!r}")
    width, inputs = state["projections.0.first.weight"].shape
    if width % heads:
        raise WeightsError(f"{path}: a decoder of width {width} cannot have {heads} heads")
    decoder = Decoder(
        count_blocks(state, "projections."), inputs, len(state["head.weight"]), width,
        count_blocks(state, "blocks."), heads,
    )  # fmt: skip
    check_fit(state, decoder.state_dict(), path, "it is damaged, or no decoder of WeCLIP")
    decoder.load_state_dict(dict(state))
    return decoder
