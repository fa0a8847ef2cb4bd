"""Label masks of the images of a folder, from Python: one folder for each class, ``photos/dog/a.jpg``.

python examples/from_python.py photos labels [--weights toy]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import clipseed

SUFFIXES = {".jpg", ".jpeg", ".png"}


def main() -> None:
    """Label every image, and show the share of it that its class covers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--weights", default="openai")
    chosen = parser.parse_args()
    classes = sorted(folder.name for folder in chosen.photos.iterdir() if folder.is_dir())
    clip = clipseed.FrozenClip.load(weights=chosen.weights)
    for name in classes:
        paths = sorted(path for path in (chosen.photos / name).iterdir() if path.suffix.lower() in SUFFIXES)
        for path, found in zip(paths, clipseed.label(paths, [name], classes=classes, clip=clip), strict=True):
            (chosen.labels / name).mkdir(parents=True, exist_ok=True)
            found.save(chosen.labels / name / f"{path.stem}.png")
            share = (found.mask == classes.index(name) + 1).mean()
            print(f"{name}/{path.name}: {100 * share:.1f} %")


if __name__ == "__main__":
    main()
