"""Sharpness of a prompt: how unevenly CLIP's scores fall on the classes that one image shows (CLIP-ES, Eq. 9).

    sharpness(prompt) = mean over images i of Var(s_i1 … s_ik) / Mean(s_i1 … s_ik)

over the images with at least two labels; s_ij is the softmax score of the j-th *present* class. Lower is better: a
prompt under which one class takes all the score hides the others. CLIP-ES publishes no code for it; three choices are
ours. The variance is the population's. The mean over images stands for the paper's sum, which ranks equally and does
not grow with the number of images. The softmax runs over all classes of the vocabulary, background words left out.

The measure is linear in the scores, so a prompt that CLIP does not understand, whose scores are all small, looks sharp
in the best sense. :attr:`Sharpness.present` tells such prompts: the score that the present classes have together.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sharpness:
    """Result of one prompt.

    Attributes:
        value: Mean of variance over mean, from 0 (present classes score alike) to 0.5 with two classes, to
            ``(k - 1) / k`` with k; lower is better.
        present: Mean over images of what the present classes score together, in [0, 1].
        images: Number of images.
    """

    value: float
    present: float
    images: int


def image_sharpness(log_probability: Tensor, present: Tensor) -> Tensor:
    """Variance over mean of every image's present scores, ``(N,)`` (the summand of Eq. 9).

    Both are homogeneous in the scores, so they are taken of scores divided by the image's largest: that one is 1, the
    mean at least 1/k, and scores that single precision cannot hold give 0 instead of 0/0.

    Args:
        log_probability: ``(N, C)`` as of :meth:`~clipseed.clip.text.TextBank.log_probabilities`.
        present: ``(N, C)``, true for the classes that an image shows.

    Raises:
        ValueError: an image with fewer than two present classes.
    """
    count = present.sum(dim=-1)
    if (count < 2).any():
        raise ValueError("sharpness compares the classes of one image; every image must show at least two")
    shown = log_probability.masked_fill(~present, float("-inf"))
    largest = shown.amax(dim=-1, keepdim=True)
    relative = (shown - largest).exp()
    mean = relative.sum(dim=-1) / count
    deviation = (relative - mean[:, None]).masked_fill(~present, 0.0)
    variance = deviation.square().sum(dim=-1) / count
    terms: Tensor = largest[:, 0].exp() * variance / mean
    return terms


def sharpness(log_probability: Tensor, present: Tensor) -> Sharpness:
    """Sharpness over images (CLIP-ES, Eq. 9); arguments and errors as of :func:`image_sharpness`.

    Raises:
        ValueError: no image at all, too.
    """
    if not len(log_probability):
        raise ValueError("sharpness needs at least one image")
    terms = image_sharpness(log_probability, present)
    mass = log_probability.exp().masked_fill(~present, 0.0).sum(dim=-1)
    return Sharpness(float(terms.mean()), float(mass.mean()), len(terms))
