"""``clipseed sam-masks``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._groups import grouped
from clipseed.cli._run import SPENT_ON, Running, made, prepare
from clipseed.defaults import SAM_MAX_SIDE, DatasetName, SamModel, SamPreset, SamPrompt, SegmentFormat
from clipseed.errors import UsageError
from clipseed.wording import counted

if TYPE_CHECKING:
    from clipseed.jobs.sam_masks import SamMasksReport

_grid_option = partial(typer.Option, rich_help_panel="Grid (default: the preset's)")
_prompt_option = partial(typer.Option, rich_help_panel="Prompts instead of a grid")


@dataclass(frozen=True, kw_only=True)
class ImageArguments:
    """A data set of which the images alone count, or where the images of CAMs are."""

    dataset: Annotated[
        Optional[DatasetName], shared.data_option(help="Labels are not needed (default: the images of --seeds).")
    ] = None
    root: Annotated[
        Optional[Path],
        shared.data_option(
            help="Folder of the devkit (default: $CLIPSEED_VOC or here), or where that of --seeds is now."
        ),
    ] = None
    images: Annotated[
        Optional[Path],
        shared.data_option(help="Folder with the images (folder, coco), or where those of --seeds are now."),
    ] = None
    split: shared.Split = None


@grouped(first=("dataset", "images", "split", "seeds", "checkpoint", "existing", "prompt", "preset", "out", "device"))
def sam_masks(
    *,
    where: ImageArguments,
    seeds: Annotated[
        Optional[Path],
        shared.data_option(help="Take the images of these CAMs (default: cams.h5), and prompts from their maps."),
    ] = None,
    out: Annotated[Path, shared.output_option(help="NAME.h5 for one file, or a folder for units.")] = Path(
        "segments.h5"
    ),
    reading: shared.ReadingArguments,
    checkpoint: Annotated[
        Optional[str],
        shared.model_option(
            help="SAM's weights: sam_vit_b_01ec64.pth, …, a small one as .npz, or toy (default for the toy set)."
        ),
    ] = None,
    model: Annotated[SamModel, shared.model_option(help="auto: as the checkpoint; else insist on it.")] = "auto",
    sam_factory: Annotated[
        Optional[str],
        shared.model_option(
            help="MODULE:FUNCTION that makes another model from the checkpoint's path and the device (MobileSAM, "
            "HQ-SAM, …)."
        ),
    ] = None,
    max_side: Annotated[
        int,
        shared.model_option(help="Shrink longer images to this side, which is what SAM sees of them; 0: never.", min=0),
    ] = SAM_MAX_SIDE,
    existing: Annotated[
        Optional[Path], shared.data_option("--import", help="Store masks that exist already: a folder or a JSON file.")
    ] = None,
    import_kind: Annotated[
        SegmentFormat, shared.data_option(metavar="FORMAT", help=f"Their format: {shared.listed(SegmentFormat)}.")
    ] = "auto",
    preset: Annotated[
        SamPreset, _grid_option(help="fma (FMA-WSSS: 32x32 points, and 16x16 on 4 crops) or stock (SAM's own).")
    ] = "fma",
    points_per_side: Annotated[Optional[int], _grid_option(help="Points along a side.", min=1)] = None,
    crop_layers: Annotated[Optional[int], _grid_option(help="Layers of crops; 0: the image only.", min=0)] = None,
    iou_threshold: Annotated[Optional[float], _grid_option(help="Predicted IoU to exceed.")] = None,
    stability_threshold: Annotated[Optional[float], _grid_option(help="Least stability.")] = None,
    min_area: Annotated[Optional[int], _grid_option(help="Remove holes and islands of fewer pixels.", min=0)] = None,
    points_per_batch: Annotated[Optional[int], _grid_option(help="Points decoded at once.", min=1)] = None,
    prompt: Annotated[
        Optional[SamPrompt], _prompt_option(help="Ask for each class where its map in --seeds peaks.")
    ] = None,
    batch_size: Annotated[str, _prompt_option(help="auto, or images encoded at once.")] = "auto",
    device: shared.Device = "auto",
    precision: shared.PrecisionOption = "auto",
    running: shared.RunArguments,
    output: shared.OutputArguments,
) -> int:
    """Find the segments of every image with SAM, once per data set, and keep them in a compact cache.

    Running the same command again does what is missing. Examples:

      clipseed sam-masks --dataset voc --checkpoint sam_vit_h_4b8939.pth

      clipseed sam-masks --seeds cams.h5 --prompt points --checkpoint sam_vit_b_01ec64.pth

      clipseed sam-masks --dataset coco --import annotations/panoptic_val2017.json
    """
    from clipseed.data.dataset import DatasetOptions
    from clipseed.jobs.sam_masks import SamMasksOptions, proposal_options, run_sam_masks

    run = prepare("sam-masks", running, output)
    data = None
    if where.dataset is not None:
        data = DatasetOptions(**vars(where), **vars(reading), images_only=True)
    else:
        _refuse_without_dataset(split=where.split, limit=reading.limit, exif=reading.exif or None)
    if where.dataset is None and seeds is None:
        try:
            seeds = run.source(None, "sam-seed" if prompt else "sam-masks", "images of")
        except UsageError as error:
            raise UsageError(f"{error}, or give --dataset") from error
    proposals = proposal_options(
        preset, points_per_side=points_per_side, crop_layers=crop_layers, pred_iou_threshold=iou_threshold,
        stability_threshold=stability_threshold, min_region_area=min_area, points_per_batch=points_per_batch,
    )  # fmt: skip
    options = SamMasksOptions(
        out=out, data=data, cams=seeds, images=None if data else where.images, root=None if data else where.root,
        checkpoint=checkpoint, model=model, factory=sam_factory, proposals=proposals, max_side=max_side,
        existing=existing, existing_kind=import_kind, prompt=prompt,
        run=run.options(
            device=device, precision=precision, batch_size=shared.auto_or_number(batch_size, "--batch-size")
        ),
    )  # fmt: skip
    with run.console:
        done = run_sam_masks(options, run.start, run.loading)
    return _finish(run, done)


def _refuse_without_dataset(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--{name} belongs to --dataset; the images of --seeds are read as the CAMs were")


def _finish(run: Running, done: SamMasksReport) -> int:
    counters, summary = done.stats.counters, made(done, "images", "done")
    if done.stats.computed:
        empty = f", {counted(counters['without'], 'image')} without any" if counters["without"] else ""
        size = f"{counters['bytes'] / max(1, done.masks):.0f} bytes each"
        mostly = f"mostly {SPENT_ON[done.stats.bottleneck]} ({done.device})"
        summary += f"; {done.masks} masks, {done.per_image:.1f} per image, {size}{empty}; {mostly}"
    facts = {
        "masks": done.masks, "masks_per_image": round(done.per_image, 3), "without_masks": counters["without"],
        "mask_bytes": counters["bytes"], "model": done.model, "device": done.device,
    }  # fmt: skip
    return run.finish(done, summary, facts)
