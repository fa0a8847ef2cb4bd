"""``clipseed predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._groups import grouped
from clipseed.cli._run import made, prepare, refuse_restricted_segmenter
from clipseed.defaults import PREDICT_MAX_SIDE, DatasetName
from clipseed.errors import UsageError

OWN = "own"
"""``--labels own``: the data set's."""


@grouped(first=("segmenter", "images", "dataset", "split", "labels", "scales", "flip", "crf", "out", "weights"))
def predict(
    *,
    segmenter: Annotated[
        Path, typer.Argument(metavar="SEGMENTER", help="File of clipseed train, or a checkpoint of WeCLIP's authors.")
    ] = Path("weclip.safetensors"),
    dataset: Annotated[
        Optional[DatasetName], shared.data_option(help="toy is built in (default: folder, with --images).")
    ] = None,
    root: Annotated[
        Optional[Path], shared.data_option(help="Folder of the devkit (default: $CLIPSEED_VOC or the working folder).")
    ] = None,
    images: Annotated[Optional[Path], shared.data_option(help="Folder with the images (folder, coco).")] = None,
    split: shared.Split = None,
    labels: Annotated[
        Optional[str],
        shared.data_option(
            help="Make refined pseudo-labels of these classes instead of predictions: CSV, JSON or text, or own, the "
            "data set's."
        ),
    ] = None,
    classes: Annotated[
        Optional[str],
        shared.data_option(
            help="Class list of an authors' checkpoint (default: VOC's or COCO's), or other words for a segmenter that "
            "scores by text."
        ),
    ] = None,
    prompts: Annotated[
        Optional[Path], shared.data_option(help="--labels: learned prompts in place of the classes' words.")
    ] = None,
    reading: shared.ReadingArguments,
    tower: shared.TowerArguments,
    permissive: shared.Permissive = False,
    max_side: Annotated[
        int, shared.model_option(help="Shrink longer images to this side; 0: never.", min=0)
    ] = PREDICT_MAX_SIDE,
    scales: Annotated[
        Optional[str], shared.model_option(help="Scales whose logits are averaged (default: 1; --paper 1,0.75).")
    ] = None,
    flip: Annotated[
        Optional[bool],
        shared.model_option("--flip/--no-flip", help="Average with the mirrored image (default: with --paper only)."),
    ] = None,
    window: Annotated[
        int, shared.model_option(help="Slide a window of this side over each image; 0: the whole image.", min=0)
    ] = 0,
    window_stride: Annotated[int, shared.model_option(help="How far it slides; 0: two thirds of its side.", min=0)] = 0,
    paper: Annotated[
        bool, shared.model_option("--paper", help="WeCLIP's published test: long side 512, two scales, mirrored.")
    ] = False,
    crf: Annotated[bool, shared.method_option("--crf", help="Refine with a dense CRF, WeCLIP's constants.")] = False,
    out: Annotated[Path, shared.output_option(help="Folder for the masks.")] = Path("predictions"),
    soft: Annotated[
        Optional[Path], shared.output_option(help="Also keep the scores as CAMs: NAME.h5 or a folder.")
    ] = None,
    empty: shared.Empty = "background",
    compute: shared.ComputeArguments,
    running: shared.RunArguments,
    output: shared.OutputArguments,
) -> int:
    """Segment images with a trained segmenter.

    Masks are palette PNG of the image's size: 0 background, class index + 1. Examples:

      clipseed predict weclip.safetensors --images photos

      clipseed predict bridge.safetensors --images photos --classes other.txt --max-side 0 --window 512

      clipseed predict weclip.safetensors --dataset voc --split val --paper --crf

      clipseed predict weclip.safetensors --dataset voc --split trainaug --labels own --out refined
    """
    from clipseed.data.dataset import DatasetOptions
    from clipseed.jobs.predict import PredictOptions, run_predict
    from clipseed.train.inference import ViewOptions

    if dataset is None and images is None:
        raise UsageError("name the images: --dataset, or --images DIR")
    data = DatasetOptions(
        dataset or "folder", root=root, images=images, split=split, **vars(reading),
        labels=Path(labels) if labels is not None and labels != OWN else None,
    )  # fmt: skip
    if labels == OWN and data.dataset == "folder":
        raise UsageError("--labels own: a folder has no labels; give a file of them")
    given = shared.numbers(scales, "--scales") if scales is not None else None
    plain = (1.0, 0.75) if paper and labels is None else (1.0,)
    view = ViewOptions(
        given or plain, paper and labels is None if flip is None else flip, max_side, window, window_stride, paper
    )
    if permissive:
        refuse_restricted_segmenter(segmenter, classes)
    run = prepare("predict", running, output)
    options = PredictOptions(
        segmenter=segmenter, data=data, out=out, classes=classes, labels_known=labels is not None, view=view, crf=crf,
        soft=soft, empty=empty, prompts=prompts, **vars(tower), run=run.options(**compute.parsed()),
    )  # fmt: skip
    with run.console:
        done = run_predict(options, run.start, run.loading)
    summary = made(done, "pseudo-labels" if labels is not None else "masks")
    facts = {"segmenter": str(segmenter), "model": done.model, "device": done.device}
    return run.finish(done, summary, facts, done.empty if labels is not None else None)
