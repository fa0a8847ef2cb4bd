"""``clipseed prompts``: rank prompt templates, and the words of classes, by sharpness (CLIP-ES, Eq. 9)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipseed.clip.model import FrozenClip, chosen_weights, model_name
from clipseed.clip.sharpness import Sharpness, sharpness
from clipseed.clip.text import TextBank, present_mask
from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.data.templates import load_templates
from clipseed.data.types import ImageSet, Sample
from clipseed.data.vocabulary import ClassText, Vocabulary
from clipseed.defaults import CAM_MAX_SIDE
from clipseed.errors import InputError, UsageError
from clipseed.jobs.cam import StartOn
from clipseed.runtime.clip_work import ClipChoice, ClipWork
from clipseed.runtime.features import FeatureRecipe, FeaturesInMemory
from clipseed.runtime.images import dealt_unit
from clipseed.runtime.run import Loading, RunOptions, RunReport, Start, open_engine, run
from clipseed.runtime.work import Deferred, LocalEngine
from clipseed.store.feature_records import Feature, feature_format
from clipseed.store.features import FeatureSet
from clipseed.store.files import csv_text, write_text
from clipseed.store.manifest import Manifest, package_versions
from clipseed.store.writer import RecordWriter, recorded_manifest


@dataclass(frozen=True)
class PromptOptions:
    """Everything ``clipseed prompts`` can be told.

    Attributes:
        data: The data set.
        templates: The file with the candidates.
        synonyms: Rank the words of classes, too.
        csv: Write all numbers to this file.
        features: Keep the images' features there; ``None``: in memory.
        model, weights, max_side, min_side: As of ``clipseed cam``.
        run: Where and how; ``shard`` and ``overwrite`` are about ``features``.
    """

    data: DatasetOptions
    templates: Path | None = None
    synonyms: bool = False
    csv: Path | None = None
    features: Path | None = None
    model: str | None = None
    weights: str | None = None
    max_side: int = CAM_MAX_SIDE
    min_side: int = 0
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def choice(self) -> ClipChoice:
        """Which CLIP."""
        return ClipChoice(self.model, chosen_weights(self.weights, self.data.dataset), self.run)


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


@dataclass(kw_only=True)
class PromptReport(RunReport):
    """What a run did, and what it found.

    Attributes:
        dataset: Name and split.
        images: Images of the data set; those with two classes or more are the run's.
        templates: Ranked; ``None`` where other shards have to come first.
        classes: The words of classes, ranked.
    """

    dataset: str
    images: int
    templates: list[Candidate] | None
    classes: list[Candidate]

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` and ``--report`` say besides what every command reports."""
        return {
            "dataset": self.dataset,
            "total": self.images,
            "templates": None if self.templates is None else [asdict(item) for item in self.templates],
            "classes": [asdict(item) for item in self.classes],
            "model": self.model,
            "device": self.device,
        }


def run_prompts(options: PromptOptions, start: StartOn | None = None, loading: Loading | None = None) -> PromptReport:
    """Rank prompt templates on a labelled data set.

    Images are encoded once; every template then costs one text encoding and one matrix product. Texts are encoded in
    this process, also where a cluster encodes the images.

    Args:
        options: What to do.
        start: As of :func:`~clipseed.jobs.cam.run_cam`, like ``loading``.
        loading: Called before a model is loaded.

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
    choice = options.choice
    recipe = FeatureRecipe(choice, image_set.reader, options.max_side, options.min_side)
    about = choice.known(recorded_manifest(options.features)) if options.features is not None else None
    say = partial(loading, model_name(choice.model, choice.weights)) if loading else None
    with contextlib.closing(open_engine(recipe, options.run.cluster, about, say)) as engine:
        done, found = _encode(options, image_set, samples, engine, start(image_set) if start else None)
        clip = _here(engine) if found is not None else None
    report = PromptReport(
        **vars(done), dataset=f"{image_set.name} {image_set.split}", images=len(image_set.samples), templates=None,
        classes=[],
    )  # fmt: skip
    if found is None:
        return report
    if clip is None:
        began = time.perf_counter()
        if say:
            say()
        clip = choice.load()
        report.loading += time.perf_counter() - began
    _rank(report, clip, image_set.vocabulary, templates, samples, found, synonyms=options.synonyms)
    if options.csv is not None:
        write_text(options.csv, _as_csv([*(report.templates or ()), *report.classes]))
    return report


def _check(options: PromptOptions) -> None:
    options.run.check()
    if options.data.templates and not options.synonyms:
        raise UsageError("--template: is for --synonyms; candidates to rank go into a file for --templates")
    if options.csv is not None and not options.csv.parent.is_dir():
        raise UsageError(f"--csv {options.csv}: the folder {options.csv.parent} does not exist")
    if options.features is None and not options.run.shard.whole:
        raise UsageError(
            f"shard {options.run.shard}: shards add up in a file; give --features FILE.h5 (or --shard 1/1 to do all)"
        )
    if options.features is None and options.run.overwrite:
        raise UsageError("--overwrite: belongs to --features, nothing else is kept")


def _encode(
    options: PromptOptions, image_set: ImageSet, samples: Sequence[Sample], engine: Deferred[Feature],
    start: Start | None,
) -> tuple[RunReport, Mapping[str, Feature] | None]:  # fmt: skip
    """Encode what is not encoded yet; features of all images, or ``None`` where other shards have to come first."""
    about, shard = engine.about, options.run.shard
    unit = dealt_unit(about["unit"], len(samples), shard.count * engine.hands)
    if options.features is None:
        memory = FeaturesInMemory(unit)
        return run(engine, memory, samples, start), memory.features
    manifest = feature_manifest(options, image_set, about["model"], about["weights"])
    with RecordWriter(
        options.features, manifest, feature_format(), unit, overwrite=options.run.overwrite, shard=shard,
        option="--features",
    ) as writer:  # fmt: skip
        reader = image_set.reader
        writer.forget_replaced({sample.id: reader.file(sample) for sample in samples if sample.id in writer.done})
        done = run(engine, writer, samples, start, shard=shard)
    if done.open_shards or not options.features.exists():  # or another run is just putting the file together
        return done, None
    with FeatureSet(options.features) as stored:
        return done, {sample.id: stored[sample.id] for sample in samples if sample.id in stored}


def feature_manifest(options: PromptOptions, image_set: ImageSet, model: dict[str, Any], weights: str) -> Manifest:
    """Everything that decides features, and where the images are; words are no part of it."""
    return {
        "kind": "features",
        "options": {"max_side": options.max_side, "min_side": options.min_side, "exif": options.data.exif},
        "model": model,
        "weights": weights,
        "max_pixels": options.data.max_pixels,
        "dataset": {
            "name": image_set.name,
            "root": str(image_set.root) if image_set.root else None,
            "split": image_set.split,
            **image_set.source,
        },
        "versions": package_versions(),
    }


def _here(engine: Deferred[Feature]) -> FrozenClip | None:
    """The model of the engine, if it is one of this process and was opened."""
    opened = engine.opened
    return opened.work.clip if isinstance(opened, LocalEngine) and isinstance(opened.work, ClipWork) else None


def _rank(
    report: PromptReport, clip: FrozenClip, vocabulary: Vocabulary, templates: Sequence[str],
    samples: Sequence[Sample], found: Mapping[str, Feature], *, synonyms: bool,
) -> None:  # fmt: skip
    """Fill in the rankings, over the images that have a feature."""
    usable = [sample for sample in samples if sample.id in found]
    if not usable:
        key, reason = report.stats.skipped[0] if report.stats.skipped else (samples[0].id, "see the other shards")
        raise InputError(f"none of the {len(samples)} images could be used; {key}: {reason}")
    features = torch.from_numpy(np.stack([found[sample.id].values for sample in usable]))
    present = present_mask([sample.labels or () for sample in usable], len(vocabulary.classes))
    report.templates = _rank_templates(clip, vocabulary, templates, features, present)
    if synonyms:
        report.classes = _rank_words(clip, vocabulary, features, present)


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
    head = ("kind", "class", "words", "rank", "sharpness", "present", "images")
    return csv_text(head, (["" if value is None else value for value in vars(row).values()] for row in rows))
