"""The formats that label masks and CAMs are exported to, by name."""

from __future__ import annotations

from collections.abc import Mapping

from clipseed.defaults import ExportFormat
from clipseed.formats.coco import CocoWriter
from clipseed.formats.cvat import CvatWriter
from clipseed.formats.fiftyone import FiftyoneWriter
from clipseed.formats.hugging_face import HuggingFaceWriter
from clipseed.formats.irn import IrnWriter
from clipseed.formats.label_studio import LabelStudioWriter
from clipseed.formats.lightly import LightlyWriter
from clipseed.formats.mmseg import MmsegWriter
from clipseed.formats.panoptic import PanopticWriter
from clipseed.formats.ultralytics import UltralyticsWriter, YoloPolygonsWriter
from clipseed.formats.voc import VocWriter
from clipseed.formats.writing import Writer

WRITERS: Mapping[ExportFormat, type[Writer]] = {
    "voc": VocWriter,
    "mmseg": MmsegWriter,
    "ultralytics": UltralyticsWriter,
    "yolo-polygons": YoloPolygonsWriter,
    "hf": HuggingFaceWriter,
    "fiftyone": FiftyoneWriter,
    "coco": CocoWriter,
    "coco-panoptic": PanopticWriter,
    "labelstudio": LabelStudioWriter,
    "cvat": CvatWriter,
    "irn": IrnWriter,
    "lightly": LightlyWriter,
}
