"""``clipseed reproduce``: a system's published protocol, step by step, each number beside the paper's.

A protocol is a list of the commands that anybody would type, with the options of the papers. Every command goes on
where it stopped, so the whole does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipseed.defaults import ReproduceDataset, ReproducedSystem
from clipseed.errors import UsageError
from clipseed.jobs.evaluate import EvaluateOptions, evaluate
from clipseed.store.files import storage_errors, write_text
from clipseed.store.open import open_prediction

SLACK = 0.3
"""Points of mIoU by which rounding of another device and other versions of packages change the published numbers."""
RESULTS = "reproduce.json"


@dataclass(frozen=True)
class Published:
    """What is known of a number.

    Attributes:
        miou: The paper's, per cent.
        users: What people got who ran the authors' code.
        source: Where the numbers are from.
    """

    miou: float
    users: tuple[float, ...] = ()
    source: str = "paper"

    @property
    def band(self) -> tuple[float, float]:
        """Within which a faithful run lands: between the numbers that are known, and a little beside them."""
        known = (self.miou, *self.users)
        return min(known) - SLACK, max(known) + SLACK


@dataclass(frozen=True)
class Score:
    """Which output is scored, and how.

    Attributes:
        split: Of the data set; named in the table.
        published: ``None``: nobody has published this number.
        alphas: Exponents of the background for maps, the best of which counts, as in CLIP-ES's code.
        gt: Folder of the ground truth below the data set's root; ``None``: the data set's own.
    """

    prediction: str
    split: str
    published: Published | None = None
    alphas: tuple[float, ...] = ()
    gt: str | None = None


@dataclass(frozen=True)
class Step:
    """One command, by its words (``{out}`` is the folder of the run), and the score of what it made."""

    title: str
    words: tuple[str, ...]
    score: Score | None = None


@dataclass(frozen=True)
class ReproduceOptions:
    """Everything ``clipseed reproduce`` can be told.

    Attributes:
        checkpoint: SAM's weights, for ``fma-wsss``.
        weights: CLIP's; ``None``: OpenAI's ViT-B/16, as published.
        limit: Only the first images of each split: a rehearsal, whose numbers are not judged.
        steps: So many steps of training: likewise.
    """

    system: ReproducedSystem
    dataset: ReproduceDataset
    out: Path
    root: Path | None = None
    weights: str | None = None
    checkpoint: str | None = None
    device: str = "auto"
    limit: int | None = None
    steps: int | None = None

    @property
    def rehearsal(self) -> bool:
        """Whether this is not the published protocol."""
        return bool(self.limit or self.steps) or self.dataset == "toy"


@dataclass(frozen=True)
class Scored:
    """A number of the run.

    Attributes:
        miou: Per cent.
        weights: SHA-256 of the model that made it.
        inside: Whether it is within the band; ``None``: nothing to compare with.
    """

    step: str
    split: str
    images: int
    miou: float
    weights: str | None
    published: Published | None
    inside: bool | None


@dataclass(frozen=True)
class Reproduced:
    """What came of a run.

    Attributes:
        skipped: Titles of steps that left images out.
        file: Where the numbers are kept.
    """

    scores: tuple[Scored, ...]
    skipped: tuple[str, ...]
    file: Path

    @property
    def outside(self) -> list[Scored]:
        """Numbers that are not what independent users got."""
        return [score for score in self.scores if score.inside is False]


class StepFailed(UsageError):
    """A command ended with an error, which it has said."""

    def __init__(self, title: str, code: int) -> None:
        super().__init__(f"{title}: ended with exit code {code} (see above); the same command goes on from there")
        self.exit_code = code


Run = Callable[[Sequence[str]], int]
"""Runs a command line of clipseed; its exit code."""


def run_reproduce(
    options: ReproduceOptions, run: Run, begin: Callable[[int, int, Step], None], tell: Callable[[Scored], None]
) -> Reproduced:
    """Run a protocol.

    Args:
        options: Which.
        run: Runs a command.
        begin: Called before each step with its number from 1, how many there are, and the step.
        tell: Called with each number.

    Raises:
        UsageError: an option is missing; a step failed.
        ClipseedError: an output cannot be scored.
    """
    steps = protocol(options)
    with storage_errors(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    scores: list[Scored] = []
    skipped = []
    for number, step in enumerate(steps, 1):
        begin(number, len(steps), step)
        words = [word.replace("{out}", str(options.out)) for word in step.words]
        code = run(words)
        if code not in (0, 3):
            raise StepFailed(f"step {number}, {step.title}", code)
        if code == 3:
            skipped.append(step.title)
        if step.score is not None:
            scores.append(_scored(options, step.title, step.score))
            tell(scores[-1])
    file = options.out / RESULTS
    told = {"system": options.system, "dataset": options.dataset, "scores": [asdict(score) for score in scores]}
    write_text(file, json.dumps(told, indent=1) + "\n")
    return Reproduced(tuple(scores), tuple(skipped), file)


def _scored(options: ReproduceOptions, title: str, score: Score) -> Scored:
    place = options.out / score.prediction
    report = evaluate(EvaluateOptions(place, score.gt, alphas=score.alphas))
    miou = round(100 * report.scores.miou, 2)
    inside = None
    published = None if options.dataset == "toy" else score.published
    if published is not None and not options.rehearsal:
        low, high = published.band
        inside = low <= miou <= high and not math.isnan(miou)
    return Scored(title, report.split, report.images, miou, _digest(place), published, inside)


def _digest(place: Path) -> str | None:
    opened = open_prediction(place, verify=False)
    manifest = opened.manifest or {}
    close = getattr(opened, "close", None)
    if close:
        close()
    model: Any = manifest.get("model")
    return str(model["sha256"]) if isinstance(model, dict) and model.get("sha256") else None


# Protocols ------------------------------------------------------------------------------------------------------------


def protocol(options: ReproduceOptions) -> list[Step]:
    """The steps of a system on a data set.

    Raises:
        UsageError: SAM's weights are missing.
    """
    makers = {"clip-es": _clip_es, "weclip": _weclip, "fma-wsss": _fma_wsss}
    return makers[options.system](options)


_SPLITS = {
    "voc": {"seeds": "train", "learn": "trainaug", "val": "val"},
    "coco": {"seeds": "train2014", "learn": "train2014", "val": "val2014"},
    "toy": {"seeds": "held-out", "learn": "train", "val": "held-out"},
}


def _images(options: ReproduceOptions, split: str) -> tuple[str, ...]:
    """The data set and what is left open, as words of a command."""
    words = ["--dataset", options.dataset, "--split", split]
    words += ["--root", str(options.root)] if options.root is not None else []
    words += ["--limit", str(options.limit)] if options.limit else []
    return tuple(words)


def _clip(options: ReproduceOptions) -> tuple[str, ...]:
    weights = ("--weights", options.weights) if options.weights else ()
    return (*weights, "--device", options.device)


def _clip_es(options: ReproduceOptions) -> list[Step]:
    """CLIP-ES (CVPR 2023): CAMs, CAA, CRF of the 1,464 images of VOC's train."""
    split = _SPLITS[options.dataset]["seeds"]
    voc = options.dataset == "voc"
    alphas = (1.0, 2.0)
    device = ("--device", options.device)
    return [
        Step(
            "initial CAMs", ("cam", *_images(options, split), "--paper", "--out", "{out}/cams.h5", *_clip(options)),
            Score("cams.h5", split, Published(58.6, source="paper, table 2") if voc else None, alphas),
        ),
        Step(
            "CAMs after CAA", ("refine", "caa", "{out}/cams.h5", "--out", "{out}/cams-caa.h5", *device),
            Score(
                "cams-caa.h5", split,
                Published(70.8, (70.71, 70.78, 70.82), "paper, users of the authors' code") if voc else None, alphas,
            ),
        ),
        Step(
            "pseudo-labels after CRF", ("crf", "{out}/cams-caa.h5", "--out", "{out}/pseudo", *device),
            Score("pseudo", split, Published(75.0, (75.0,), "paper, a user of the authors' code") if voc else None),
        ),
    ]  # fmt: skip


def _weclip(options: ReproduceOptions) -> list[Step]:
    """WeCLIP (CVPR 2024): trained on trainaug, scored on val, two scales and mirrored, without and with CRF."""
    splits = _SPLITS[options.dataset]
    plain = {"voc": Published(74.9, (73.3, 73.9), "paper, users of the authors' code")}
    smoothed = {
        "voc": Published(76.4, (74.4, 75.7), "paper, users of the authors' code"),
        "coco": Published(47.1, (45.1,), "paper, a user of the authors' code"),
    }
    steps = ("--steps", str(options.steps)) if options.steps else ()
    predict = ("predict", "{out}/weclip.safetensors", *_images(options, splits["val"]), "--paper",
               "--device", options.device)  # fmt: skip
    return [
        Step(
            "training",
            ("train", "weclip", *_images(options, splits["learn"]), "--paper", *steps,
             "--out", "{out}/weclip.safetensors", *_clip(options)),
        ),
        Step(
            "segmenter", (*predict, "--out", "{out}/plain"), Score("plain", splits["val"], plain.get(options.dataset)),
        ),
        Step(
            "segmenter with CRF", (*predict, "--crf", "--out", "{out}/crf"),
            Score("crf", splits["val"], smoothed.get(options.dataset)),
        ),
    ]  # fmt: skip


def _fma_wsss(options: ReproduceOptions) -> list[Step]:
    """FMA-WSSS (WACV 2024): segments, learned prompts, coarse seeds, prompts learned on them, fine seeds."""
    split = _SPLITS[options.dataset]["learn"]
    if options.checkpoint is None and options.dataset != "toy":
        raise UsageError("--checkpoint FILE: fma-wsss needs SAM's weights (published with sam_vit_h_4b8939.pth)")
    family = "coco" if options.dataset == "coco" else "voc"
    where, clip, device = _images(options, split), _clip(options), ("--device", options.device)
    checkpoint = ("--checkpoint", options.checkpoint) if options.checkpoint else ()
    if options.dataset == "toy":
        checkpoint = (*checkpoint, "--points-per-side", "16", "--crop-layers", "0")  # for images of 200 pixels
    training = ("--steps", str(options.steps)) if options.steps else ()
    fine_maps = "{out}/cams-fine.h5" if family == "coco" else "{out}/cams-fine-caa.h5"
    published = {
        "voc": Published(74.2, (73.9,), "paper, the authors' second run"),
        "coco": Published(47.5, source="the authors' README"),
    }
    truth = "SegmentationClassAug" if options.dataset == "voc" else None  # SBD's masks of all images of trainaug

    def caa(stage: str) -> Step:
        preset = f"fma-{family}-{stage}"
        words = ("refine", "caa", f"{{out}}/cams-{stage}.h5", "--preset", preset,
                 "--out", f"{{out}}/cams-{stage}-caa.h5", *device)  # fmt: skip
        return Step(f"{stage} CAMs after CAA", words)

    def cams(stage: str, prompts: str) -> Step:
        words = ("cam", *where, "--prompts", f"{{out}}/{prompts}.safetensors", "--raw",
                 "--out", f"{{out}}/cams-{stage}.h5", *clip)  # fmt: skip
        return Step(f"{stage} CAMs", words)

    def seeds(stage: str, maps: str, score: Score | None) -> Step:
        words = ("sam-seed", maps, "--masks", "{out}/segments.h5", "--preset", f"{family}-{stage}",
                 "--paper", "--out", f"{{out}}/{stage}")  # fmt: skip
        return Step(f"{stage} seeds", words, score)

    return [
        Step("segments", ("sam-masks", *where, *checkpoint, "--out", "{out}/segments.h5", *device)),
        Step(
            "prompts learned on labels",
            ("train", "prompts", "--task", "classification", *where, *training,
             "--out", "{out}/prompts-coarse.safetensors", *clip),
        ),
        cams("coarse", "prompts-coarse"),
        caa("coarse"),
        seeds("coarse", "{out}/cams-coarse-caa.h5", Score("coarse", split, None, gt=truth)),
        Step(
            "prompts learned on coarse seeds",
            ("train", "prompts", "--task", "segmentation", "--seeds", "{out}/coarse", *where, *training,
             "--out", "{out}/prompts-fine.safetensors", *clip),
        ),
        cams("fine", "prompts-fine"),
        *([] if family == "coco" else [caa("fine")]),  # COCO's fine CAMs are not refined
        seeds("fine", fine_maps, Score("fine", split, published.get(options.dataset), gt=truth)),
    ]  # fmt: skip
