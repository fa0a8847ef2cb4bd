"""Image-level tags from CLIP's own classifier, for images that nobody has labelled.

A class is a tag when its probability reaches a share of the *best word's*, background words included: all of them
compete (:meth:`~clipseed.clip.text.TextBank.competing`). Softmax makes one word win, so the classes of an image with
four objects score about a quarter each; an absolute threshold asks them for too much, and depends on how many words
there are. Measured against the best *class* alone, every image gets a tag, even one that shows nothing but sand.

The feature is the model's own (class token for CLIP), the only one that CLIP's training compares with text. On the toy
set the best patches do half a point better (F1 98.6 against 98.1), because its training has a loss for them, and worse
when half of the classes are not in the vocabulary (95.4 against 97.8): ``python -m tools.toy.measure_tags``.
"""

from __future__ import annotations

from torch import Tensor


def tag(scores: Tensor, classes: int, threshold: float, top_k: int | None = None) -> list[tuple[int, ...]]:
    """Class indices of each image, the most probable first.

    Args:
        scores: Probabilities ``(B, C + M)``, classes first, as of :meth:`~clipseed.clip.text.TextBank.probabilities`;
            rows need not sum to 1. NaN is never a tag.
        classes: Number of classes C; the rest are background words.
        threshold: A class is a tag when its score is at least this share of the row's largest, in (0, 1].
        top_k: Keep at most so many tags.

    Returns:
        One tuple per image; empty where a background word beats all classes by more than the threshold.

    Raises:
        ValueError: no classes, or a threshold or number outside its range.
    """
    if not 0 < classes <= scores.shape[1] or not 0 < threshold <= 1 or (top_k is not None and top_k < 1):
        raise ValueError(f"{classes} classes of {scores.shape[1]} words, threshold {threshold}, top-k {top_k}")
    rows = scores.float().cpu()
    enough = rows[:, :classes] >= threshold * rows.amax(dim=1, keepdim=True)
    order = rows[:, :classes].argsort(dim=1, descending=True, stable=True)
    return [
        tuple(k for k in ranked if kept[k])[:top_k]
        for ranked, kept in zip(order.tolist(), enough.tolist(), strict=True)
    ]
