"""Decoding every kind of photo, and refusing what is none."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipseed.data.images import FileReader, patch_grid, read_image, resize_to_grid, to_rgb
from clipseed.data.types import Sample
from clipseed.errors import ImageError

from helpers.images import photo


def saved(image: Image.Image, path: Path, **options: object) -> np.ndarray:
    image.save(path, **options)
    found = read_image(path)
    assert found.mode == "RGB"
    return np.asarray(found)


GREY = np.linspace(0, 255, 12 * 10).reshape(12, 10)


def test_rgb_and_grey(tmp_path: Path) -> None:
    image = photo(0, 12, 10)
    np.testing.assert_array_equal(saved(image, tmp_path / "a.png"), np.asarray(image))
    grey = GREY.astype(np.uint8)
    np.testing.assert_array_equal(saved(Image.fromarray(grey), tmp_path / "b.png"), grey[..., None].repeat(3, 2))


def test_16_bit_is_scaled_not_saturated(tmp_path: Path) -> None:
    values = (GREY * 257).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        found = saved(Image.fromarray(values), tmp_path / name)
        assert np.abs(found[..., 0].astype(int) - GREY).max() <= 1


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_float_tiff(top: float, tmp_path: Path) -> None:
    values = (GREY / 255 * top).astype(np.float32)
    values[0, 0] = np.nan
    found = saved(Image.fromarray(values), tmp_path / "a.tif")[..., 0].astype(float)
    assert np.abs(found - GREY)[1:].max() <= 1
    assert found[0, 0] == 0


def test_32_bit_integers_with_negative_values_are_stretched(tmp_path: Path) -> None:
    values = (GREY * 1000 - 50_000).astype(np.int32)
    found = saved(Image.fromarray(values), tmp_path / "a.tif")[..., 0].astype(float)
    assert np.abs(found - GREY).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_white(mode: str, tmp_path: Path) -> None:
    image = photo(1, 12, 10).convert(mode)
    alpha = np.full((12, 10), 255, np.uint8)
    alpha[:6] = 0
    alpha[6] = 128
    image.putalpha(Image.fromarray(alpha))
    found = saved(image, tmp_path / "a.png")
    opaque = np.asarray(image.convert("RGB"))
    assert (found[:6] == 255).all()
    np.testing.assert_array_equal(found[7:], opaque[7:])
    assert np.abs(found[6].astype(float) - (opaque[6] * 128.0 + 255.0 * 127) / 255).max() <= 1


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = photo(2, 12, 10).quantize(8)
    np.testing.assert_array_equal(saved(image, tmp_path / "a.png"), np.asarray(image.convert("RGB")))
    found = saved(image, tmp_path / "b.png", transparency=0)
    assert (found[np.asarray(image) == 0] == 255).all()


def test_rgb_with_a_transparent_colour(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = 9
    found = saved(Image.fromarray(pixels), tmp_path / "a.png", transparency=(9, 9, 9))
    assert (found[0] == 255).all()
    assert (found[1:] == 0).all()


def test_cmyk_one_bit_and_animation(tmp_path: Path) -> None:
    image = photo(3, 12, 10)
    found = saved(image.convert("CMYK"), tmp_path / "a.jpg", quality=100)
    assert np.abs(found.astype(int) - np.asarray(image)).mean() < 4
    bits = saved(Image.fromarray(GREY > 100), tmp_path / "b.png")
    np.testing.assert_array_equal(bits[..., 0], np.where(GREY > 100, 255, 0))
    frames = [Image.new("RGB", (10, 12), colour) for colour in ("red", "blue")]
    assert saved(frames[0], tmp_path / "c.gif", save_all=True, append_images=frames[1:])[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    """As stored by default, so that maps align with masks; turned when asked."""
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255  # top left quarter
    undo = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    stored = np.ascontiguousarray(undo[orientation](upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(stored).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(path)), stored)
    np.testing.assert_array_equal(np.asarray(read_image(path, exif=True)), upright)
    sample = Sample("a", path, ())
    assert FileReader(exif=True)(sample).size == (16, 8)


def test_unreadable_files(tmp_path: Path) -> None:
    good = tmp_path / "good.jpg"
    photo(4, 200, 300).save(good, quality=95)
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("this is not an image")
    (tmp_path / "page.ps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (tmp_path / "folder.jpg").mkdir()
    expected = {
        "cut.jpg": "truncated",
        "empty.jpg": "is empty",
        "text.jpg": "not an image",
        "page.ps": "not an image",  # PostScript would start an interpreter
        "missing.jpg": "no such file",
        "folder.jpg": "damaged",
    }
    for name, message in expected.items():
        with pytest.raises(ImageError, match=rf"{name}: .*{message}"):
            read_image(tmp_path / name)


def huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_huge_header_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    for width, height in ((60_000, 60_000), (2_000_000_000, 2)):
        path.write_bytes(huge_png(width, height))
        with pytest.raises(ImageError, match=r"limit of 80000000 \(--max-pixels\)|enormous"):
            read_image(path)
    path.write_bytes(huge_png(100, 100))
    with pytest.raises(ImageError, match="damaged or truncated"):
        read_image(path)


def test_every_byte_string_is_an_image_or_an_image_error(tmp_path: Path) -> None:
    """Flip and cut real files: nothing but ImageError may come out."""
    rng = np.random.default_rng(0)
    path = tmp_path / "x"
    for form in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        photo(5, 40, 30).save(buffer, form)
        original = buffer.getvalue()
        for _ in range(25):
            content = bytearray(original)
            for position in rng.integers(0, len(content), rng.integers(1, 8)):
                content[position] = rng.integers(0, 256)
            path.write_bytes(bytes(content[: rng.integers(1, len(content) + 1)]))
            try:
                assert read_image(path, max_pixels=10_000_000).mode == "RGB"
            except ImageError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((375, 500), (0, 0), (24, 32)),
        ((48, 64), (0, 0), (3, 4)),
        ((1, 1), (0, 0), (1, 1)),
        ((1, 4000), (640, 0), (1, 40)),
        ((6000, 8000), (640, 0), (30, 40)),
        ((640, 480), (640, 0), (40, 30)),
        ((20, 40), (0, 64), (4, 8)),
        ((20, 4000), (640, 64), (1, 40)),
    ],
)
def test_patch_grid(size: tuple[int, int], limits: tuple[int, int], expected: tuple[int, int]) -> None:
    assert patch_grid(*size, 16, *limits) == expected


def test_resize_to_grid_is_pillows_bicubic() -> None:
    image = photo(6, 50, 70)
    found = resize_to_grid(image, (4, 5), 16)
    np.testing.assert_array_equal(found, np.asarray(image.resize((80, 64), Image.Resampling.BICUBIC)))
    same = photo(7, 64, 80)
    np.testing.assert_array_equal(resize_to_grid(same, (4, 5), 16), np.asarray(same))


def test_to_rgb_gives_an_image_of_its_own() -> None:
    image = photo(8, 4, 4)
    found = to_rgb(image)
    found.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) != (1, 2, 3)
