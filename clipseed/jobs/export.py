"""``clipseed export``: label masks or CAMs, with their images, in the formats that other tools read."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipseed.data.dataset import ImageFinder, image_finder, relocated
from clipseed.data.images import to_rgb
from clipseed.data.orientation import ImageHeader, read_header, turned, turned_back
from clipseed.data.paths import is_folder
from clipseed.data.vocabulary import load_vocabulary, parse_vocabulary
from clipseed.defaults import ExportFormat, IgnoreExport, ImagePlacement, Orientation
from clipseed.errors import ImageError, InputError, UsageError
from clipseed.evaluate.confusion import check_labels
from clipseed.evaluate.sources import MaskSource, is_annotated, open_annotated
from clipseed.formats.label_studio import LOCAL_FILES
from clipseed.formats.writers import WRITERS
from clipseed.formats.writing import IGNORE_NAME, ClassTable, Encoded, Item, TextFile, Writer
from clipseed.pseudo.rules import Rules, label_mask, thresholding
from clipseed.runtime.interrupt import interruptible
from clipseed.runtime.threads import ahead
from clipseed.store.cams import CamSet
from clipseed.store.export_folder import ExportFolder
from clipseed.store.files import replacing
from clipseed.store.label_mask_folder import LabelMaskFolder
from clipseed.store.legend import LEGEND, legend
from clipseed.store.manifest import Manifest
from clipseed.store.open import open_prediction
from clipseed.types import IGNORE, LabelMask
from clipseed.wording import counted

_JPEG = (".jpg", ".jpeg")
_JPEG_QUALITY = 95
Start = Callable[[int], Callable[[int], None]]
"""Called with the number of images; returns the progress callback."""


@dataclass(frozen=True)
class ExportOptions:
    """Everything ``clipseed export`` can be told.

    Attributes:
        source: Label masks, or CAMs; or masks of an annotation tool, which need ``classes``.
        placement: What becomes of the images; ``None``: what the format is best served with.
        image_folder, root: Where the images, or their data set, are now.
        orient: Whether masks lie on the stored pixels or as viewers turn the image; ``None``: as the format needs it.
        ignore: What 255 becomes; ``None``: what the format can say.
        background_class: What 0 is called; formats of regions then annotate it.
        classes: Class list of masks that do not bring one.
        threshold, alpha: How CAMs become masks.
        parquet: ``hf``: also write Parquet files.
        image_url: ``labelstudio``: what stands before an image's path.
    """

    source: Path
    out: Path
    format: ExportFormat
    placement: ImagePlacement | None = None
    image_folder: Path | None = None
    root: Path | None = None
    orient: Orientation | None = None
    ignore: IgnoreExport | None = None
    background_class: str | None = None
    classes: str | None = None
    threshold: float | None = None
    alpha: float | None = None
    parquet: bool = False
    image_url: str = LOCAL_FILES
    overwrite: bool = False


@dataclass
class ExportReport:
    """What was written.

    Attributes:
        images: In the source.
        written: Files that were not there like this before.
        skipped: Ids and reasons; ``skipped_file`` lists them.
        notes: What should be known about the result.
    """

    out: Path
    format: ExportFormat
    images: int
    written: int
    skipped: list[tuple[str, str]]
    skipped_file: Path | None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "out": str(self.out), "format": self.format, "images": self.images,
            "exported": self.images - len(self.skipped), "written": self.written, "notes": self.notes,
            "skipped": [{"id": key, "reason": why} for key, why in self.skipped],
        }  # fmt: skip


def run_export(options: ExportOptions, start: Start | None = None) -> ExportReport:
    """Write an export; running it again gives the same folder, whatever stopped it before.

    Raises:
        UsageError: an option is missing or impossible, or the folder holds other things.
        InputError: nothing to export, classes are not known, or a mask has a value that is no class.
        StoreError: it cannot be written, or the folder was exported with other settings.
    """
    kind = _checked(options)
    if is_annotated(options.source):
        if options.classes is None:
            raise UsageError(f"{options.source}: say which classes its labels are, --classes voc, coco, toy or FILE")
        annotated = open_annotated(options.source, load_vocabulary(options.classes))
        _check_masks(options, kind)
        return _export(options, kind, annotated, {"options": {"exif": True}}, start)
    prediction = open_prediction(options.source)
    if isinstance(prediction, LabelMaskFolder):
        _check_masks(options, kind)
        return _export(options, kind, prediction, prediction.manifest or {}, start)
    with prediction as cams:
        return _export(options, kind, cams, cams.manifest, start)


def _check_masks(options: ExportOptions, kind: type[Writer]) -> None:
    """Refuse what is asked of masks and makes sense for CAMs only."""
    if kind.cams:
        raise UsageError(f"--format {options.format} holds CAMs; {options.source} holds masks")
    if options.threshold is not None or options.alpha is not None:
        raise UsageError(f"--threshold and --alpha apply to CAMs; {options.source} holds finished masks")


def _checked(options: ExportOptions) -> type[Writer]:
    """The format, where it allows all that is asked of it."""
    if options.format not in WRITERS:
        raise UsageError(f"--format {options.format}: choose one of {', '.join(WRITERS)}")
    kind = WRITERS[options.format]
    if options.placement is not None and options.placement not in kind.placements:
        raise UsageError(
            f"--format {options.format} takes --images {' or '.join(kind.placements)}, not {options.placement}"
        )
    if options.orient == "stored" and kind.turned:
        raise UsageError(
            f"--format {options.format}: its readers turn images as their EXIF says, and masks must be turned with "
            "them (--orient exif)"
        )
    if options.ignore is not None and options.ignore not in kind.ignores:
        why = "every pixel of its masks has a value" if options.ignore == "drop" else "it has no word for it"
        raise UsageError(f"--format {options.format}: --ignore {options.ignore}: {why}; {' or '.join(kind.ignores)}")
    if options.parquet and options.format != "hf":
        raise UsageError("--parquet belongs to --format hf")
    if options.out.resolve() == options.source.resolve():
        raise UsageError(f"--out {options.out}: is what is exported; choose another folder")
    if options.parquet:
        try:
            import datasets  # noqa: F401
        except ImportError as error:
            raise UsageError("--parquet needs the package datasets; pip install datasets") from error
    return kind


def _rules(options: ExportOptions, kind: type[Writer], manifest: Manifest) -> Rules | None:
    """How CAMs become masks; ``None`` for formats of CAMs."""
    if kind.cams:
        return None
    if (options.threshold is None) == (options.alpha is None):
        raise UsageError(
            f"{options.source} holds CAMs: say what the background scores with --threshold or --alpha, or export masks"
        )
    released = bool(manifest.get("options", {}).get("paper"))
    try:
        return thresholding(threshold=options.threshold, alpha=options.alpha, released=released)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def _table(options: ExportOptions, kind: type[Writer], manifest: Manifest) -> ClassTable:
    if options.classes is not None:
        vocabulary = load_vocabulary(options.classes)
    elif "vocabulary" in manifest:
        vocabulary = parse_vocabulary(manifest["vocabulary"], str(options.source), "classes")
    else:
        raise UsageError(f"{options.source}: say which classes the masks hold, --classes voc, coco, toy or FILE")
    table = ClassTable(
        vocabulary.class_names, options.background_class or kind.background, _ignore(options, kind) == "keep"
    )
    taken = {name.strip().lower() for name in table.names}
    if table.ignore and IGNORE_NAME in taken:
        raise UsageError(f"a class is called {IGNORE_NAME!r}, as what is ignored; give --ignore background or drop")
    if table.background is not None and table.background.strip().lower() in taken | {IGNORE_NAME}:
        raise UsageError(f"--background-class: a class is called {table.background!r} already; give another name")
    return table


def _ignore(options: ExportOptions, kind: type[Writer]) -> IgnoreExport:
    return options.ignore or kind.ignores[0]


def _export(
    options: ExportOptions, kind: type[Writer], prediction: CamSet | MaskSource, manifest: Manifest,
    start: Start | None,
) -> ExportReport:  # fmt: skip
    cams = isinstance(prediction, CamSet)
    ids = list(prediction) if isinstance(prediction, CamSet) else sorted(prediction.ids())
    if not ids:
        raise InputError(f"{options.source}: neither CAMs nor PNG masks in this folder")
    source = _Source(prediction, _rules(options, kind, manifest) if cams else None, manifest)
    table = _table(options, kind, manifest)
    finder = None if kind.cams else _finder(options, manifest)
    drawn = finder is not None and finder.folder is None
    placement = options.placement or ("copy" if drawn else kind.placements[0])
    files = {key: None if finder is None else finder.path(key) for key in ids}
    suffix, jpeg = (".png", False) if drawn and kind.jpeg == "mixed" else _suffix(kind, files, placement)
    root = str(finder.folder.resolve()) if finder and finder.folder and placement == "reference" else None
    writer = kind(table, root, suffix, options.image_url)
    orient = options.orient or ("exif" if kind.turned else "stored")
    settings = {
        "format": options.format, "images": placement, "orient": orient, "ignore": _ignore(options, kind),
        "background_class": table.background, "classes": list(table.names), "threshold": options.threshold,
        "alpha": options.alpha, "image_url": options.image_url if kind.addresses else None,
    }  # fmt: skip
    texts = [*writer.texts()]
    if not kind.cams:
        texts.append(TextFile(LEGEND, (legend(table.names, table.with_background[0]),)))
    maker = _Maker(source, writer, finder, files, placement, orient, jpeg, _ignore(options, kind))
    skipped: list[tuple[str, str]] = []
    advance = start(len(ids)) if start else (lambda count: None)
    with ExportFolder(options.out, settings, texts, overwrite=options.overwrite) as folder:
        hint = f"interrupted; run the same command again to complete {options.out}"
        with interruptible(lambda: hint):
            for made in ahead(maker, enumerate(ids, 1)):
                if made.problem is not None:
                    skipped.append((made.id, made.problem))
                else:
                    for name, content in made.encoded.files.items():
                        folder.put(name, content)
                    for name, origin in made.images.items():
                        if isinstance(origin, bytes):
                            folder.put(name, origin)
                        else:
                            folder.place(name, origin, placement)
                    folder.add(made.encoded.lines)
                advance(1)
            if len(skipped) == len(ids):
                raise InputError(
                    f"none of the {len(ids)} images could be exported; the first, {skipped[0][0]}: {skipped[0][1]}"
                )
            parquet = folder.reserve("parquet/data.parquet") if options.parquet else None
            listed = folder.finish(skipped)
            if parquet is not None:
                _write_parquet(options.out, parquet)
    report = ExportReport(options.out, options.format, len(ids), folder.written, skipped, listed)
    report.notes += _notes(options, kind, maker)
    return report


def _finder(options: ExportOptions, manifest: Manifest) -> ImageFinder:
    if options.image_folder is not None and options.root is not None:
        raise UsageError("--image-folder and --root: give one of them")
    if options.image_folder is not None and not is_folder(options.image_folder):
        raise UsageError(f"--image-folder {options.image_folder}: no such folder")
    moved = relocated(manifest, options.image_folder, options.root)
    dataset = moved.get("dataset")
    known = isinstance(dataset, dict) and (dataset.get("images") or dataset.get("name") == "toy")
    if not known or not isinstance(dataset, dict):
        raise UsageError(f"{options.source} does not say where its images are; name their folder with --image-folder")
    finder = image_finder(dataset, max_pixels=manifest.get("max_pixels"))
    if finder.folder is None and options.placement not in (None, "copy"):
        raise UsageError("--images: the images of the built-in world are drawn, not files; give --images copy")
    return finder


def _suffix(kind: type[Writer], files: dict[str, Path | None], placement: ImagePlacement) -> tuple[str, bool]:
    """The suffix that all images have, where the format asks for one, and whether images become JPEG for it."""
    if kind.jpeg == "always":
        return ".jpg", True
    if kind.jpeg == "never":
        return "", False
    there = {path.suffix for path in files.values() if path is not None}
    if len(there) == 1:
        return there.pop(), False
    if placement == "reference":
        raise UsageError(
            f"the images end in {', '.join(sorted(there)) or 'nothing'}, the format needs one; --images copy"
        )
    return ".jpg", True


@dataclass(frozen=True)
class _Source:
    """Masks, or CAMs made into masks."""

    prediction: CamSet | MaskSource
    rules: Rules | None
    manifest: Manifest

    @property
    def turned(self) -> bool | None:
        """Whether masks lie on the image as its EXIF turns it; ``None``: nobody says."""
        made = self.manifest.get("options")
        return bool(made["exif"]) if isinstance(made, dict) and "exif" in made else None

    def labels(self, identifier: str) -> LabelMask:
        """The mask of an image."""
        if not isinstance(self.prediction, CamSet):
            return self.prediction.read(identifier)
        cam = self.prediction[identifier]
        if self.rules is None:
            return np.zeros(cam.size, np.uint8)
        return label_mask(cam, self.rules)

    def maps(self, identifier: str) -> tuple[Any, Any] | None:
        """Classes and maps at the image's size, of CAMs that are exported as such."""
        if self.rules is not None or not isinstance(self.prediction, CamSet):
            return None
        cam = self.prediction[identifier]
        return cam.classes, cam.upsampled()


@dataclass(frozen=True)
class _Made:
    """An image, ready to be written; or why it is not."""

    id: str
    encoded: Encoded = field(default_factory=Encoded)
    images: dict[str, Path | bytes] = field(default_factory=dict)
    problem: str | None = None


@dataclass
class _Maker:
    """Reads, turns and encodes single images, in several threads at once.

    Attributes:
        jpeg: Images that are no JPEG become one.
        rotated: Images whose EXIF turns them.
        reencoded: Images that became JPEG.
    """

    source: _Source
    writer: Writer
    finder: ImageFinder | None
    files: dict[str, Path | None]
    placement: ImagePlacement
    orient: Orientation
    jpeg: bool
    ignore: IgnoreExport
    rotated: list[str] = field(default_factory=list)
    reencoded: list[str] = field(default_factory=list)

    def __call__(self, numbered: tuple[int, str]) -> _Made:
        """One image."""
        number, identifier = numbered
        problem = self.writer.problem(identifier)
        if problem is not None:
            return _Made(identifier, problem=problem)
        try:
            labels = self._labels(identifier)
            if self.finder is None:
                return _Made(identifier, self._encoded(number, identifier, "", labels))
            return self._with_image(self.finder, number, identifier, labels)
        except ImageError as error:
            return _Made(identifier, problem=str(error))
        except _Unusable as error:
            return _Made(identifier, problem=str(error))

    def _labels(self, identifier: str) -> LabelMask:
        try:
            return self.source.labels(identifier)
        except InputError as error:
            raise _Unusable(str(error)) from error

    def _encoded(self, number: int, identifier: str, image: str, labels: LabelMask) -> Encoded:
        return self.writer.encode(Item(identifier, number, image, labels, self.source.maps(identifier)))

    def _with_image(self, finder: ImageFinder, number: int, identifier: str, labels: LabelMask) -> _Made:
        path = self.files[identifier]
        if path is None and finder.folder is not None:
            raise _Unusable(f"{finder.folder / identifier}: no image there; name their folder with --image-folder")
        header = ImageHeader(labels.shape[:2]) if path is None else read_header(path)
        labels = self._oriented(labels, header)
        self._check_values(labels, identifier)
        if min(labels.shape) < self.writer.smallest:
            raise _Unusable(f"the format takes no image of less than {self.writer.smallest} pixels a side")
        if self.ignore == "background":
            labels = np.where(labels == IGNORE, np.uint8(0), labels)
        if header.orientation != 1:
            self.rotated.append(identifier)
        origin: Path | bytes
        suffix = ".png" if path is None else path.suffix
        if path is None:
            origin = self._file_of(finder, identifier, ImageHeader(labels.shape[:2]))
            suffix = ".jpg" if self.jpeg else ".png"
        elif self.jpeg and suffix.lower() in _JPEG:
            origin, suffix = path, ".jpg"
        elif self.jpeg:
            self.reencoded.append(identifier)
            origin, suffix = self._file_of(finder, identifier, header), ".jpg"
        else:
            origin = path
        if self.placement == "reference":
            return _Made(identifier, self._encoded(number, identifier, self._reference(finder, path), labels))
        name = self.writer.image_path(identifier, suffix)
        return _Made(identifier, self._encoded(number, identifier, name, labels), {name: origin})

    def _reference(self, finder: ImageFinder, path: Path | None) -> str:
        """An image that stays where it is: below its folder, or for formats of addresses in the file system."""
        assert path is not None
        assert finder.folder is not None
        if self.writer.addresses:
            return path.resolve().as_posix()
        return path.relative_to(finder.folder).as_posix()

    def _oriented(self, labels: LabelMask, header: ImageHeader) -> LabelMask:
        """The mask as it is to lie on the image."""
        lies = self.source.turned
        if lies is None:  # a foreign mask: its size may tell
            lies = labels.shape[:2] != header.size and labels.shape[:2] == header.shown
        if labels.shape[:2] != (header.shown if lies else header.size):
            height, width = header.shown if lies else header.size
            raise _Unusable(f"its mask has {labels.shape[1]}x{labels.shape[0]} pixels, the image {width}x{height}")
        if lies == (self.orient == "exif"):
            return labels
        return turned_back(labels, header.orientation) if lies else turned(labels, header.orientation)

    def _check_values(self, labels: LabelMask, identifier: str) -> None:
        """A value that is no class is a mistake in the class list; skipping images would bury it."""
        check_labels(labels, len(self.writer.table.names) + 1, identifier, allow_ignore=True)

    def _file_of(self, finder: ImageFinder, identifier: str, header: ImageHeader) -> bytes:
        """An image's pixels as a file: JPEG where the format needs it, else PNG; turned as the masks are."""
        image = to_rgb(finder(identifier))
        if self.orient == "exif" and header.orientation != 1:
            pixels = np.asarray(image).transpose(2, 0, 1)
            image = Image.fromarray(turned(pixels, header.orientation).transpose(1, 2, 0))
        buffer = io.BytesIO()
        if self.jpeg:
            image.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        else:
            image.save(buffer, "PNG")
        return buffer.getvalue()


class _Unusable(Exception):
    """Why an image is left out."""


def _notes(options: ExportOptions, kind: type[Writer], maker: _Maker) -> list[str]:
    notes = []
    if maker.rotated and maker.orient == "exif":
        why = f"; readers of {options.format} do the same" if kind.turned else ""
        notes.append(f"{len(maker.rotated)} masks are turned as the EXIF of their images says (--orient exif){why}")
    elif maker.rotated:
        notes.append(
            f"{counted(len(maker.rotated), 'image is', 'images are')} turned by EXIF, masks lie on the pixels as "
            "stored; --orient exif turns the masks"
        )
    if maker.reencoded:
        notes.append(
            f"{counted(len(maker.reencoded), 'image')} became JPEG (quality {_JPEG_QUALITY}), as "
            f"{options.format} needs it"
        )
    if kind.lost:
        notes.append(f"{options.format} loses something: {kind.lost}")
    return notes


def _write_parquet(out: Path, path: Path) -> None:
    """The image folder once more as a Parquet file, with the images in it."""
    import tempfile

    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        found = datasets.load_dataset("imagefolder", data_dir=str(out.resolve()), split="train", cache_dir=cache)
        with replacing(path) as temporary:
            found.to_parquet(str(temporary))
