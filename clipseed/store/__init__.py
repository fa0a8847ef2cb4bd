"""CAMs and masks on disk."""

from clipseed.store.cam_records import Cam
from clipseed.store.cams import CamSet, open_cams

__all__ = ["Cam", "CamSet", "open_cams"]
