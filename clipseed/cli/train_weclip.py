"""``clipseed train weclip``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

from clipseed.cli import _options as shared
from clipseed.cli._groups import grouped
from clipseed.cli._run import refuse_restricted
from clipseed.cli._training import CropArguments, run_training
from clipseed.defaults import (
    BOX_THRESHOLD,
    CAA_LAYERS,
    COCO_BOX_THRESHOLD,
    CONFIDENCE,
    PAR_ITERATIONS,
    SINKHORN_ROUNDS,
    SPREAD_POWER,
    WECLIP_AFFINITY_WEIGHT,
    WECLIP_BATCH,
    WECLIP_BLOCKS,
    WECLIP_COCO_RFM_LAYERS,
    WECLIP_COCO_STEPS,
    WECLIP_CROP,
    WECLIP_DROPOUT,
    WECLIP_HEADS,
    WECLIP_LR,
    WECLIP_RADIUS,
    WECLIP_RFM_LAYERS,
    WECLIP_STEPS,
    WECLIP_TOY_STEPS,
    WECLIP_WARM_UP,
    WECLIP_WEIGHT_DECAY,
    WECLIP_WIDTH,
    PixelStatistics,
    RfmFilter,
)

_option = shared.method_option


@dataclass(frozen=True, kw_only=True)
class WeclipArguments(CropArguments):
    """The method's constants; what is not given is as published for the class list."""

    lr: Annotated[Optional[float], _option(help=f"Learning rate of the decoder (default: {WECLIP_LR}).")] = None
    weight_decay: Annotated[Optional[float], _option(help=f"Of AdamW (default: {WECLIP_WEIGHT_DECAY}).")] = None
    warm_up: Annotated[Optional[int], _option(help=f"Steps (default: {WECLIP_WARM_UP}).")] = None
    crop: Annotated[Optional[int], _option(help=f"Side of the crops in pixels (default: {WECLIP_CROP}).")] = None
    width: Annotated[Optional[int], _option(help=f"Of the decoder (default: {WECLIP_WIDTH}).")] = None
    blocks: Annotated[Optional[int], _option(help=f"Of the decoder (default: {WECLIP_BLOCKS}).")] = None
    heads: Annotated[Optional[int], _option(help=f"Of the decoder (default: {WECLIP_HEADS}).")] = None
    dropout: Annotated[Optional[float], _option(help=f"Share of hidden channels (default: {WECLIP_DROPOUT}).")] = None
    static_layers: Annotated[
        Optional[int],
        _option(help=f"Blocks from the end whose attention is averaged at first (default: {CAA_LAYERS})."),
    ] = None
    rfm_layers: Annotated[
        Optional[int],
        _option(
            help="Blocks from the end that the refinement module (RFM) chooses among (default: "
            f"{WECLIP_RFM_LAYERS}; COCO {WECLIP_COCO_RFM_LAYERS})."
        ),
    ] = None
    rfm_filter: Annotated[
        Optional[RfmFilter],
        _option(help="Which of them it keeps: signed as the code, abs as the paper (default: signed)."),
    ] = None
    rfm_from: Annotated[
        Optional[int], _option(help="Steps before RFM takes over (default: half of all; that many or more: never).")
    ] = None
    box_threshold: Annotated[
        Optional[float],
        _option(help=f"Share of the peak that boxes enclose (default: {BOX_THRESHOLD}; COCO {COCO_BOX_THRESHOLD})."),
    ] = None
    rounds: Annotated[Optional[int], _option(help=f"Sinkhorn rounds (default: {SINKHORN_ROUNDS}).")] = None
    power: Annotated[Optional[int], _option(help=f"How often CAMs are spread (default: {SPREAD_POWER}).")] = None
    par_iterations: Annotated[
        Optional[int], _option(help=f"Of the refinement along colours; 0: none (default: {PAR_ITERATIONS}).")
    ] = None
    radius: Annotated[
        Optional[int], _option(help=f"Patches to each side whose affinity is learned (default: {WECLIP_RADIUS}).")
    ] = None
    affinity_weight: Annotated[
        Optional[float], _option(help=f"Of the affinity loss (default: {WECLIP_AFFINITY_WEIGHT}).")
    ] = None
    statistics: Annotated[
        Optional[PixelStatistics], _option(help="What images are normalised with (default: clip, the model's own).")
    ] = None
    supervise_padding: Annotated[
        Optional[bool],
        _option("--supervise-padding/--ignore-padding", help="Learn outside of the image, too (default: ignore)."),
    ] = None
    confidence: Annotated[
        Optional[float], _option(help=f"--soft: least score of a pixel that counts (default: {CONFIDENCE}).")
    ] = None


@grouped
def weclip(
    *,
    where: shared.DatasetArguments,
    labels: shared.Labels = None,
    tag_threshold: shared.TagThreshold = None,
    tag_top_k: shared.TagTopK = None,
    masks: Annotated[
        Optional[str], shared.data_option(help="Learn from these label masks, not from labels: a folder, or toy.")
    ] = None,
    soft: Annotated[
        Optional[Path], shared.data_option(help="--masks: CAMs with their scores; unsure pixels do not count.")
    ] = None,
    classes: shared.Classes = None,
    background: shared.Background = None,
    template: shared.Template = None,
    prompts: shared.Prompts = None,
    reading: shared.ReadingArguments,
    tower: shared.TowerArguments,
    permissive: shared.Permissive = False,
    out: Annotated[Path, shared.output_option(help="NAME.safetensors; the run itself goes to NAME-training.")] = Path(
        "weclip.safetensors"
    ),
    steps: Annotated[
        Optional[int],
        shared.train_option(help=f"Default: {WECLIP_STEPS}; COCO {WECLIP_COCO_STEPS}, toy {WECLIP_TOY_STEPS}.", min=1),
    ] = None,
    batch_size: Annotated[int, shared.train_option(help="Images per step, over all processes.", min=1)] = WECLIP_BATCH,
    cache: Annotated[
        bool, shared.train_option("--cache", help="No augmentation: compute the frozen CLIP once for each image.")
    ] = False,
    training: shared.TrainArguments,
    validation: shared.ValidationArguments,
    constants: WeclipArguments,
    paper: Annotated[bool, shared.method_option("--paper", help="As the authors' code, with its quirks.")] = False,
    output: shared.OutputArguments,
) -> int:
    """Train WeCLIP's decoder on frozen CLIP, from image-level labels alone.

    The same command goes on where a run stopped. Under torchrun several processes share each batch. Examples:

      clipseed train weclip --dataset voc --split trainaug --val val

      clipseed train weclip --dataset voc --split trainaug --masks pseudo --soft crf.h5
    """
    from clipseed.data.dataset import DatasetOptions
    from clipseed.jobs.train_weclip import TrainWeclipOptions, run_train_weclip

    if permissive:
        refuse_restricted(tower, where.dataset)
    source, tagging = shared.label_source(labels, tag_threshold, tag_top_k)
    data = DatasetOptions(
        **vars(where), **vars(reading), **source, classes=classes, templates=tuple(template or ()),
        background=background,
    )  # fmt: skip
    options = TrainWeclipOptions(
        **tagging, data=data, out=out, steps=steps, batch=batch_size, masks=masks, soft=soft, cache=cache,
        prompts=prompts, constants=constants.chosen(), paper=paper, **vars(tower), **training.parsed(),
        **vars(validation),
    )  # fmt: skip
    return run_training(lambda *talk: run_train_weclip(options, *talk), training.allow_skipped, output)
