"""``clipseed merge``: one output out of what several runs made."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipseed.errors import StoreError, UsageError
from clipseed.runtime.interrupt import interruptible
from clipseed.store.cam_records import cam_format, classes_of
from clipseed.store.differences import differences
from clipseed.store.empty import EmptyLabel, EmptyLabels, EmptyList, listed_earlier, read_empty, stored_empty_maps
from clipseed.store.files import replacing, storage_errors, write_text
from clipseed.store.formats import format_of
from clipseed.store.gather import gathered
from clipseed.store.label_mask_writer import MANIFEST, read_label_mask_manifest
from clipseed.store.label_masks import label_mask_note
from clipseed.store.layout import RecordFormat
from clipseed.store.manifest import Manifest, dumps
from clipseed.store.places import located, noted
from clipseed.store.record_file import RecordFile, write_portable
from clipseed.store.record_set import UNIT_PATTERN
from clipseed.store.shards import WHOLE, left_without_mask, lock_output
from clipseed.store.writer import without_input


@dataclass
class MergeReport:
    """What was put together."""

    out: Path
    files: int
    images: int
    repeated: int = 0
    empty: EmptyLabels | None = None
    notes: list[str] = field(default_factory=list)


def run_merge(sources: Sequence[Path], out: Path | None) -> MergeReport:
    """Put outputs together.

    Args:
        sources: Files, folder of units, or folders of masks; ``NAME.h5`` may also be one that is not finished.
        out: The file, or for masks the folder; ``None``: finish the one source, which several runs have worked on.

    Raises:
        UsageError: nothing to merge, or into what.
        StoreError: made with different settings, contradicting each other, in use, or damaged.
    """
    if not sources:
        raise UsageError(
            "name what to merge: outputs of the same command on several machines, or one unfinished NAME.h5"
        )
    if out is None:
        return _finish(sources)
    folders = [path for path in sources if path.is_dir() and not any(path.glob(UNIT_PATTERN))]
    if folders:
        if len(folders) < len(sources):
            raise UsageError("masks and CAMs cannot be merged with each other")
        return _merge_masks(folders, out)
    listed = [item for source in sources for item in read_empty(source)]
    files = [file for source in sources for file in _record_files(source)]
    if out.exists() and out not in sources:
        raise UsageError(f"--out {out}: is there already; choose another name")
    return _merge_records(files, out, listed)


def _finish(sources: Sequence[Path]) -> MergeReport:
    """Make the portable file of a run in several shards that was not finished by its last one."""
    if len(sources) > 1:
        raise UsageError("--out NAME.h5: say where several outputs are to be merged into")
    out = sources[0]
    parts = out.with_name(out.name + ".parts")
    if not parts.is_dir():
        raise UsageError(f"{out}: nothing to finish ({parts} is not there); give --out to merge into something new")
    lock = lock_output(parts, out, WHOLE)
    try:
        files = _record_files(out)
        report = _merge_records(files, out, read_empty(out))
        shutil.rmtree(parts, ignore_errors=True)
    finally:
        lock.release()
    return report


def _record_files(source: Path) -> list[Path]:
    """Files that make up an output: newer units before the finished file that they add to."""
    parts = source.with_name(source.name + ".parts")
    unit_files = sorted((source if source.is_dir() else parts).glob(UNIT_PATTERN))
    if source.is_file():
        return [*unit_files, source]
    if not unit_files:
        raise StoreError(f"{source}: no such output (no file, and no units in {parts})")
    return unit_files


def _merge_records(paths: Sequence[Path], out: Path, listed: Sequence[EmptyLabel]) -> MergeReport:
    form = format_of(paths[0])
    report = MergeReport(out, len(paths), 0)
    manifest: Manifest | None = None
    places: dict[str, Path] = {}
    labels: dict[str, tuple[list[int], tuple[int, ...]]] = {}
    for path in paths:
        with RecordFile(path, form, verify=True) as file:
            manifest = _agreed(manifest, _located(file.manifest, path), path, report)
            for row, key in enumerate(file.ids):
                if places.setdefault(key, path) != path:
                    _refuse_contradiction(file, row, places[key], form)
                    report.repeated += 1
            if form.name == cam_format().name:
                empty = stored_empty_maps(file)
                for row, key in enumerate(file.ids):
                    labels.setdefault(key, (classes_of(file, row).tolist(), empty.get(key, ())))
    assert manifest is not None
    report.images = len(places)
    size = sum(path.stat().st_size for path in paths)
    order = list(places)
    with interruptible(lambda: f"interrupted; {out} was not written"):
        write_portable(out, dumps(noted(manifest, out)), gathered(order, places, form), form, order, size)
        if labels:
            report.empty = _list_empty(out, manifest, labels, listed)
    return report


def _located(manifest: Manifest, path: Path) -> Manifest:
    """Unit files of an unfinished file say where things are from that file."""
    inside = path.parent.name.endswith(".parts")
    folder = path.parent.parent if inside else path.parent
    return located(manifest, folder)


def _list_empty(
    out: Path, manifest: Manifest, labels: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    listed: Sequence[EmptyLabel],
) -> EmptyLabels:  # fmt: skip
    """List the labels that came to nothing in what was merged; the lists of the sources know since which stage."""
    found = EmptyList(out, manifest, earlier=listed_earlier(listed, manifest))
    for key, (classes, empty) in labels.items():
        found.add(key, classes, empty)
    found.add_listed(item for item in dict.fromkeys(listed) if item.id not in labels)
    return found.write()


def _agreed(first: Manifest | None, other: Manifest, where: Path, report: MergeReport) -> Manifest:
    """The manifest of both. Data sets may differ: shards have their own folders, splits add up."""
    if first is None:
        return other
    changed = differences(first, other, dataset=False)
    if changed:
        raise StoreError(f"{where} was made with other settings than the first:\n  " + "\n  ".join(changed[:12]))
    if first.get("input") != other.get("input"):
        first = without_input(first)
    one, two = first.get("dataset") or {}, other.get("dataset") or {}
    if one == two:
        return first
    splits = str(one.get("split")).split("+")
    if str(two.get("split")) not in splits:
        splits.append(str(two.get("split")))
    if one.get("images") != two.get("images"):
        note = f"the images were in {one.get('images')} and elsewhere; give --images to commands that need them"
        report.notes = [*(line for line in report.notes if line != note), note]
    return {**first, "dataset": {**one, "split": "+".join(splits)}}


def _refuse_contradiction(file: RecordFile[Any], row: int, other: Path, form: RecordFormat[Any]) -> None:
    """Two records of one image may only be the same record."""
    import numpy as np

    with RecordFile(other, form, verify=False) as earlier:
        there = form.pack([earlier.read(earlier.ids.index(file.ids[row]))])
    here = form.pack([file.read(row)])
    # Two copies of an image may have different times.
    if not all(np.array_equal(there[name], here[name]) for name in form.datasets if name != "file_time"):
        raise StoreError(f"{file.ids[row]!r} is in {other} and in {file.path}, and not the same in both")


def _merge_masks(folders: Sequence[Path], out: Path) -> MergeReport:
    """Copy masks into one folder."""
    report = MergeReport(out, 0, 0)
    manifest: Manifest | None = None
    found: dict[Path, Path] = {}
    for folder in folders:
        there = read_label_mask_manifest(folder)
        if there is None or "vocabulary" not in there:
            raise StoreError(f"{folder}: neither units nor masks that clipseed made")
        manifest = _agreed(manifest, there, folder, report)
        for path in sorted(folder.rglob("*.png")):
            name = path.relative_to(folder)
            if name.name.startswith("."):
                continue
            if name in found and found[name].read_bytes() != path.read_bytes():
                raise StoreError(f"{name} is in {found[name].parent} and in {folder}, and not the same in both")
            report.repeated += name in found
            found.setdefault(name, path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and out not in folders:
        raise UsageError(f"--out {out}: is there already; choose another name")
    with storage_errors(out), interruptible(lambda: f"interrupted; run the same command with an empty {out}"):
        out.mkdir(exist_ok=True)
        for name, path in found.items():
            target = out / name
            if target != path:
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target) as temporary:
                    shutil.copyfile(path, temporary)
        write_text(out / MANIFEST, dumps(noted(manifest or {}, out)) + "\n")
        notes = {name.with_suffix("").as_posix(): label_mask_note(path) for name, path in found.items()}
        labels = {key: (note.classes, note.empty) for key, note in notes.items() if note.classes is not None}
        for folder in folders:  # images that shards left out have no mask
            labels = {**left_without_mask(folder), **labels}
        listed = [item for folder in folders for item in read_empty(folder)]
        report.empty = _list_empty(out, manifest or {}, labels, listed)
    report.files = report.images = len(found)
    return report
