"""Light backbones of timm: maps of strides 4, 8, 16 and 32, and their weights out of a file."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from clipseed.errors import UsageError
from clipseed.weights import check_fit, read_weights

STRIDES = (4, 8, 16, 32)
COARSEST = STRIDES[-1]


class Backbone(nn.Module):
    """A network of timm that gives its maps, with the pixel statistics it was made for.

    Attributes:
        channels: Of the four maps.
        mean, std: Of pixels from 0 to 1; ``(3, 1, 1)``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, body: nn.Module) -> None:
        super().__init__()
        self.name, self.body = name, body
        info: Any = body.feature_info
        self.channels: list[int] = info.channels()
        config: Any = getattr(body, "pretrained_cfg", None) or timm.create_model(name).pretrained_cfg
        for key in ("mean", "std"):  # of the name, so they need not be in any file
            self.register_buffer(key, torch.tensor(config[key]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps ``(B, C_i, H / 2^i, W / 2^i)``, i = 2 to 5, of RGB images ``(B, 3, H, W)`` from 0 to 255."""
        return self.body((images.float() / 255 - self.mean) / self.std)  # type: ignore[no-any-return]


def make_backbone(name: str, weights: Path | None = None) -> Backbone:
    """A backbone with random weights, or those of a file; nothing is ever downloaded.

    Args:
        name: As timm calls it.
        weights: safetensors or a state dict, of the whole classifier or of these maps only, with timm's names.

    Raises:
        UsageError: timm knows no such network, or it does not give maps of these strides for images of any size.
        WeightsError: the file is missing, damaged, or holds weights of another network.
    """
    indices = _indices(name)
    if weights is not None:
        return Backbone(name, _with_weights(name, indices, weights))
    return Backbone(name, timm.create_model(name, pretrained=False, features_only=True, out_indices=indices))


def _indices(name: str) -> list[int]:
    """Which of its maps have the four strides; of several with the same, the last."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"--backbone {name[:80]}: timm has no network of this name{hint}")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            body = timm.create_model(name, pretrained=False, features_only=True).eval()
            info: Any = body.feature_info
            strides = [int(stride) for stride in info.reduction()]
        except (RuntimeError, AttributeError, TypeError, ValueError):  # networks without maps
            strides = []
        if missing := [stride for stride in STRIDES if stride not in strides]:
            has = ", ".join(map(str, strides)) or "none"
            raise UsageError(
                f"--backbone {name}: no maps of stride {', '.join(map(str, missing))} (its strides: {has}); choose one "
                "with 4, 8, 16 and 32, such as mobilenetv3_large_100 or resnet18"
            )
        try:
            body(torch.zeros(1, 3, 64, 96))
        except Exception as error:  # whatever a network of one size makes of another
            raise UsageError(
                f"--backbone {name}: does not take images of any size ({str(error).splitlines()[0][:100]}); choose "
                "one without fixed positions, such as mobilenetv3_large_100"
            ) from error
    return [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]


def _with_weights(name: str, indices: list[int], path: Path) -> nn.Module:
    """A network with a file's weights, all of which must be there; only a classifier may differ or be missing."""
    body = timm.create_model(name, pretrained=False, features_only=True, out_indices=indices)
    state = read_weights(path).state
    expected = body.state_dict()
    if state.keys() == expected.keys():
        check_fit(state, expected, path, f"give weights of {name}")
        body.load_state_dict(state)
        return body
    whole = timm.create_model(name, pretrained=False)
    config: Any = whole.pretrained_cfg
    last = config.get("classifier") or ()
    last = (last,) if isinstance(last, str) else tuple(last)

    def body_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in tensors.items() if not key.startswith(tuple(f"{part}." for part in last))}

    wanted, given = body_of(whole.state_dict()), body_of(state)
    for key in wanted:  # a counter that old files lack, and that nothing here reads
        if key.endswith("num_batches_tracked"):
            given.setdefault(key, wanted[key])
    check_fit(given, wanted, path, f"give weights of {name} (--backbone, --backbone-weights)")
    whole.load_state_dict(given, strict=False)
    with _untold("timm.models._builder"):  # that the maps need no classifier
        return timm.create_model(
            name, pretrained=True, features_only=True, out_indices=indices,
            pretrained_cfg_overlay={"state_dict": whole.state_dict()},
        )  # fmt: skip


@contextlib.contextmanager
def _untold(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
