"""``clipseed.FrozenClip``: the model, with class activation maps of images in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

import numpy as np

from clipseed.api.images import Classes, Request, requested
from clipseed.api.results import ImageCam
from clipseed.clip import model
from clipseed.data.dataset import DatasetOptions
from clipseed.data.images import AnyImage
from clipseed.defaults import CAM_MAX_SIDE, CamMethod
from clipseed.jobs.cam import CamOptions, CamRecipe, CamWork
from clipseed.runtime.work import results_of
from clipseed.store.cam_records import Cam


class FrozenClip(model.FrozenClip):
    """A CLIP model that is never trained; :meth:`load` loads it, :meth:`cams` asks it where classes are.

    Everything else that it can do is documented at :class:`clipseed.clip.model.FrozenClip`.
    """

    @overload
    def cams(  # type: ignore[overload-overlap]  # a path is a sequence of strings, too
        self, images: AnyImage, labels: Sequence[str], *, classes: Classes | None = None,
        background: str | Sequence[str] | None = None, method: CamMethod = "softmax-gradcam",
        refine: Literal["caa"] | None = None, max_side: int = CAM_MAX_SIDE,
    ) -> ImageCam: ...  # fmt: skip

    @overload
    def cams(
        self, images: Sequence[AnyImage], labels: Sequence[str] | Sequence[Sequence[str]], *,
        classes: Classes | None = None, background: str | Sequence[str] | None = None,
        method: CamMethod = "softmax-gradcam", refine: Literal["caa"] | None = None, max_side: int = CAM_MAX_SIDE,
    ) -> list[ImageCam]: ...  # fmt: skip

    def cams(
        self, images: AnyImage | Sequence[AnyImage], labels: Sequence[str] | Sequence[Sequence[str]], *,
        classes: Classes | None = None, background: str | Sequence[str] | None = None,
        method: CamMethod = "softmax-gradcam", refine: Literal["caa"] | None = None, max_side: int = CAM_MAX_SIDE,
    ) -> ImageCam | list[ImageCam]:  # fmt: skip
        """Class activation maps of one image, or of a list of them, as ``clipseed cam`` makes them.

        Args:
            images: Pillow images, paths, or arrays ``(H, W, 3)`` uint8.
            labels: Class names that the image shows; of a list of images one list of names for each, or one for all.
            classes: The whole class list, where others may be in other images: ``voc``, ``coco``, a file, or names.
            background: Words that compete with the classes; default: general ones, or the class list's.
            method: As of ``clipseed cam --method``.
            refine: ``caa`` spreads the maps along attention.
            max_side: Longer images are shrunk to it first; 0: never.

        Raises:
            ImageError: an image cannot be read.
            InputError: a label is in no class list.
            UsageError: labels do not belong to the images.
        """
        request = requested(images, labels, classes, background)
        options = CamOptions(DatasetOptions("folder"), Path(), method=method, refine=refine, max_side=max_side)
        work = CamWork(CamRecipe(options, request.vocabulary, request.reader), self)
        found = [seen(request, cam) for cam in results_of(work, request.samples) if isinstance(cam, Cam)]
        return found[0] if request.single else found


def seen(request: Request, cam: Cam) -> ImageCam:
    """CAMs together with their image and their names."""
    names = tuple(request.vocabulary.class_names[k] for k in cam.classes)
    image = np.asarray(request.reader(request.samples[int(cam.id)]))
    return ImageCam(**vars(cam), names=names, image=image)
