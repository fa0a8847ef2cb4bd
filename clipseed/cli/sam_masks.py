"""``clipseed sam-masks``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from clipseed.cli import options as shared
from clipseed.cli.running import Running, RunOptions, prepare, rate
from clipseed.errors import UsageError

if TYPE_CHECKING:
    from clipseed.jobs.sam_masks import SamMasksReport

GRID = "Grid (default: the preset's)"
PROMPT = "Prompts instead of a grid"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("sam-masks")(sam_masks)


def sam_masks(
    dataset: Annotated[
        Optional[str],
        typer.Option(
            help="voc, coco, folder or toy; labels are not needed (default: the images of --seeds).",
            rich_help_panel=shared.DATA,
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        Optional[Path],
        typer.Option(
            help="Take the images of these seeds (default: cams.h5), and prompts from their maps.",
            rich_help_panel=shared.DATA,
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="NAME.h5 for one file, or a folder for units.", rich_help_panel=shared.OUTPUT)
    ] = Path("masks.h5"),
    root: Annotated[
        Optional[Path],
        typer.Option(
            help="Folder of the devkit (default: $CLIPSEED_VOC or here), or where that of --seeds is now.",
            rich_help_panel=shared.DATA,
        ),
    ] = None,
    images: Annotated[
        Optional[Path],
        typer.Option(
            help="Folder with the images (folder, coco), or where those of --seeds are now.",
            rich_help_panel=shared.DATA,
        ),
    ] = None,
    split: shared.Split = None,
    limit: shared.Limit = None,
    exif: shared.Exif = False,
    max_pixels: shared.MaxPixels = 80_000_000,
    checkpoint: Annotated[
        Optional[str],
        typer.Option(
            help="SAM's weights: sam_vit_b_01ec64.pth, …, a small one as .npz, or toy (default for the toy set).",
            rich_help_panel=shared.MODEL,
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="auto: as the checkpoint; vit_b, vit_l, vit_h: insist on it.", rich_help_panel=shared.MODEL),
    ] = "auto",
    sam_factory: Annotated[
        Optional[str],
        typer.Option(
            help="MODULE:FUNCTION that makes another model from the checkpoint's path and the device (MobileSAM, "
            "HQ-SAM, …).",
            rich_help_panel=shared.MODEL,
            show_default=False,
        ),
    ] = None,
    max_side: Annotated[
        int,
        typer.Option(
            help="Shrink longer images to this side, which is what SAM sees of them; 0: never.",
            rich_help_panel=shared.MODEL,
            min=0,
        ),
    ] = 1024,
    existing: Annotated[
        Optional[Path],
        typer.Option(
            "--import", help="Store masks that exist already: a folder or a JSON file.", rich_help_panel=shared.DATA
        ),
    ] = None,
    import_kind: Annotated[
        str,
        typer.Option(
            help="auto, coco-panoptic, coco-instances, instance-maps, mask-folders or sa-1b.",
            rich_help_panel=shared.DATA,
        ),
    ] = "auto",
    preset: Annotated[
        str,
        typer.Option(
            help="fma (FMA-WSSS: 32x32 points, and 16x16 on 4 crops) or stock (SAM's own).", rich_help_panel=GRID
        ),
    ] = "fma",
    points_per_side: Annotated[
        Optional[int], typer.Option(help="Points along a side.", rich_help_panel=GRID, min=1, show_default=False)
    ] = None,
    crop_layers: Annotated[
        Optional[int],
        typer.Option(help="Layers of crops; 0: the image only.", rich_help_panel=GRID, min=0, show_default=False),
    ] = None,
    iou_threshold: Annotated[
        Optional[float], typer.Option(help="Predicted IoU to exceed.", rich_help_panel=GRID, show_default=False)
    ] = None,
    stability_threshold: Annotated[
        Optional[float], typer.Option(help="Least stability.", rich_help_panel=GRID, show_default=False)
    ] = None,
    min_area: Annotated[
        Optional[int],
        typer.Option(help="Remove holes and islands of fewer pixels.", rich_help_panel=GRID, min=0, show_default=False),
    ] = None,
    points_per_batch: Annotated[
        Optional[int],
        typer.Option(help="Points decoded at once.", rich_help_panel=GRID, min=1, show_default=False),
    ] = None,
    prompt: Annotated[
        Optional[str],
        typer.Option(
            help="points or boxes: ask for each class where its map in --seeds peaks.",
            rich_help_panel=PROMPT,
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[str, typer.Option(help="auto, or images encoded at once.", rich_help_panel=PROMPT)] = "auto",
    device: shared.Device = "auto",
    precision: shared.Precision = "auto",
    workers: shared.Workers = "auto",
    shard: shared.Shard = None,
    engine: shared.Engine = "local",
    ray_address: shared.RayAddress = None,
    ray_workers: shared.RayWorkers = "auto",
    ray_cpus: shared.RayCpus = "auto",
    overwrite: shared.Overwrite = False,
    allow_skipped: shared.AllowSkipped = None,
    report: shared.RunReport = None,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> int:
    """Find the segments of every image with SAM, once per data set, and keep them in a compact cache.

    Running the same command again does what is missing. Examples:

      clipseed sam-masks --dataset voc --checkpoint sam_vit_h_4b8939.pth

      clipseed sam-masks --seeds cams.h5 --prompt points --checkpoint sam_vit_b_01ec64.pth

      clipseed sam-masks --dataset coco --import annotations/panoptic_val2017.json
    """
    from clipseed.data.image_listing import ListingOptions
    from clipseed.jobs.sam_masks import SamMasksOptions, proposal_options, run_sam_masks
    from clipseed.store.stages import newest_output

    chosen = RunOptions(shard, engine, ray_address, ray_workers, ray_cpus, report, json, quiet, allow_skipped)
    run = prepare("sam-masks", chosen)
    data = None
    if dataset is not None:
        data = ListingOptions(dataset, root, images, split, exif, max_pixels, limit)
    else:
        _refuse_without_dataset(split=split, limit=limit, exif=exif or None)
    if dataset is None and seeds is None:
        try:
            seeds = newest_output(Path(), "sam-seed" if prompt else "sam-masks")
        except UsageError as error:
            raise UsageError(f"{error}, or give --dataset") from error
        run.talker.note(f"images of {seeds}")
    proposals = proposal_options(
        preset, points_per_side=points_per_side, crop_layers=crop_layers, pred_iou_threshold=iou_threshold,
        stability_threshold=stability_threshold, min_region_area=min_area, points_per_batch=points_per_batch,
    )  # fmt: skip
    options = SamMasksOptions(
        out=out, data=data, seeds=seeds, images=None if data else images,
        root=None if data else root, checkpoint=checkpoint, model=model,
        factory=sam_factory, proposals=proposals, max_side=max_side, existing=existing,
        existing_kind=cast("Any", import_kind), prompt=cast("Any", prompt),
        run=run.how(
            device=device, precision=precision, batch_size=shared.auto_or_number(batch_size, "--batch-size"),
            workers=shared.workers_of(workers), overwrite=overwrite,
        ),
    )  # fmt: skip
    try:
        done = run_sam_masks(options, run.start, run.loading)
    finally:
        run.talker.close()
    return _finish(run, done)


def _refuse_without_dataset(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--{name} belongs to --dataset; the images of --seeds are read as the seeds were")


def _finish(run: Running, done: SamMasksReport) -> int:
    stats = done.stats
    computed, counters = stats.computed, stats.counters
    summary = f"{done.out}: {done.done_before + computed} of {done.total} images, {computed} done now{rate(done)}"
    if computed:
        empty = f", {counters['without']} images without any" if counters["without"] else ""
        bytes_each = counters["bytes"] / max(1, done.masks)
        summary += (
            f"; {done.masks} masks, {done.per_image:.1f} per image, "
            f"{bytes_each:.0f} bytes each{empty}; "
            f"limited by {stats.bottleneck} ({done.device})"
        )
    facts = {
        "masks": done.masks,
        "masks_per_image": round(done.per_image, 3),
        "without_masks": counters["without"],
        "mask_bytes": counters["bytes"],
        "model": done.model,
        "device": done.device,
    }
    return run.finish(done, summary, facts)
