"""What ``clipseed sam-masks`` can be told, what that means, and what it reports."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clipseed.data.dataset import relocated
from clipseed.data.image_listing import ImageListing, ListingOptions, list_data_set
from clipseed.data.paths import is_file, is_folder
from clipseed.errors import UsageError, WeightsError
from clipseed.formats.open import Kind, imported_masks
from clipseed.jobs.engine import recorded_reader, seed_sample
from clipseed.pseudo.prompted_segments import PROMPTS, Prompting
from clipseed.runtime.run import RunOptions, RunReport
from clipseed.sam.options import FMA, STOCK, ProposalOptions
from clipseed.store.manifest import Manifest, package_versions
from clipseed.store.reader import Seeds

TOY = "toy"
PRESETS = {"fma": FMA, "stock": STOCK}
MODELS = ("auto", "vit_b", "vit_l", "vit_h")
DEFAULT_MAX_SIDE = 1024
"""What SAM's encoder sees of an image; more pixels help the crops only."""
_TOY_WEIGHTS = Path(__file__).parents[1] / "toy" / "weights" / "sam.npz"
_WHERE = (
    "Meta's are sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth and sam_vit_h_4b8939.pth, at "
    "https://dl.fbaipublicfiles.com/segment_anything/NAME"
)


@dataclass(frozen=True)
class SamMasksOptions:
    """Everything ``clipseed sam-masks`` can be told.

    Attributes:
        out: ``NAME.h5`` or a folder.
        data: A data set; ``None`` takes the images of ``seeds``.
        seeds: Seeds whose images are meant, and whose maps prompt SAM.
        images, root: Where the images of the seeds, or their data set, are now, if they have moved.
        checkpoint: SAM's weights, or ``toy``; ``None``: ``toy`` for the toy set, else it is missing.
        model: ``auto``, or the size that the checkpoint must have.
        factory: ``module:function`` that makes another model, see :func:`~clipseed.sam.load.load_sam`.
        proposals: Settings of the grid.
        max_side: Longer images are shrunk to it first, and their masks have that size; 0: never.
        existing: Masks that exist already, taken instead of a model's.
        existing_kind: Their format.
        prompt: Ask for the classes of the seeds instead of everything.
        run: Its batch size is that of images encoded at once with ``prompt``.
    """

    out: Path
    data: ListingOptions | None = None
    seeds: Path | None = None
    images: Path | None = None
    root: Path | None = None
    checkpoint: str | None = None
    model: str = "auto"
    factory: str | None = None
    proposals: ProposalOptions = FMA
    max_side: int = DEFAULT_MAX_SIDE
    existing: Path | None = None
    existing_kind: Kind = "auto"
    prompt: Prompting | None = None
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def model_name(self) -> str:
        """The model, for people."""
        return f"SAM ({self.factory or Path(self.checkpoint or TOY).name})"

    @property
    def method(self) -> str:
        """Where masks come from: ``grid``, ``points``, ``boxes`` or ``import``."""
        return "import" if self.existing is not None else self.prompt or "grid"


@dataclass(kw_only=True)
class SamMasksReport(RunReport):
    """What a run did."""

    @property
    def masks(self) -> int:
        """Masks made in this run."""
        return self.stats.counters["masks"]

    @property
    def per_image(self) -> float:
        """Masks per image of this run."""
        return self.masks / max(1, self.stats.computed)


def proposal_options(preset: str, **overrides: Any) -> ProposalOptions:
    """A preset with some of its values replaced; ``None`` keeps the preset's.

    Raises:
        UsageError: no such preset, or an impossible value.
    """
    if preset not in PRESETS:
        raise UsageError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        if not math.isfinite(value):
            raise UsageError(f"--{name.replace('_', '-').removeprefix('pred-')} {value}: give a number")
    return replace(PRESETS[preset], **given)


def check(options: SamMasksOptions) -> None:
    """Raise :class:`~clipseed.errors.UsageError` for what cannot be meant."""
    if options.model not in MODELS:
        raise UsageError(f"--model {options.model}: choose one of {', '.join(MODELS)}")
    if options.prompt not in (None, *PROMPTS):
        raise UsageError(f"--prompt {options.prompt}: choose one of {', '.join(PROMPTS)}")
    if (options.data is None) == (options.seeds is None):
        raise UsageError("images come from --dataset or from --seeds; give one of them")
    if options.prompt and options.seeds is None:
        raise UsageError(f"--prompt {options.prompt} needs --seeds, the maps to take prompts from")
    if options.existing is not None and (options.prompt or options.checkpoint or options.factory):
        raise UsageError("--import takes masks as they are; --checkpoint, --sam-factory and --prompt need a model")
    if options.run.batch_size is not None and (options.run.batch_size < 1 or not options.prompt):
        raise UsageError("--batch-size: auto or a number from 1, with --prompt; otherwise see --points-per-batch")
    options.run.check()
    if options.max_side < 0:
        raise UsageError("--max-side: give a number of pixels, or 0 for no limit")


def find_checkpoint(options: SamMasksOptions, dataset: str) -> Path | None:
    """The file of SAM's weights; ``None`` where a factory needs none.

    Raises:
        UsageError: none is named.
        WeightsError: it is not there.
    """
    named = options.checkpoint or (TOY if dataset == TOY and not options.factory else None)
    if named is None:
        if options.factory:
            return None
        raise UsageError(f"--checkpoint FILE: name SAM's weights. {_WHERE}")
    path = _TOY_WEIGHTS if named == TOY else Path(named)
    if not (is_file(path) or (options.factory and is_folder(path))):  # what a factory reads is its own matter
        raise WeightsError(f"--checkpoint {named}: no such file. {_WHERE}")
    return path


def find_images(options: SamMasksOptions) -> tuple[ImageListing, Manifest | None]:
    """The images, and the manifest of the seeds that they come from.

    Raises:
        ClipseedError: data set or seeds are missing, malformed or damaged.
    """
    if options.data is not None:
        return list_data_set(options.data), None
    assert options.seeds is not None
    with Seeds(options.seeds) as seeds:
        manifest = relocated(seeds.manifest, options.images, options.root)
        samples = tuple(seed_sample(seeds, key) for key in seeds)
    reader = recorded_reader(manifest)
    exif = bool(manifest["options"].get("exif"))
    return ImageListing(samples, reader, dict(manifest["dataset"]), exif, manifest.get("max_pixels")), manifest


def masks_manifest(
    options: SamMasksOptions, images: ImageListing, seeds: Manifest | None, about: dict[str, Any]
) -> Manifest:
    """Everything that decides the masks, and where the images are."""
    settings: dict[str, Any] = {"exif": images.exif}
    source: dict[str, Any] = {}
    if options.method != "import":
        settings["max_side"] = options.max_side
    if options.method == "grid":
        settings |= options.proposals.manifest()
    elif options.prompt:
        settings["stability_offset"] = options.proposals.stability_offset
        settings["min_region_area"] = options.proposals.min_region_area
        assert seeds is not None
        source = {key: seeds[key] for key in ("kind", "method", "options", "model", "source") if key in seeds}
    elif options.existing is not None:
        source = imported_masks(options.existing, options.existing_kind)
    return {
        "kind": "sam-masks",
        "method": options.method,
        "options": settings,
        "source": source,
        "model": about["model"],
        "weights": about["weights"],
        "max_pixels": images.max_pixels,
        "vocabulary": seeds["vocabulary"] if seeds and options.prompt else {},
        "dataset": images.dataset,
        **({"input": str(options.seeds.resolve())} if options.seeds is not None else {}),
        "versions": package_versions(),
    }
