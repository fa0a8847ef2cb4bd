"""``clipseed prompts``: rank prompt templates, and the words of classes, by sharpness (CLIP-ES, Eq. 9)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipseed.clip.model import TOY_WEIGHTS, FrozenClip
from clipseed.clip.sharpness import Sharpness, sharpness
from clipseed.clip.text import TextBank, present_mask
from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.data.templates import load_templates
from clipseed.data.types import ImageSet, Sample
from clipseed.data.vocabulary import ClassText, Vocabulary
from clipseed.defaults import CAM_MAX_SIDE, WEIGHTS, Precision
from clipseed.errors import InputError, UsageError
from clipseed.jobs.cam import StartOn
from clipseed.runtime.features import Feature, FeatureOptions, cut_units, stream_features
from clipseed.runtime.interrupt import interruptible
from clipseed.store.files import write_text


@dataclass(frozen=True)
class PromptOptions:
    """Everything ``clipseed prompts`` can be told; ``templates`` is the file with the candidates."""

    data: DatasetOptions
    templates: Path | None = None
    synonyms: bool = False
    csv: Path | None = None
    model: str | None = None
    weights: str | None = None
    device: str = "auto"
    precision: Precision = "auto"
    max_side: int = CAM_MAX_SIDE
    min_side: int = 0
    batch_size: int | None = None
    workers: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One ranked text.

    Attributes:
        kind: ``template``; or how a class is called: ``name``, ``text``, ``synonym`` or ``fused`` (all its words).
        class_name: Class whose words these are; empty for templates.
        words: The template, or what goes into it.
        rank: 1 is best; ``None`` when no image tells.
        sharpness: Lower is better.
        present: What the present classes score together, in [0, 1].
        images: Images that the numbers are means over.
    """

    kind: str
    class_name: str
    words: str
    rank: int | None
    sharpness: float | None
    present: float | None
    images: int


@dataclass
class PromptReport:
    """What a run found; ``images`` of ``total`` images show two classes or more."""

    dataset: str
    total: int
    images: int
    templates: list[Candidate]
    classes: list[Candidate]
    model: dict[str, Any]
    device: str
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "dataset": self.dataset,
            "images": self.images,
            "total": self.total,
            "templates": [asdict(item) for item in self.templates],
            "classes": [asdict(item) for item in self.classes],
            "skipped": [{"id": key, "reason": why} for key, why in self.skipped],
            "model": self.model,
            "device": self.device,
        }


def run_prompts(options: PromptOptions, start: StartOn | None = None) -> PromptReport:
    """Rank prompt templates on a labelled data set.

    Images are encoded once; every template then costs one text encoding and one matrix product.

    Args:
        options: What to do.
        start: As of :func:`~clipseed.jobs.cam.run_cam`.

    Raises:
        InputError: a bad list of templates, or no usable image with two labels or more.
        ClipseedError: see the modules it uses.
    """
    _check(options)
    templates = load_templates(options.templates)
    image_set = open_dataset(options.data)
    samples = [sample for sample in image_set.samples if len(sample.labels or ()) > 1]
    if not samples:
        raise InputError(
            f"{image_set.name} {image_set.split}: none of its {len(image_set.samples)} images shows two classes or "
            "more; sharpness compares the classes of one image"
        )
    if options.csv is not None and not options.csv.parent.is_dir():
        raise UsageError(f"--csv {options.csv}: the folder {options.csv.parent} does not exist")
    weights = options.weights or (TOY_WEIGHTS if options.data.dataset == "toy" else WEIGHTS)
    clip = FrozenClip.load(options.model, weights, options.device, options.precision)
    features, labels, skipped = _encode(clip, image_set, samples, options, start)
    vocabulary = image_set.vocabulary
    present = present_mask(labels, len(vocabulary.classes))
    report = PromptReport(
        dataset=f"{image_set.name} {image_set.split}",
        total=len(image_set.samples),
        images=len(labels),
        templates=_rank_templates(clip, vocabulary, templates, features, present),
        classes=_rank_words(clip, vocabulary, features, present) if options.synonyms else [],
        model=clip.manifest(),
        device=str(clip.tower.device),
        skipped=skipped,
    )
    if options.csv is not None:
        write_text(options.csv, _as_csv([*report.templates, *report.classes]))
    return report


def _check(options: PromptOptions) -> None:
    if options.data.templates and not options.synonyms:
        raise UsageError("--template: is for --synonyms; candidates to rank go into a file for --templates")
    if options.batch_size is not None and options.batch_size < 1:
        raise UsageError("--batch-size: give auto or a number from 1")


def _encode(
    clip: FrozenClip, image_set: ImageSet, samples: Sequence[Sample], options: PromptOptions, start: StartOn | None
) -> tuple[Tensor, list[tuple[int, ...]], list[tuple[str, str]]]:
    """Unit features ``(N, E)`` of the images that can be read, their labels, and the others with reasons."""
    found: list[Feature] = []
    run = FeatureOptions(options.max_side, options.min_side, options.batch_size, options.workers)
    advance = start(image_set)(len(samples), 0) if start else (lambda count, stats: None)
    with interruptible(lambda: "interrupted; nothing was kept"):
        units = cut_units(samples, clip.tower.device)
        stats = stream_features(clip, image_set.reader, units, run, found.extend, advance)
    if not found:
        key, reason = stats.skipped[0]
        raise InputError(f"none of the {len(stats.skipped)} images could be used; the first, {key}: {reason}")
    labels = {sample.id: sample.labels or () for sample in samples}
    return torch.stack([row for _, row in found]), [labels[key] for key, _ in found], stats.skipped


def _rank_templates(
    clip: FrozenClip, vocabulary: Vocabulary, templates: Sequence[str], features: Tensor, present: Tensor
) -> list[Candidate]:
    measured = []
    for template in templates:
        text = clip.encode_text(replace(vocabulary, templates=(template,), background=()))
        measured.append(("template", template, _measure(features, text, present)))
    return _ranked("", measured)


def _rank_words(clip: FrozenClip, vocabulary: Vocabulary, features: Tensor, present: Tensor) -> list[Candidate]:
    """Rank the words of every class that has synonyms, all other classes as the vocabulary has them."""
    base = clip.encode_text(replace(vocabulary, background=()))
    choices = [(k, list(word_choices(item))) for k, item in enumerate(vocabulary.classes) if item.synonyms]
    if not choices:
        return []
    # Names of classes must differ, words may be equal: number them, so that one encoding serves all.
    alone = [ClassText(f"words {n}", words) for n, words in enumerate(w for _, row in choices for _, w in row)]
    encoded = iter(clip.encode_text(replace(vocabulary, classes=tuple(alone), background=())).classes)
    found: list[Candidate] = []
    for class_id, row in choices:
        shown = present[:, class_id]
        measured = []
        for kind, words in row:
            classes = base.classes.clone()
            classes[class_id] = next(encoded)
            measured.append((kind, words, _measure(features[shown], replace(base, classes=classes), present[shown])))
        found += _ranked(vocabulary.classes[class_id].name, measured)
    return found


def word_choices(item: ClassText) -> Iterator[tuple[str, str]]:
    """Ways to call a class: name, text, each synonym, and all its words in one phrase (CLIP-ES, section 3.2)."""
    seen = set()
    named = [("name", item.name), ("text", item.text), *(("synonym", word) for word in item.synonyms)]
    for kind, words in [*named, ("fused", item.prompt)]:
        if words and words not in seen:
            seen.add(words)
            yield kind, words


def _measure(features: Tensor, text: TextBank, present: Tensor) -> Sharpness | None:
    return sharpness(text.log_probabilities(features), present) if len(features) else None


def _ranked(class_name: str, measured: Sequence[tuple[str, str, Sharpness | None]]) -> list[Candidate]:
    """Best first; equal values stay in the order given."""
    order = sorted(measured, key=lambda item: item[2].value if item[2] else 0.0)
    return [
        Candidate(kind, class_name, words, position, result.value, result.present, result.images)
        if result
        else Candidate(kind, class_name, words, None, None, None, 0)
        for position, (kind, words, result) in enumerate(order, 1)
    ]


def _as_csv(rows: Sequence[Candidate]) -> str:
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["kind", "class", "words", "rank", "sharpness", "present", "images"])
    for row in rows:
        table.writerow(["" if value is None else value for value in vars(row).values()])
    return buffer.getvalue()
