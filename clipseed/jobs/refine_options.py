"""What ``clipseed refine`` can be told, what it records, and what it reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clipseed.errors import UsageError
from clipseed.refine.caa import BOX_THRESHOLD, COCO_BOX_THRESHOLD, CaaOptions
from clipseed.refine.distribution import PATCH_TEMPERATURE
from clipseed.refine.par import DILATIONS, ITERATIONS, POSITION_WEIGHT, SHARPNESS
from clipseed.runtime.run import RunOptions, RunReport
from clipseed.store.manifest import Manifest, package_versions

Method = Literal["caa", "js", "par"]
METHODS: tuple[Method, ...] = ("caa", "js", "par")


@dataclass(frozen=True)
class ParOptions:
    """Constants of pixel-adaptive refinement (:func:`~clipseed.refine.par.refine_par`)."""

    iterations: int = ITERATIONS
    dilations: tuple[int, ...] = DILATIONS
    sharpness: float = SHARPNESS
    position_weight: float = POSITION_WEIGHT


@dataclass(frozen=True)
class RefineOptions:
    """Everything ``clipseed refine`` can be told.

    Attributes:
        source: The seeds to refine; images, model and vocabulary are those they were made with.
        box_threshold: ``None``: CLIP-ES's 0.7 for COCO's classes, 0.4 otherwise.
        paper: Reproduce the released code; ``None``: as the seeds were made.
        images, root, weights: Where the images, their data set and the weights are now, if they have moved.
    """

    method: Method
    source: Path
    out: Path | None = None
    images: Path | None = None
    root: Path | None = None
    weights: str | None = None
    box_threshold: float | None = None
    caa: CaaOptions = field(default_factory=CaaOptions)
    temperature: float = PATCH_TEMPERATURE
    par: ParOptions = field(default_factory=ParOptions)
    paper: bool | None = None
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(kw_only=True)
class RefineReport(RunReport):
    """What a run did."""

    source: Path


def default_out(source: Path, method: str) -> Path:
    """``cams.h5`` refined by ``caa`` is ``cams-caa.h5``."""
    named = source if source.name not in {"", ".."} else source.resolve()
    return named.with_name(f"{named.stem}-{method}{named.suffix}")


def caa_options(chosen: CaaOptions, box_threshold: float | None, classes: str, paper: bool) -> CaaOptions:
    """Fill in what depends on the data set (named by its vocabulary) and on ``--paper``.

    Raises:
        UsageError: a constant means nothing.
    """
    threshold = box_threshold
    if threshold is None:
        threshold = COCO_BOX_THRESHOLD if classes.startswith("coco") else BOX_THRESHOLD
    if not 0 <= threshold < 1:
        raise UsageError(f"--box-threshold {threshold}: give a share of the peak from 0 to below 1")
    for name, value, least, most in (
        ("layers", chosen.layers, 1, 1000), ("rounds", chosen.rounds, 0, 1000), ("power", chosen.power, 1, 100),
    ):  # fmt: skip
        if not least <= value <= most:
            raise UsageError(f"--{name} {value}: give a number from {least} to {most}")
    return replace(chosen, box_threshold=threshold, released=paper)


def refine_manifest(
    method: str, options: dict[str, Any], source: Manifest, model: dict[str, Any], weights: str,
    made_from: Path | None = None,
) -> Manifest:  # fmt: skip
    """What decides refined seeds: the constants, and everything that decided the seeds they were made from.

    ``made_from`` is where those are, if they were stored at all.
    """
    kept = {key: source["options"].get(key) for key in ("paper", "exif", "max_side", "min_side")}
    return {
        "kind": "refine",
        "method": method,
        "options": {**kept, **options},
        "source": {key: source[key] for key in ("kind", "method", "options", "source") if key in source},
        "model": model,
        "weights": weights,
        "max_pixels": source.get("max_pixels"),
        "vocabulary": source["vocabulary"],
        "dataset": source["dataset"],
        **({"input": str(made_from.resolve())} if made_from else {}),
        "versions": package_versions(),
    }


def caa_manifest(chosen: CaaOptions) -> dict[str, Any]:
    """The constants of CAA as a manifest has them."""
    return {**{key: value for key, value in asdict(chosen).items() if key != "released"}, "paper": chosen.released}


def check(options: RefineOptions) -> None:
    """Raise UsageError for options that mean nothing."""
    if options.method not in METHODS:
        raise UsageError(f"refine {options.method}: choose one of {', '.join(METHODS)}")
    par = options.par
    if not 1 <= par.iterations <= 1000:
        raise UsageError(f"--iterations {par.iterations}: give a number from 1 to 1000")
    if not par.dilations or any(not 1 <= step <= 1000 for step in par.dilations):
        raise UsageError("--dilations: give distances in pixels, such as 1,2,4,8,12,24")
    if not 1e-3 <= par.sharpness <= 1e3 or not 0 <= par.position_weight <= 1e3:
        raise UsageError("--sharpness and --position-weight: give positive numbers (0.3 and 0.01 in the paper)")
    if not 1e-4 <= options.temperature <= 100:
        raise UsageError(f"--temperature {options.temperature}: give a number from 0.0001 to 100")
    options.run.check()
