"""The choices and the default values that the library and the command line share, each stated once.

Imports nothing, so that ``--help`` knows them without loading torch or numpy.
"""

from __future__ import annotations

from typing import Literal

# Choices
DatasetName = Literal["voc", "coco", "folder", "toy"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
EngineName = Literal["local", "ray"]
EmptyPolicy = Literal["background", "ignore", "skip"]
"""What becomes of the label mask of an image in which some label got no pixel."""

ReproducedSystem = Literal["clip-es", "weclip", "fma-wsss"]
ReproduceDataset = Literal["voc", "coco", "toy"]
LabelRecipe = Literal["clip-es", "svc", "segments"]
"""What ``clipseed label`` does with an image (:data:`clipseed.jobs.label.RECIPES`)."""
CamMethod = Literal["softmax-gradcam", "gradcam", "maskclip", "svc", "naclip"]
CrfSolver = Literal["torch", "pydensecrf"]
CrfPreset = Literal["clip-es", "irn", "weclip"]
RfmFilter = Literal["signed", "abs", "none"]
"""Which blocks' attention WeCLIP's refinement keeps."""
PixelStatistics = Literal["clip", "imagenet"]
"""Mean and deviation that images are normalised with: the model's own, or ImageNet's."""

PromptTask = Literal["classification", "segmentation"]
"""What prompts are learned from: image labels, or coarse pseudo-labels."""
NamePosition = Literal["end", "front", "middle"]
"""Where a class name stands beside its learned context."""
PositiveClasses = Literal["crop", "image"]
"""Of which classes a crop has maps to learn from: those its mask shows, or the image's labels."""
ContrastReduction = Literal["pairs", "images"]
ActivationReduction = Literal["pixels", "sides", "pairs"]
CaaPreset = Literal["fma-voc-coarse", "fma-voc-fine", "fma-coco-coarse"]
HeadName = Literal["bridge", "fpn", "lseg", "denseclip"]
BridgeDirection = Literal["both", "v2t", "t2v", "none"]
"""Which way the bridge is open: vision to text, text to vision."""
TokenMixing = Literal["attn", "none"]
BridgeLoss = Literal["ce", "collision", "soft-ce"]
AbsentPolicy = Literal["ignore", "mask", "keep"]
"""What becomes, in a loss, of classes that an image is known not to show."""

SamModel = Literal["auto", "vit_b", "vit_l", "vit_h"]
SamPreset = Literal["fma", "stock"]
SamPrompt = Literal["points", "boxes"]
SegmentFormat = Literal["auto", "coco-panoptic", "coco-instances", "instance-maps", "mask-folders", "sa-1b"]

SeedMethod = Literal["fma", "prompted", "vote", "pixel"]
SeedPreset = Literal["voc-coarse", "voc-fine", "coco-coarse", "coco-fine"]
UncoveredPolicy = Literal["background", "ignore", "cam"]
"""What pixels become that no segment covers."""

ExportFormat = Literal[
    "voc", "mmseg", "ultralytics", "yolo-polygons", "hf", "fiftyone", "coco", "coco-panoptic", "labelstudio", "cvat",
    "irn", "lightly",
]  # fmt: skip
ImagePlacement = Literal["copy", "link", "reference"]
"""What an export does with the images: copies, links, or only their names."""
Orientation = Literal["stored", "exif"]
"""Masks lie on the pixels as the image file stores them, or as viewers turn them."""
IgnoreExport = Literal["keep", "background", "drop"]
"""What 255 becomes in another format: what that ignores, background, or nothing that is annotated."""

PredIgnore = Literal["error", "background", "exclude"]
"""What a predicted 255 counts as."""

# Default values
MODEL = "ViT-B-16"
WEIGHTS = "openai"
MAX_PIXELS = 80_000_000
"""Larger images are refused from their header."""
CAM_MAX_SIDE = 640
SAM_MAX_SIDE = 1024
"""What SAM's encoder sees of an image; more pixels help the crops only."""
TAG_THRESHOLD = 0.25
BOX_THRESHOLD = 0.4
COCO_BOX_THRESHOLD = 0.7
CAA_LAYERS = 8
SINKHORN_ROUNDS = 3
SPREAD_POWER = 2
PATCH_TEMPERATURE = 0.01
PAR_ITERATIONS = 20
PAR_DILATIONS = (1, 2, 4, 8, 12, 24)
PAR_SHARPNESS = 0.3
"""Divides colour and position differences (after their standard deviation); smaller follows edges more closely."""
PAR_POSITION_WEIGHT = 0.01
CRF_ALPHA = 1.0
LABEL_THRESHOLD = 0.4
"""Background score of ``clipseed label --recipe svc``."""

WECLIP_STEPS = 30_000
WECLIP_COCO_STEPS = 80_000
WECLIP_TOY_STEPS = 1000
WECLIP_BATCH = 4
WECLIP_LR = 2e-3
"""Of the decoder; the released configuration says a tenth of it, and its code multiplies by ten."""
WECLIP_WEIGHT_DECAY = 1e-2
WECLIP_WARM_UP = 50
WECLIP_CROP = 320
WECLIP_WIDTH = 256
WECLIP_BLOCKS = 3
WECLIP_HEADS = 8
WECLIP_DROPOUT = 0.1
WECLIP_RFM_LAYERS = 6
WECLIP_COCO_RFM_LAYERS = 10
WECLIP_RADIUS = 8
"""Patches to each side within which the affinity is supervised."""
WECLIP_AFFINITY_WEIGHT = 0.1
PROMPT_LENGTH = 16
PROMPT_LR = 1e-3
PROMPT_MOMENTUM = 0.9
PROMPT_WEIGHT_DECAY = 5e-4
PROMPT_WARM_UP = 500
PROMPT_WARM_UP_LR = 1e-5
PROMPT_CROP = 224
PROMPT_BATCH = 16

BRIDGE_STEPS = 20_000
BRIDGE_TOY_STEPS = 1000
BRIDGE_BATCH = 16
BRIDGE_LR = 1e-4
BRIDGE_LEAST_LR = 1e-6
BRIDGE_WEIGHT_DECAY = 1e-4
BRIDGE_WARM_UP = 1500
BRIDGE_CROP = 384
BRIDGE_BLOCKS = 3
BRIDGE_WIDTH = 256
BRIDGE_HEADS = 4
BRIDGE_SCORE_WEIGHT = 0.4
"""Of the loss of scores by text, DenseCLIP's."""
FPN_WIDTH = 256
FPN_DROPOUT = 0.1

PREDICT_MAX_SIDE = 512
CONFIDENCE = 0.95
"""Least confidence of a pixel that counts, CLIP-ES's mu, the same for VOC and COCO."""

PIXEL_ALPHA = 2.0
"""Exponent of the background where pixels decide for themselves."""
REPORT_SHOWN = 6
REPORT_TITLE = "clipseed report"
