"""CAMs, masks and manifests with anything in them: what can be used, or one of our errors, in bounded memory."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipseed.cli.main import main
from clipseed.data.dataset import image_finder
from clipseed.errors import ClipseedError, ImageError, InputError, StoreError
from clipseed.jobs.evaluate import EvaluateOptions, evaluate
from clipseed.jobs.inspect import inspect_cams
from clipseed.store.cams import open_cams
from clipseed.store.label_mask_writer import read_label_mask_manifest
from clipseed.store.label_masks import label_mask_note, read_label_mask, write_label_mask
from clipseed.store.units import Unit

from helpers.images import photo
from helpers.seeds_files import DATASETS, MANIFEST, arrays, seeds_file

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def survives(function: Callable[[], Any]) -> Any:
    """The result, or ``None`` after one of our errors; anything else is raised."""
    try:
        return function()
    except ClipseedError as error:
        assert 0 < len(str(error)) < 2000
        return None


def use_seeds(path: Path) -> list[str]:
    """Everything that commands do with CAMs before they look at images."""
    with open_cams(path) as seeds:
        for key in seeds:
            record = seeds[key]
            assert record.maps.shape[0] == len(record.classes) == len(seeds.classes(key))
            assert all(seeds.class_names[k] for k in record.classes)
        found = list(seeds)
    inspect_cams(path)
    return found


def test_the_files_of_this_test_are_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = seeds_file(tmp_path / "x.h5", arrays())
    assert use_seeds(path) == ["a", "b/c", "d"]
    assert main(["inspect", str(path), "--verify"]) == 0
    assert "three, 3 classes" in capsys.readouterr().out


extremes = st.sampled_from([0, 1, -1, 2, 3, 5, 24, 27, 254, 2**20, 2**31 - 1, -(2**31)])
kinds = st.sampled_from(["i1", "i4", ">i4", "u8", "i8", "f4", "f2", "f8", "S2", "S0", "?", "c8"])


@FUZZ
@given(name=st.sampled_from(DATASETS), places=st.lists(st.tuples(st.integers(0, 30), extremes), max_size=3),
       kind=st.none() | kinds, shape=st.sampled_from(["same", "empty", "scalar", "flat", "deep", "short"]))  # fmt: skip
def test_hostile_contents(
    name: str, places: list[tuple[int, int]], kind: str | None, shape: str, tmp_path: Path
) -> None:
    """With true checksums, so that only the content's own sense can be at fault."""
    content = arrays()
    values = content[name]
    for place, value in places:
        if values.dtype.kind != "S":
            with np.errstate(over="ignore", invalid="ignore"):
                values.reshape(-1)[place % values.size] = np.array(value).astype(values.dtype)
    if kind is not None:
        values = values.astype(kind) if values.dtype.kind != "S" or kind[0] == "S" else np.zeros(len(values), kind)
    reshape = {"empty": values[:0], "scalar": values.reshape(-1)[0], "flat": values.reshape(-1), "short": values[:-1],
               "deep": values[..., None]}  # fmt: skip
    content[name] = np.asarray(reshape.get(shape, values))
    path = tmp_path / "x.h5"
    try:
        seeds_file(path, content)
    except (TypeError, ValueError):
        return  # h5py itself cannot store it
    survives(lambda: use_seeds(path))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("class_id", [10**9, 0, 1], "offsets do not fit"),  # counting classes would take 8 GB
        ("class_id", [3, 0, 1], "it has class 3 of 3"),
        ("class_id", [-1, 0, 1], "offsets do not fit"),
        ("grid", [[2**31 - 1, 2**31 - 1], [2, 2], [1, 3]], "offsets do not fit"),
        ("size", [[2**31 - 1, 2**31 - 1], [2, 2], [1, 3]], "offsets do not fit"),
        ("size", [[48.0, 64.0], [32, 32], [16, 48]], "'size' has the type float64"),
    ],
)
def test_values_that_would_take_memory(name: str, values: Any, message: str, tmp_path: Path) -> None:
    content = arrays()
    content[name] = np.array(values) if message.startswith("'size'") else np.array(values, content[name].dtype)
    with pytest.raises(StoreError, match=message):
        open_cams(seeds_file(tmp_path / "x.h5", content))


# Manifests ------------------------------------------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "classes", "images", "split", "toy_seed", "paper", "root"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
manifests = st.fixed_dictionaries(
    {}, optional={part: anything | st.just(MANIFEST.get(part)) for part in (*MANIFEST, "extra")}
) | st.builds(lambda part, value: {**MANIFEST, part: value}, st.sampled_from(list(MANIFEST)), anything)


@settings(FUZZ, max_examples=60)
@given(manifest=manifests | anything)
def test_manifests_of_seeds(manifest: Any, tmp_path: Path) -> None:
    path = seeds_file(tmp_path / "x.h5", arrays(), manifest)
    write_truth(tmp_path)
    survives(lambda: use_seeds(path))
    survives(lambda: evaluate(EvaluateOptions(path, gt=str(tmp_path / "gt"))))
    survives(lambda: evaluate(EvaluateOptions(path)))
    if survives(lambda: open_cams(path).manifest):
        assert main(["inspect", str(path), "--preview", str(tmp_path / "sheet.png")]) in (0, 1)
        dataset = open_cams(path).manifest["dataset"]
        survives(lambda: image_finder(dataset)("a"))


def write_truth(folder: Path) -> None:
    if not (folder / "gt").is_dir():
        (folder / "gt" / "b").mkdir(parents=True)
        write_label_mask(folder / "gt" / "a.png", np.ones((48, 64), np.uint8))
        write_label_mask(folder / "gt" / "b" / "c.png", np.ones((32, 32), np.uint8))


def test_inspecting_odd_manifests_is_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts that only tell about the past may be missing or odd; those that decide what maps mean may not."""
    for part, value in (("method", None), ("model", {}), ("versions", 3), ("dataset", {}), ("options", {})):
        seeds_file(tmp_path / "x.h5", arrays(), {**MANIFEST, part: value})
        assert main(["inspect", str(tmp_path / "x.h5")]) == 0, part
    for part, value in (("vocabulary", {}), ("vocabulary", {"classes": [3]}), ("dataset", []), ("options", None)):
        seeds_file(tmp_path / "x.h5", arrays(), {**MANIFEST, part: value})
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / "x.h5")]) == 1, part
        assert "damaged, its manifest has no" in capsys.readouterr().err


@FUZZ
@given(content=st.binary(max_size=40) | anything.map(lambda data: json.dumps(data).encode())
       | manifests.map(lambda data: json.dumps(data).encode()) | st.just(b"[" * 50_000))  # fmt: skip
def test_manifests_of_masks(content: bytes, tmp_path: Path) -> None:
    write_truth(tmp_path)
    (tmp_path / "gt" / "manifest.json").write_bytes(content)
    found = read_label_mask_manifest(tmp_path / "gt")
    assert found is None or isinstance(found, dict)
    survives(lambda: evaluate(EvaluateOptions(tmp_path / "gt", gt=str(tmp_path / "gt"))))
    survives(lambda: evaluate(EvaluateOptions(tmp_path / "gt", classes="voc")))


# Masks ----------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, *chunks: bytes, pixels: bytes = bytes(200)) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def check_mask(path: Path) -> None:
    found = survives(lambda: read_label_mask(path))
    assert found is None or (found.dtype == np.uint8 and found.ndim == 2)
    classes = label_mask_note(path).classes
    assert classes is None or all(isinstance(k, int) for k in classes)


pieces = st.sampled_from([
    chunk(b"PLTE", bytes(3)), chunk(b"PLTE", bytes(768)), chunk(b"PLTE", bytes(7)), chunk(b"PLTE", bytes(3000)),
    chunk(b"tRNS", bytes(300)), chunk(b"tEXt", b"clipseed-classes\x001 2"), chunk(b"tEXt", b"clipseed-classes\0x"),
    chunk(b"tEXt", b"clipseed-classes\0" + b"9" * 5000), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 22))),
    chunk(b"iTXt", b"a\0\1\0\0\0" + b"no zlib"), chunk(b"IHDR", bytes(13)), chunk(b"gAMA", b""),
    chunk(b"acTL", b"\xff" * 8), chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"), chunk(b"IDAT", b""), b"\xff\xff\xff\xffIDAT",
])  # fmt: skip


sides = st.sampled_from([0, 1, 7, 12, 100, 2**14, 2**16, 2**31 - 1, 2**32 - 1])


@FUZZ
@given(
    size=st.tuples(sides, sides), depth=st.sampled_from([1, 2, 4, 8, 16, 3]),
    colour=st.sampled_from([0, 2, 3, 4, 6, 5]), extra=st.lists(pieces, max_size=3),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_masks_with_odd_chunks(
    size: tuple[int, int], depth: int, colour: int, extra: list[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png(*size, depth, colour, *extra))
    check_mask(path)


@FUZZ
@given(
    data=st.data(),
    mode=st.sampled_from(["P", "L", "1", "I;16", "RGB", "LA", "RGBA"]),
    form=st.sampled_from(["PNG", "TIFF"]),
)
@pytest.mark.filterwarnings("ignore")
def test_masks_with_changed_bytes(data: st.DataObject, mode: str, form: str, tmp_path: Path) -> None:
    labels = Image.fromarray(np.arange(99, dtype=np.uint8).reshape(9, 11) % 21)
    buffer = io.BytesIO()
    (Image.fromarray(np.asarray(labels).astype(np.uint16)) if mode == "I;16" else labels.convert(mode)).save(
        buffer, form
    )
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    path = tmp_path / "x.png"
    path.write_bytes(bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))]))
    check_mask(path)


def test_masks_are_images_without_loss_only(tmp_path: Path) -> None:
    """A name that ends in .png must not start the interpreters that Pillow has for other formats."""
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="not an image"):
        read_label_mask(path)
    photo(0, 8, 8).save(path, format="JPEG")
    with pytest.raises(InputError, match="not an image"):
        read_label_mask(path)
    path.write_bytes(png(60_000, 60_000, 8, 3, chunk(b"PLTE", bytes(768))))
    with pytest.raises(InputError, match="its header promises an enormous mask"):
        read_label_mask(path)
    assert label_mask_note(path).classes is None


# Memory and crashes ---------------------------------------------------------------------------------------------------

LIMITED = """
import faulthandler, resource, signal, sys
faulthandler.enable()
from pathlib import Path
import cv2, h5py, yaml
import numpy as np
from PIL import Image
from clipseed.data.images import read_image
from clipseed.data.labels import read_labels
from clipseed.data.templates import load_templates
from clipseed.data.vocabulary import load_vocabulary
from clipseed.data.voc import object_names
from clipseed.data import coco
from clipseed.errors import ClipseedError
from clipseed.store.label_masks import label_mask_note, read_label_mask
from clipseed.store.cams import open_cams
Image.init()
voc = load_vocabulary("voc")
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + (int(sys.argv.pop()) << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
signal.alarm(60)
last = []

def outcome(function, *words):
    try:
        return function(*words)
    except ClipseedError as error:
        last[:] = [str(error)]
        return type(error).__name__
"""


def limited(code: str, *words: object, megabytes: int = 300) -> list[str]:
    """Lines that a program prints which has so much more memory than its imports, and a minute."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED + code, *map(str, words), str(megabytes)],
        capture_output=True, text=True, check=False, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.fixture
def hostile_seeds(tmp_path: Path) -> Path:
    """Small files that promise gigabytes, each in its own way."""
    folder = tmp_path / "pseudo-sam"
    folder.mkdir()

    def replaced(kind: str, name: str, **options: Any) -> None:
        with h5py.File(seeds_file(folder / f"{kind}-{name}.h5", arrays()), "r+") as file:
            dtype = file[name].dtype
            del file[name]
            file.create_dataset(name, dtype=dtype, **options)

    rows = 1 << 30
    for name in DATASETS:
        tail = (2,) if name in {"size", "grid"} else ()
        replaced("missing", name, shape=(rows, *tail), chunks=(1024, *tail))
    replaced("packed", "class_id", shape=(1 << 27,), chunks=(1 << 27,), compression="gzip")
    with h5py.File(folder / "packed-class_id.h5", "r+") as file:
        file["class_id"][:100] = 1
    replaced("chunk", "cam", shape=(27,), maxshape=(None,), chunks=(1 << 29,), fletcher32=True)
    wide = arrays()
    with h5py.File(seeds_file(folder / "wide-id.h5", wide), "r+") as file:
        del file["id"]
        file.create_dataset("id", shape=(3,), dtype=f"S{1 << 30}", chunks=(1,))
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(1 << 20))
    replaced("outside", "cam", shape=(27,), external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
    with h5py.File(seeds_file(folder / "linked-cam.h5", arrays()), "r+") as file:
        del file["cam"]
        file["cam"] = h5py.ExternalLink(str(seeds_file(tmp_path / "other.h5", arrays())), "/cam")
    with h5py.File(seeds_file(folder / "virtual-cam.h5", arrays()), "r+") as file:
        del file["cam"]
        layout = h5py.VirtualLayout((27,), "f2")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "cam", (27,))
        file.create_virtual_dataset("cam", layout)
    return folder


def test_seeds_that_promise_gigabytes(hostile_seeds: Path) -> None:
    code = """
for path in sorted(Path(sys.argv[1]).iterdir()):
    for verify in (True, False):
        print(path.name, outcome(lambda: open_cams(path, verify=verify)), "damaged, " in str(last))
"""
    lines = limited(code, hostile_seeds)
    assert len(lines) == 2 * len(list(hostile_seeds.iterdir())) >= 24
    assert [line for line in lines if not line.endswith("StoreError True")] == []


def test_damaged_seeds_neither_crash_nor_grow(tmp_path: Path) -> None:
    """HDF5 reads structures of its own before we see anything: bytes changed anywhere, with and without checksums."""
    # Older structures have no checksums of their own: one change in 1500 made the library itself crash.
    path = seeds_file(tmp_path / "x.h5", arrays(), libver="latest")
    code = """
path, rng = Path(sys.argv[1]), np.random.default_rng(0)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
original = path.read_bytes()

def use(verify):
    with open_cams(target, verify=verify) as cams:
        return str([cams[key].maps.shape for key in cams])[:0] + "read"

for attempt in range(600):
    content = bytearray(original)
    for place in rng.integers(0, len(content), rng.integers(1, 9)):
        content[place] = rng.choice([0, 1, 127, 255, int(rng.integers(256))])
    if attempt % 5 == 0:
        del content[rng.integers(0, len(content)) :]
    target = path.with_name(f"{attempt}.h5")  # never a file again that the library may know
    target.write_bytes(bytes(content))
    print(outcome(use, attempt % 2 == 0))
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < start + (300 << 10)
"""
    # The library asks for memory that it does not use, and does not survive not getting it.
    outcomes = limited(code, path, megabytes=1 << 14)
    assert len(outcomes) == 600
    assert set(outcomes) == {"read", "StoreError"}


def test_bombs_of_every_format(tmp_path: Path) -> None:
    """Class lists whose aliases double, masks and images of 16 gigapixels, texts of 100 MB in masks, nested JSON."""
    levels = "\n".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12))
    merges = "\n".join(f"b{k}: &b{k} {{<<: [{', '.join([f'*b{k - 1}'] * 9)}]}}" for k in range(1, 12))
    files = {
        "lists.yaml": f"a0: &a0 [x]\n{levels}\nclasses: [a]\nname: *a11".encode(),
        "classes.yaml": f"a0: &a0 [x]\n{levels}\nclasses: *a11".encode(),
        "merge.yaml": f"b0: &b0 {{x: y}}\n{merges}\nclasses: [a]".encode(),
        "deep.yaml": b"classes: " + b"[" * 50_000,
        "deep.json": b"[" * 1_000_000,
        "size.png": png(130_000, 130_000, 8, 0),
        "text.png": png(7, 9, 8, 3, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(90 << 20), 9))] * 3),
        "profile.png": png(7, 9, 8, 2, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(400 << 20), 9))),
        "pixels.png": png(7, 9, 8, 0, pixels=bytes(400 << 20)),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    laughs = "".join(f'<!ENTITY l{k} "{f"&l{k - 1};" * 10}">' for k in range(1, 20))
    (tmp_path / "laughs.xml").write_text(f'<!DOCTYPE a [<!ENTITY l0 "ha">{laughs}]><a>&l19;</a>')
    code = """
folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.yaml")):
    print(path.name, outcome(load_vocabulary, path), outcome(load_templates, path))
deep = folder / "deep.json"
print("json", outcome(read_labels, deep, voc), outcome(coco.read_instances, deep, folder, voc, None))
print("xml", outcome(object_names, (folder / "laughs.xml").read_bytes(), "laughs.xml"))
for path in sorted(folder.glob("*.png")):
    note = outcome(label_mask_note, path)
    found = outcome(read_label_mask, path), note.classes, outcome(read_image, path)
    print(path.name, *[word if isinstance(word, str | None) else "read" for word in found])
"""
    assert limited(code, tmp_path) == [
        *(f"{name}.yaml InputError InputError" for name in ("classes", "deep", "lists", "merge")),
        "json InputError InputError",
        "xml InputError",
        "pixels.png read None read",
        "profile.png InputError None ImageError",
        "size.png InputError None ImageError",
        "text.png InputError None ImageError",
    ]


# Pipes, devices and ids -----------------------------------------------------------------------------------------------


def test_pipes_never_block(tmp_path: Path) -> None:
    from clipseed.data.images import read_image
    from clipseed.data.labels import read_labels
    from clipseed.data.vocabulary import load_vocabulary

    pipe = tmp_path / "x.png"
    os.mkfifo(pipe)
    with pytest.raises(ImageError, match="a pipe or a device, not an image"):
        read_image(pipe)
    with pytest.raises(InputError, match="a pipe or a device, not a mask"):
        read_label_mask(pipe)
    assert label_mask_note(pipe).classes is None
    with pytest.raises(StoreError, match="a pipe or a device, not a CAM file"):
        open_cams(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(InputError, match="must be a file, not a pipe or a device"):
            read_labels(path, load_vocabulary("voc"))


def test_ids_of_foreign_seeds_lead_nowhere(tmp_path: Path) -> None:
    """CAMs are data from elsewhere: their ids must not read images or write masks outside the folders given."""
    from clipseed.store.label_mask_writer import Labelled, LabelMaskWriter

    (tmp_path / "photos").mkdir()
    photo(0, 8, 8).save(tmp_path / "secret.png")
    find = image_finder({"name": "folder", "images": str(tmp_path / "photos")})
    with LabelMaskWriter(tmp_path / "masks", {"kind": "crf"}, 16) as writer:
        for identifier in ("../secret", str(tmp_path / "secret"), "a/../../secret", "x\0y", "a\nb"):
            with pytest.raises(ImageError, match="the image id"):
                find(identifier)
            with pytest.raises(InputError, match="the image id"):
                writer.write(Unit(0), [Labelled(identifier, np.zeros((8, 8), np.uint8), ())])
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "secret.png", "masks"}
