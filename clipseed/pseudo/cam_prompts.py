"""Where to ask SAM for a class: points and boxes from class activation maps.

A light alternative to segmenting everything: one query per class (points) or per region (boxes). The points are those
of S2C (CVPR 2024); :mod:`clipseed.pseudo.prompted` makes labels of the answers.

Shapes: K classes of an image, Q queries, P points of a query; images are ``(H, W)``. Coordinates are x, y in pixels
of the image, the middle of the first pixel being 0, 0; scaling them to SAM's input is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipseed.pseudo.background import Scores
from clipseed.pseudo.pixels import finite, resize_maps
from clipseed.refine.boxes import boxes_of

PEAK_SHARE = 0.5
PEAK_DISTANCE = 20
MOST_POINTS = 16
BOX_SHARE = 0.4

POSITIVE, PADDING = 1, -1
"""Point labels as SAM's prompt encoder has them; padded points say nothing."""


@dataclass(frozen=True)
class PointPrompts:
    """One query per class whose map is positive somewhere, ready for one pass of SAM's decoder.

    Attributes:
        row: ``(Q,)`` int64: row of the maps that each query asks for. Classes without evidence have none.
        points: ``(Q, P, 2)`` float32, the strongest first; 0, 0 where padded.
        labels: ``(Q, P)`` int64: 1, or -1 where padded.
    """

    row: npt.NDArray[np.int64]
    points: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class BoxPrompts:
    """One query per region of a class's map, the regions of a class one after the other, the strongest first.

    Attributes:
        row: ``(Q,)`` int64: row of the maps that each query asks for.
        boxes: ``(Q, 4)`` float32: x and y of the upper left and of the lower right corner, outer edges of pixels.
    """

    row: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]


def peaks(
    cam: Scores, share: float = PEAK_SHARE, distance: int = PEAK_DISTANCE, most: int = MOST_POINTS
) -> list[tuple[int, int]]:
    """Row and column of the global maximum of a map ``(H, W)`` and of its local ones, the strongest first.

    A local maximum exceeds ``share`` of the global one and is the largest value closer than ``distance`` pixels (in
    rows and in columns). A plateau counts as one, at the pixel nearest its middle. Maxima at the border count.

    Returns:
        At most ``most``; none for a map without a positive value. NaN and infinities count as 0.
    """
    import cv2

    cam = finite(cam)
    top = float(cam.max(initial=0))
    if top <= 0:
        return []
    side = max(2 * distance - 1, 3)
    around = cv2.dilate(cam, np.ones((side, side), np.uint8), borderType=cv2.BORDER_REPLICATE)
    candidates = (cam >= around) & (cam > share * top)
    candidates |= cam == top
    count, plateaus, _, middles = cv2.connectedComponentsWithStats(candidates.astype(np.uint8), connectivity=8)
    rows, columns = np.nonzero(plateaus)
    member = plateaus[rows, columns]
    away = np.hypot(rows - middles[member, 1], columns - middles[member, 0])
    nearest = np.lexsort((columns, rows, away, member))
    firsts = nearest[np.searchsorted(member[nearest], np.arange(1, count))]
    strongest = firsts[np.lexsort((columns[firsts], rows[firsts], -cam[rows[firsts], columns[firsts]]))]
    found: list[tuple[int, int]] = []
    for row, column in zip(rows[strongest].tolist(), columns[strongest].tolist(), strict=True):
        if all(max(abs(row - y), abs(column - x)) >= distance for y, x in found):
            found.append((row, column))
    return found[:most]


def point_prompts(
    cams: Scores,
    size: tuple[int, int],
    share: float = PEAK_SHARE,
    distance: int = PEAK_DISTANCE,
    most: int = MOST_POINTS,
) -> PointPrompts:
    """The peaks of each class's map as joint positive points of one query; see :func:`peaks`.

    Args:
        cams: ``(K, h, w)``; resized to the image's size first.
        size: Its height and width.
        share: Of the map's maximum that local maxima exceed.
        distance: In pixels of the image.
        most: Points of one query.
    """
    found = [peaks(cam, share, distance, most) for cam in resize_maps(finite(cams), size)]
    row = np.array([index for index, places in enumerate(found) if places], np.int64)
    longest = max((len(places) for places in found), default=0)
    points = np.zeros((len(row), longest, 2), np.float32)
    labels = np.full((len(row), longest), PADDING, np.int64)
    for query, index in enumerate(row):
        places = np.array(found[index], np.float32)
        points[query, : len(places)] = places[:, ::-1]
        labels[query, : len(places)] = POSITIVE
    return PointPrompts(row, points, labels)


def box_prompts(cams: Scores, size: tuple[int, int], share: float = BOX_SHARE, smallest: float = 0.0) -> BoxPrompts:
    """Boxes of the regions where each class's map exceeds a share of its maximum.

    Args:
        cams: ``(K, h, w)``; resized to the image's size first.
        size: Its height and width.
        share: Of the map's maximum, compared in 8 bits as in CAA.
        smallest: Boxes with less than this share of the image's area are left out, but for a class's strongest.
    """
    height, width = size
    rows, boxes = [], []
    for index, cam in enumerate(np.maximum(resize_maps(finite(cams), size), 0)):
        top = float(cam.max(initial=0))
        if top <= 0:
            continue
        found = boxes_of(cam / top, share)
        strength = [float(cam[y0:y1, x0:x1].max()) for x0, y0, x1, y1 in found]
        ranked = sorted(range(len(found)), key=lambda k: (-strength[k], found[k]))
        for position, k in enumerate(ranked):
            left, upper, right, lower = found[k]
            if position == 0 or (right - left) * (lower - upper) >= smallest * height * width:
                rows.append(index)
                boxes.append(found[k])
    return BoxPrompts(np.array(rows, np.int64), np.array(boxes, np.float32).reshape(-1, 4))
