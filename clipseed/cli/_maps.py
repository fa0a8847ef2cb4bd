"""What `cam` and `label` say of images, of their tags, and of the model that makes maps of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipseed.cli._console import Console
from clipseed.cli._run import Running, timings, warn_of_toy_weights
from clipseed.data.vocabulary import GENERAL
from clipseed.wording import counted

if TYPE_CHECKING:
    from clipseed.data.types import ImageSet
    from clipseed.jobs.cam import CamReport, TagReport
    from clipseed.jobs.label import LabelReport
    from clipseed.runtime.stream import Advance


def start(run: Running, weights: str | None, image_set: ImageSet, first: bool, todo: int, found: int) -> Advance:
    """Say what a data set is, and begin to show progress; ``first``: nothing was said of it before."""
    if first:
        _warn(run.console, weights, image_set)
    return run.start(todo, found, f"{image_set.name} {image_set.split}", len(image_set.samples))


def start_tags(run: Running, weights: str | None, image_set: ImageSet, todo: int, found: int) -> Advance:
    """Tagging comes first, so it is what warnings come before."""
    _warn(run.console, weights, image_set)
    return run.start(todo, found, what="tags")


def _warn(console: Console, weights: str | None, image_set: ImageSet) -> None:
    for note in image_set.notes:
        console.note(note)
    warn_of_toy_weights(console, weights, image_set)
    words = image_set.vocabulary
    if words.background_from == GENERAL:
        console.note(
            f"{words.name}: no background words of its own; {len(words.background)} general ones compete with its "
            "classes (--background)"
        )


def tell_tags(console: Console, tags: TagReport) -> None:
    """Say how many images CLIP tagged, and what to do with the tags."""
    if not tags.tagged:
        console.note("--labels auto: every image that can be read has labels of its own")
        return
    if tags.alike:
        what = (
            f"all classes in {tags.with_all}" if tags.with_all > tags.without_class else f"none in {tags.without_class}"
        )
        console.warn(
            f"the tags do not tell the images apart: CLIP found {what} of {tags.tagged} images; look at the list, try "
            "other words (docs/choosing-text.md) or --tag-threshold, or another model"
        )
    then = "correct it and give it with --labels"
    if tags.open_shards:
        then = f"{tags.open_shards} shards have images to be tagged yet, and the last of them writes the file"
    console.note(
        f"{tags.out}: {counted(tags.tagged, 'image')} tagged by CLIP ({tags.stats.computed} now), "
        f"{tags.without_class} of them without any class (all background); {then}"
    )


def model_facts(report: CamReport | LabelReport) -> dict[str, Any]:
    """What ``--json`` says of the model, and of tags."""
    tags = report.tags
    facts = {"model": report.model, "device": report.device}
    if tags is None:
        return facts
    found = {"tagged": tags.tagged, "empty": tags.without_class, "computed": tags.stats.computed}
    return {"tags": {"file": str(tags.out), **found, **timings(tags)}, **facts}
