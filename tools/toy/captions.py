"""What the tiny CLIP reads while it is trained: captions of scenes and prompts of class names.

Only what a caption could say is used: which objects, in which colour, on which material. Never where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from clipseed.data.toy.shapes import CLASS_NAMES
from clipseed.data.toy.world import MATERIAL_NAMES, Scene
from clipseed.data.vocabulary import load_vocabulary

TEMPLATES: tuple[str, ...] = (
    "a clean origami {}.",
    "a photo of a {}.",
    "a picture of the {}.",
    "{}.",
    "a drawing of a {}.",
)
_HUES: tuple[tuple[str, float], ...] = (
    ("red", 0.0), ("orange", 0.08), ("yellow", 0.16), ("green", 0.33),
    ("cyan", 0.5), ("blue", 0.64), ("purple", 0.78), ("pink", 0.9),
)  # fmt: skip
CONCEPTS: tuple[str, ...] = (*CLASS_NAMES, *MATERIAL_NAMES)
"""Everything a label can name: classes, then materials."""


@dataclass(frozen=True)
class Description:
    """What is known of a training scene: (class index, hue) of its objects, and its materials."""

    objects: tuple[tuple[int, float], ...]
    materials: tuple[str, ...]

    @classmethod
    def of(cls, scene: Scene) -> Description:
        """Forget where everything is."""
        return cls(tuple((item.class_id, item.hue) for item in scene.objects), scene.materials)

    def concepts(self) -> list[int]:
        """Indices into :data:`CONCEPTS` of what the scene shows."""
        found = {class_id for class_id, _ in self.objects}
        return sorted(found) + [len(CLASS_NAMES) + MATERIAL_NAMES.index(name) for name in self.materials]


@lru_cache(maxsize=1)
def _words() -> dict[str, tuple[str, ...]]:
    """Name and synonyms of every concept."""
    toy = load_vocabulary("toy")
    return {item.name: (item.name, *item.synonyms) for item in toy.classes} | {name: (name,) for name in MATERIAL_NAMES}


class Captioner:
    """Draws captions and prompts, the same ones from the same generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._names = _words()

    def _say(self, name: str, plain: float) -> str:
        words = self._names[name]
        return words[0] if self._rng.random() < plain else words[int(self._rng.random() * len(words))]

    def _template(self) -> str:
        return TEMPLATES[int(self._rng.random() * len(TEMPLATES))]

    def caption(self, scene: Description) -> str:
        """One sentence about a scene, e.g. ``a photo of a red ship and a blue kite on water``."""
        phrases = []
        for position in np.argsort(self._rng.random(len(scene.objects))):
            class_id, hue = scene.objects[position]
            colour = f"{hue_name(hue)} " if self._rng.random() < 0.8 else ""
            phrases.append(colour + self._say(CLASS_NAMES[class_id], 0.7))
        text = " and a ".join(phrases)
        if self._rng.random() < 0.8:
            text += " on " + " and ".join(scene.materials)
        return self._template().format(text)

    def prompts(self) -> list[str]:
        """One prompt for every concept, all in one template."""
        template = self._template()
        return [template.format(self._prompt(name)) for name in CONCEPTS]

    def _prompt(self, name: str) -> str:
        """A name alone, or all its words fused as CLIP-ES's vocabulary does."""
        return ",".join(self._names[name]) if self._rng.random() < 0.3 else self._say(name, 0.7)


def hue_name(hue: float) -> str:
    """The nearest of eight colour names."""
    distances = [abs((hue - value + 0.5) % 1.0 - 0.5) for _, value in _HUES]
    return _HUES[int(np.argmin(distances))][0]


def concept_targets(scenes: Sequence[Description]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """``(B, concepts)``: 1 where a scene shows the concept."""
    targets = np.zeros((len(scenes), len(CONCEPTS)), np.float32)
    for row, scene in enumerate(scenes):
        targets[row, scene.concepts()] = 1
    return targets
