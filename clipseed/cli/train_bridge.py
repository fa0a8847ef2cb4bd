"""``clipseed train bridge``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

from clipseed.cli import _options as shared
from clipseed.cli._groups import grouped
from clipseed.cli._training import CropArguments, run_training
from clipseed.defaults import (
    BRIDGE_BATCH,
    BRIDGE_BLOCKS,
    BRIDGE_CROP,
    BRIDGE_HEADS,
    BRIDGE_LR,
    BRIDGE_SCORE_WEIGHT,
    BRIDGE_STEPS,
    BRIDGE_TOY_STEPS,
    BRIDGE_WARM_UP,
    BRIDGE_WEIGHT_DECAY,
    BRIDGE_WIDTH,
    CONFIDENCE,
    FPN_DROPOUT,
    FPN_WIDTH,
    AbsentPolicy,
    BridgeDirection,
    BridgeLoss,
    HeadName,
    TokenMixing,
)

_option = shared.method_option


@dataclass(frozen=True, kw_only=True)
class BridgeArguments(CropArguments):
    """The method's constants; what is not given is the default of the class list."""

    lr: Annotated[Optional[float], _option(help=f"Learning rate (default: {BRIDGE_LR}; toy 0.001).")] = None
    backbone_lr: Annotated[Optional[float], _option(help="Factor on the backbone's (default: 1).")] = None
    weight_decay: Annotated[Optional[float], _option(help=f"Of AdamW (default: {BRIDGE_WEIGHT_DECAY}).")] = None
    warm_up: Annotated[Optional[int], _option(help=f"Steps (default: {BRIDGE_WARM_UP}, at most a tenth of all).")] = (
        None
    )
    crop: Annotated[Optional[int], _option(help=f"Side of the crops in pixels (default: {BRIDGE_CROP}).")] = None
    photometric: Annotated[Optional[bool], _option(help="Vary brightness, contrast and saturation (default: yes).")] = (
        None
    )
    loss: Annotated[Optional[BridgeLoss], _option(help="ce; of CAMs also collision (their default) or soft-ce.")] = None
    score_weight: Annotated[
        Optional[float], _option(help=f"Of the loss of scores by text (default: {BRIDGE_SCORE_WEIGHT}).")
    ] = None
    absent: Annotated[
        Optional[AbsentPolicy],
        _option(
            help="Classes that an image's labels do not name: ignore their pixels, mask their logits as well, or keep "
            "all as it is (default: ignore)."
        ),
    ] = None
    mask_text: Annotated[
        Optional[bool],
        _option("--mask-text/--all-text", help="Pixels attend to the image's own classes (default: to all)."),
    ] = None
    confidence: Annotated[
        Optional[float], _option(help=f"--soft, or CAMs with ce: least score that counts (default: {CONFIDENCE}).")
    ] = None
    blocks: Annotated[Optional[int], _option(help=f"Of the bridge (default: {BRIDGE_BLOCKS}).")] = None
    width: Annotated[Optional[int], _option(help=f"Of its map (default: {BRIDGE_WIDTH}).")] = None
    token_width: Annotated[Optional[int], _option(help=f"Of its tokens (default: {BRIDGE_WIDTH}).")] = None
    heads: Annotated[Optional[int], _option(help=f"Of its attention (default: {BRIDGE_HEADS}).")] = None
    token_mixing: Annotated[
        Optional[TokenMixing], _option(help="Whether class tokens attend to each other (default: attn).")
    ] = None
    direction: Annotated[Optional[BridgeDirection], _option(help="Which way the bridge is open (default: both).")] = (
        None
    )
    fpn_width: Annotated[
        Optional[int], _option(help=f"Of the FPN; 0: the bridge's scores are the prediction (default: {FPN_WIDTH}).")
    ] = None
    dropout: Annotated[Optional[float], _option(help=f"Before its last layer (default: {FPN_DROPOUT}).")] = None


@grouped
def bridge(
    *,
    backbone: Annotated[str, shared.model_option(help="As timm calls it: mobilenetv3_large_100, resnet18, …")],
    masks: Annotated[str, shared.data_option(help="What to learn from: label masks, CAMs (soft labels), or toy.")],
    head: Annotated[HeadName, shared.model_option(help="What comes after it.")] = "bridge",
    backbone_weights: Annotated[
        Optional[Path], shared.model_option(help="File with its weights, timm's names (default: random).")
    ] = None,
    text: Annotated[
        str, shared.model_option(help="Texts: clip, random, or an .npy file of features, background first.")
    ] = "clip",
    tower: shared.TowerArguments,
    where: shared.DatasetArguments,
    labels: Annotated[
        Optional[Path], shared.data_option(help="Image-level labels, which say what is absent: CSV, JSON or text.")
    ] = None,
    soft: Annotated[
        Optional[Path], shared.data_option(help="CAMs with the scores of label masks; unsure pixels do not count.")
    ] = None,
    classes: shared.Classes = None,
    background: shared.Background = None,
    template: shared.Template = None,
    reading: shared.ReadingArguments,
    out: Annotated[Path, shared.output_option(help="NAME.safetensors; the run itself goes to NAME-training.")] = Path(
        "bridge.safetensors"
    ),
    steps: Annotated[
        Optional[int], shared.train_option(help=f"Default: {BRIDGE_STEPS}; toy {BRIDGE_TOY_STEPS}.", min=1)
    ] = None,
    batch_size: Annotated[int, shared.train_option(help="Images per step, over all processes.", min=1)] = BRIDGE_BATCH,
    training: shared.TrainArguments,
    validation: shared.ValidationArguments,
    constants: BridgeArguments,
    output: shared.OutputArguments,
) -> int:
    """Train a light network on pseudo-labels, guided by CLIP's texts of the classes.

    The file holds all that prediction needs; CLIP is not. The same command goes on where a run stopped. Examples:

      clipseed train bridge --backbone mobilenetv3_large_100 --images photos --masks pseudo --classes classes.txt

      clipseed train bridge --backbone resnet18 --head lseg --dataset voc --split trainaug --masks cams-caa.h5 --val val
    """
    from clipseed.data.dataset import DatasetOptions
    from clipseed.jobs.train_bridge import TrainBridgeOptions, run_train_bridge

    data = DatasetOptions(
        **vars(where), **vars(reading), labels=labels, classes=classes, templates=tuple(template or ()),
        background=background, auto_labels=where.dataset == "folder" and labels is None,
    )  # fmt: skip
    options = TrainBridgeOptions(
        data=data, out=out, steps=steps, batch=batch_size, backbone=backbone, masks=masks, soft=soft, text=text,
        backbone_weights=backbone_weights, constants={"head": head, **constants.chosen()},
        **vars(tower), **training.parsed(), **vars(validation),
    )  # fmt: skip
    return run_training(lambda *talk: run_train_bridge(options, *talk), training.allow_skipped, output)
