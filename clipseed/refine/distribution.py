"""Class-distribution affinity: patches are kin when they resemble all classes alike (CD-CLIP, CVPR 2026, "CDA").

Attention tells which patches look at each other, and often misses parts of one object. The distribution over *all*
classes of a vocabulary, present or not, is a finer signature of a patch than its best class. The paper itself was not
at hand; this follows its summaries (``A_d = softmax((1 - JS) / tau) A_MHSA``, maps spread by a power of ``A_d``), and
the temperatures are measured here, not published.

mIoU on the toy's 300 held-out scenes (best threshold; maps times CAA's boxes, power 2; similarities of ``svc``):

| refined with | softmax-GradCAM | maskclip | svc |
| --- | --- | --- | --- |
| nothing | 61.4 | 59.6 | 70.4 |
| CAA | 74.6 | 76.0 | 75.2 |
| the attention as it is | 74.4 | 76.3 | 74.4 |
| temperature 0.1 | 62.1 | 63.1 | 61.5 |
| 0.03 | 71.4 | 72.6 | 71.2 |
| 0.01 | 73.9 | 75.5 | 73.6 |
| 0.003 | 74.5 | 76.3 | 74.1 |
| 0.01, then :func:`~clipseed.refine.affinity.balance` | 75.0 | 76.3 | 74.9 |

The toy's attention was trained to follow objects, so there is nothing to mend: the gain that CD-CLIP reports over
attention cannot be seen here. 0.01 is the largest of these temperatures, hence the one where distributions speak most,
that costs less than 1 point against the attention as it is. There, similarities of ``maskclip`` score 1.5 to 2.2 less,
and a class temperature of 1 ends at 44 whatever the maps.

Shapes: B images, n patches, C texts (classes and background words).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipseed.defaults import PATCH_TEMPERATURE
from clipseed.minmax import minmax

CLASS_TEMPERATURE = 0.1


def class_distributions(scores: Tensor, temperature: float = CLASS_TEMPERATURE) -> Tensor:
    """Class distribution of every patch ``(…, n, C)`` from its cosine similarities to all texts ``(…, n, C)``.

    Similarities are brought to [0, 1] over each whole image first, because CLIP's all lie close together; over the
    image and not patch by patch, so that patches that resemble nothing in particular stay undecided. At
    ``temperature`` 1 all distributions are nearly uniform and their divergences below 0.02 bits, whatever is shown.

    Args:
        scores: Cosines, or anything increasing; a constant image gives uniform distributions.
        temperature: Of the softmax over texts, after scaling to [0, 1].
    """
    return (minmax(scores.float()) / temperature).softmax(dim=-1)


def jensen_shannon(p: Tensor, q: Tensor | None = None) -> Tensor:
    """Jensen-Shannon divergence in bits between all pairs of rows: ``(…, n, C)``, ``(…, m, C)`` to ``(…, n, m)``.

    0 for equal distributions, 1 for distributions without a common class; ``H((p + q) / 2) - (H(p) + H(q)) / 2``.
    Summed class by class, so that nothing of size ``n m C`` is ever held; float32, exact to about 1e-6.

    Args:
        p: Rows are distributions; zeros are allowed.
        q: Default ``p`` itself.
    """
    p = p.float()
    q = p if q is None else q.float()
    entropy_p, entropy_q = (torch.special.entr(x).sum(dim=-1) for x in (p, q))
    total: Tensor = (entropy_p.unsqueeze(-1) + entropy_q.unsqueeze(-2)).mul_(-0.5)
    tiny = torch.finfo(torch.float32).tiny
    for left, right in zip(p.unbind(-1), q.unbind(-1), strict=True):
        mixed = (left.unsqueeze(-1) + right.unsqueeze(-2)).mul_(0.5)
        total.sub_(mixed.clamp_min(tiny).log_().mul_(mixed))
    return total.div_(math.log(2)).clamp_(0, 1)


def distribution_affinity(
    scores: Tensor,
    attention: Tensor,
    temperature: float = PATCH_TEMPERATURE,
    class_temperature: float = CLASS_TEMPERATURE,
) -> Tensor:
    """Affinity ``(…, n, n)`` from attention ``(…, n, n)``: ``softmax_j((1 - JS(p_i, p_j)) / temperature) A``.

    A patch takes over what the patches that resemble it attend to. Use it like CAA's: ``spread(affinity, maps *
    boxes)``, better with ``balance(affinity)``. Rows are means of the attention's rows, so they sum to at most 1.

    Args:
        scores: ``(…, n, C)`` cosine similarities of the patches to the texts of all classes and background words
            (:func:`clipseed.cam.dense.similarities`).
        attention: ``(…, n, n)`` attention averaged over heads and blocks, rows are queries.
        temperature: Of the softmax over patches. The smaller, the more a patch keeps to itself, and the affinity tends
            to the attention.
        class_temperature: See :func:`class_distributions`.
    """
    likeness = 1 - jensen_shannon(class_distributions(scores, class_temperature))
    return (likeness / temperature).softmax(dim=-1) @ attention.float()
