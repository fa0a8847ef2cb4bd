"""``clipseed train prompts``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

from clipseed.cli import _options as shared
from clipseed.cli._groups import grouped
from clipseed.cli._training import run_training
from clipseed.defaults import (
    PROMPT_BATCH,
    PROMPT_CROP,
    PROMPT_LENGTH,
    PROMPT_LR,
    PROMPT_MOMENTUM,
    PROMPT_WARM_UP,
    PROMPT_WARM_UP_LR,
    PROMPT_WEIGHT_DECAY,
    ActivationReduction,
    ContrastReduction,
    NamePosition,
    PositiveClasses,
    PromptTask,
)

_option = shared.method_option


@dataclass(frozen=True, kw_only=True)
class PromptArguments:
    """The method's constants; what is not given is as published for the class list and the task."""

    context: Annotated[
        Optional[str],
        _option(
            help="Who shares context vectors: shared (all names), class (none) or a YAML file, class: group (default: "
            "shared; class for VOC's segmentation)."
        ),
    ] = None
    position: Annotated[
        Optional[NamePosition],
        _option(help="Where names stand (default: end; front of the context for VOC's segmentation)."),
    ] = None
    context_length: Annotated[Optional[int], _option(help=f"Vectors of a context (default: {PROMPT_LENGTH}).")] = None
    nameless: Annotated[
        Optional[int],
        _option(help="So many nameless background prompts in place of words (default: none; VOC's segmentation 25)."),
    ] = None
    words: Annotated[
        Optional[str],
        _option(help="Begin with the embeddings of these words, e.g. 'a clean origami'."),
    ] = None
    deviation: Annotated[
        Optional[float], _option(help="Of a random context (default: 0.015; VOC's segmentation 0.0125).")
    ] = None
    lr: Annotated[Optional[float], _option(help=f"Learning rate of SGD (default: {PROMPT_LR}).")] = None
    momentum: Annotated[Optional[float], _option(help=f"Of SGD (default: {PROMPT_MOMENTUM}).")] = None
    weight_decay: Annotated[Optional[float], _option(help=f"Of SGD (default: {PROMPT_WEIGHT_DECAY}).")] = None
    warm_up: Annotated[
        Optional[int], _option(help=f"Steps at a small rate (default: {PROMPT_WARM_UP}; COCO 1000).")
    ] = None
    warm_up_lr: Annotated[Optional[float], _option(help=f"That rate (default: {PROMPT_WARM_UP_LR}).")] = None
    schedule: Annotated[
        Optional[int], _option(help="Steps of the cosine (default: --steps; COCO 20500, segmentation 75000).")
    ] = None
    crop: Annotated[Optional[int], _option(help=f"Side of the crops in pixels (default: {PROMPT_CROP}).")] = None
    sides: Annotated[
        Optional[str], _option(help="Range of an image's longer side (default: 288,480; COCO 318,530).")
    ] = None
    jitter: Annotated[Optional[bool], _option("--jitter/--no-jitter", help="Random colours (default: yes).")] = None
    mirror: Annotated[Optional[float], _option(help="Probability of the mirror image (default: 0.5).")] = None
    positives: Annotated[
        Optional[PositiveClasses],
        _option(help="Segmentation: classes that the cropped mask shows, or the image's (default: crop; COCO image)."),
    ] = None
    contrast: Annotated[
        Optional[ContrastReduction], _option(help="Classification: mean over pairs, or per image (default: pairs).")
    ] = None
    contrast_scale: Annotated[Optional[float], _option(help="Classification: factor on logits (default: 1).")] = None
    activation: Annotated[
        Optional[ActivationReduction],
        _option(help="Segmentation: mean over pixels, sides (object, rest) or pairs (default: pixels)."),
    ] = None
    squared: Annotated[
        Optional[bool], _option("--squared/--absolute", help="Segmentation: distance (default: absolute).")
    ] = None
    through_peak: Annotated[
        Optional[bool],
        _option("--through-peak/--fixed-peak", help="Segmentation: gradient through the peak (default: fixed)."),
    ] = None
    background_floor: Annotated[
        Optional[float], _option(help="Segmentation: background below it costs nothing (default: 0).")
    ] = None
    relative: Annotated[
        Optional[bool],
        _option(
            "--relative/--as-scaled",
            help="Segmentation: maps divided by their peak (default: as scaled).",
        ),
    ] = None
    softmax_floor: Annotated[Optional[float], _option(help=shared.SOFTMAX_FLOOR)] = None

    def chosen(self) -> dict[str, Any]:
        """Those that were given."""
        names = {"context": "sharing", "context_length": "length"}
        given = {names.get(key, key): value for key, value in shared.given(**vars(self)).items()}
        if self.sides is not None:
            given["sides"] = shared.whole_numbers(self.sides, "--sides")
        return given


@grouped
def prompts(
    *,
    where: shared.DatasetArguments,
    task: Annotated[
        PromptTask,
        shared.data_option(help="From image labels, or from coarse pseudo-labels (--seeds).", show_default=True),
    ] = "classification",
    seeds: Annotated[
        Optional[str], shared.data_option(help="Segmentation: folder of coarse pseudo-labels, or toy.")
    ] = None,
    labels: Annotated[
        Optional[Path], shared.data_option(help="Image-level labels: CSV, one-hot CSV, JSON or text.")
    ] = None,
    classes: shared.Classes = None,
    background: shared.Background = None,
    reading: shared.ReadingArguments,
    tower: shared.TowerArguments,
    out: Annotated[Path, shared.output_option(help="NAME.safetensors; the run itself goes to NAME-training.")] = Path(
        "prompts.safetensors"
    ),
    steps: Annotated[
        Optional[int],
        shared.train_option(
            help="Default, classification and segmentation: 1800, 17000; COCO 6150, 45000; toy 400.", min=1
        ),
    ] = None,
    batch_size: Annotated[
        Optional[int],
        shared.train_option(help=f"Images per step, over all processes (default: {PROMPT_BATCH}).", min=1),
    ] = None,
    context_seed: Annotated[int, shared.train_option(help="Of a fresh context.", min=0)] = 0,
    cache: Annotated[
        bool, shared.train_option("--cache", help="No augmentation: compute the frozen CLIP once for each image.")
    ] = False,
    training: shared.TrainArguments,
    constants: PromptArguments,
    output: shared.OutputArguments,
) -> int:
    """Learn prompts for class activation maps (FMA-WSSS), CLIP staying as it is.

    The same command goes on where a run stopped. Examples:

      clipseed train prompts --dataset voc --split trainaug --out classify.safetensors

      clipseed train prompts --dataset voc --task segmentation --seeds pseudo-sam --out fine.safetensors
    """
    from clipseed.data.dataset import DatasetOptions
    from clipseed.jobs.train_prompts import TrainPromptsOptions, run_train_prompts

    data = DatasetOptions(
        **vars(where), **vars(reading), labels=labels, classes=classes, background=background,
        auto_labels=seeds is not None and where.dataset == "folder" and labels is None,
    )  # fmt: skip
    options = TrainPromptsOptions(
        data=data, out=out, steps=steps, batch=batch_size, task=task, seeds=seeds, context_seed=context_seed,
        cache=cache, constants=constants.chosen(), **vars(tower), **training.parsed(),
    )  # fmt: skip
    return run_training(lambda *talk: run_train_prompts(options, *talk), training.allow_skipped, output)
