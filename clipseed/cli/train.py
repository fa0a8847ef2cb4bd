"""``clipseed train``: one command per thing that is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, percent, print_json, some
from clipseed.cli._groups import grouped
from clipseed.cli._run import exit_code, refuse_restricted
from clipseed.defaults import (
    BOX_THRESHOLD,
    CAA_LAYERS,
    COCO_BOX_THRESHOLD,
    CONFIDENCE,
    PAR_ITERATIONS,
    PROMPT_BATCH,
    PROMPT_CROP,
    PROMPT_LENGTH,
    PROMPT_LR,
    PROMPT_MOMENTUM,
    PROMPT_WARM_UP,
    PROMPT_WARM_UP_LR,
    PROMPT_WEIGHT_DECAY,
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
    ActivationReduction,
    ContrastReduction,
    NamePosition,
    PixelStatistics,
    PositiveClasses,
    PromptTask,
    RfmFilter,
)

if TYPE_CHECKING:
    from clipseed.train.loop import Status
    from clipseed.train.running import TrainReport

_option = shared.method_option


@dataclass(frozen=True, kw_only=True)
class WeclipArguments:
    """The method's constants; what is not given is as published for the class list."""

    lr: Annotated[Optional[float], _option(help=f"Learning rate of the decoder (default: {WECLIP_LR}).")] = None
    weight_decay: Annotated[Optional[float], _option(help=f"Of AdamW (default: {WECLIP_WEIGHT_DECAY}).")] = None
    warm_up: Annotated[Optional[int], _option(help=f"Steps (default: {WECLIP_WARM_UP}).")] = None
    crop: Annotated[Optional[int], _option(help=f"Side of the crops in pixels (default: {WECLIP_CROP}).")] = None
    scales: Annotated[
        Optional[str], _option(help="Range of the random factor on an image's sides (default: 0.5,2).")
    ] = None
    mirror: Annotated[Optional[float], _option(help="Probability of the mirror image (default: 0.5).")] = None
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

    def chosen(self) -> dict[str, Any]:
        """Those that were given."""
        given = shared.given(**vars(self))
        if self.scales is not None:
            given["scales"] = shared.numbers(self.scales, "--scales")
        return given


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


def run_training(
    run: Callable[[Callable[[Status], None], Callable[[str], None]], TrainReport], allow_skipped: str | None,
    output: shared.OutputArguments,
) -> int:  # fmt: skip
    """Train, tell how it went, and give the exit code; one process of torchrun's talks."""
    from clipseed.train.running import first_process

    allowed = shared.allowed_skips(allow_skipped)
    console = Console(output.quiet or not first_process())
    with console:
        done = run(lambda status: console.note(str(status)), console.note)
    return _finish(console, done, allowed, output) if first_process() else 0


def _finish(console: Console, done: TrainReport, allowed: float, output: shared.OutputArguments) -> int:
    """Tell how it went, and give the exit code."""
    if done.skipped:
        reasons = some([f"{key} ({why})" for key, why in done.skipped.items()], 3)
        console.warn(f"{len(done.skipped)} images skipped: {reasons}; all of them are listed in {done.skipped_file}")
    best = ""
    if done.best is not None and done.best_out is not None:
        best = f"; {done.best_out}: step {done.best['step']} with mIoU {percent(done.best['score'])}"
    console.note(
        f"{done.out}: {done.steps} steps on {done.images} images ({done.model['weights']}, {done.device}){best}"
    )
    if output.json:
        print_json(
            {
                "out": str(done.out), "training": str(done.folder), "steps": done.steps, "images": done.images,
                "best": None if done.best is None else {**done.best, "file": str(done.best_out)},
                "model": dict(done.model), "device": done.device, "left_out": list(done.unlabelled),
                "skipped": [{"id": key, "reason": why} for key, why in done.skipped.items()],
            }
        )  # fmt: skip
    return exit_code(console, len(done.skipped), allowed)
