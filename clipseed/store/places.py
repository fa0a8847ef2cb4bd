"""Where an output's inputs are: notes in its manifest that decide nothing, so that everything can be moved.

Each place is noted twice: as it was, an absolute path, and relative to the output (``relative`` in the manifest).
Readers try the relative one first, so a project that was moved or mounted elsewhere is found as a whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from clipseed.data.paths import is_file, is_folder
from clipseed.store.manifest import Manifest
from clipseed.store.names import is_portable

_OF_DATASET = ("images", "root", "ground_truth")
_OTHERS = ("weights", "prompts", "input")
"""Where weights and learned prompts are, and what the output was made from, which is noted relatively only."""


def home(out: Path) -> Path:
    """The folder that an output's relative places start from: that of the file, or the folder that it is."""
    return out.parent if is_portable(out) and not out.is_dir() else out


def noted(manifest: Manifest, out: Path) -> Manifest:
    """The manifest with all its places noted relative to the output as well."""
    start = home(out).resolve()
    relative = {}
    for name, place in _places(manifest).items():
        try:
            relative[name] = Path(os.path.relpath(place, start)).as_posix()
        except ValueError:  # another drive
            continue
    return {**{key: value for key, value in manifest.items() if key != "input"}, "relative": relative}


def located(manifest: Manifest, out: Path) -> Manifest:
    """The manifest of an output that is here now, with its places as they are now, where they can be found."""
    relative, dataset = manifest.get("relative"), manifest.get("dataset")
    if not isinstance(relative, dict):
        return manifest
    manifest = {key: value for key, value in manifest.items() if key != "relative"}
    start = home(out)
    found = {name: start / place for name, place in relative.items() if isinstance(place, str)}
    now = {name: str(path.resolve()) for name, path in found.items() if _exists(path)}
    if isinstance(dataset, dict):
        dataset = {**dataset, **{name: now[name] for name in _OF_DATASET if name in now and name in dataset}}
        manifest = {**manifest, "dataset": dataset}
    return {**manifest, **{name: now[name] for name in _OTHERS if name in now and name in {*manifest, "input"}}}


def same_places(stored: Manifest, wanted: Manifest, out: Path) -> bool:
    """Whether whoever reads the stored manifest finds what the wanted one names (its input aside)."""
    then, now = (_places({**manifest, "input": None}) for manifest in (located(stored, out), wanted))
    return then == now


def _places(manifest: Manifest) -> dict[str, str]:
    dataset: Any = manifest.get("dataset")
    known = dict(dataset) if isinstance(dataset, dict) else {}
    values = {name: known.get(name) for name in _OF_DATASET} | {name: manifest.get(name) for name in _OTHERS}
    return {name: value for name, value in values.items() if isinstance(value, str) and Path(value).is_absolute()}


def _exists(path: Path) -> bool:
    return is_folder(path) or is_file(path)
