"""The dense CRF of the C++ library pydensecrf, as second engine and as the torch engine's oracle."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipseed.refine.crf import CrfParameters


def native_crf(
    unary: npt.NDArray[np.float32], image: npt.NDArray[np.uint8], parameters: CrfParameters
) -> npt.NDArray[np.float32]:
    """Posterior ``(M, H, W)`` for negative log probabilities ``(M, H, W)`` and an image ``(H, W, 3)``.

    The library crashes its process on impossible parameters and on NaN, so both are refused first.

    Raises:
        ValueError: parameters, shapes or values are impossible.
        ImportError: pydensecrf is not installed.
    """
    import pydensecrf.densecrf as library

    parameters.check()
    labels, height, width = unary.shape
    if image.shape != (height, width, 3) or image.dtype != np.uint8 or not np.isfinite(unary).all():
        raise ValueError(f"an image {image.shape} does not belong to finite scores {unary.shape}")
    field = library.DenseCRF2D(width, height, labels)
    field.setUnaryEnergy(np.ascontiguousarray(unary.reshape(labels, -1), np.float32))
    if parameters.smooth_weight:
        field.addPairwiseGaussian(sxy=parameters.smooth_xy, compat=parameters.smooth_weight)
    if parameters.colour_weight:
        field.addPairwiseBilateral(
            sxy=parameters.colour_xy,
            srgb=parameters.colour_rgb,
            rgbim=np.ascontiguousarray(image),
            compat=parameters.colour_weight,
        )
    posterior: npt.NDArray[np.float32] = np.array(field.inference(parameters.iterations), np.float32)
    return posterior.reshape(labels, height, width)
