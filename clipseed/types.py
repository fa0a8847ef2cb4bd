"""Values that every room shares; no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IGNORE = 255
"""Value of a label mask where nothing is known: no loss, no score."""
NO_CLASS = -1
"""Class index of a segment that was not asked for by class."""
LabelMask = npt.NDArray[np.uint8]
"""``(H, W)``: 0 background, class index + 1, :data:`IGNORE`."""
