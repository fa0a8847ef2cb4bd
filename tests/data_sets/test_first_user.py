"""What spreadsheets, phones and people's folders hold: read, and said where it was not plain."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.data.images import peculiarities
from clipseed.data.labels import read_label_file
from clipseed.data.vocabulary import load_vocabulary
from clipseed.errors import InputError

from helpers.images import photo

VOC = load_vocabulary("voc")
WANTED = {"a": (7, 11), "b": (19,), "d": ()}


@pytest.mark.parametrize(
    ("content", "separated", "told"),
    [
        ('a.jpg,"cat,dog"\nb.jpg,tvmonitor\nd.jpg,\n', "commas", ""),
        ("a.jpg,cat|dog\nb.jpg,tvmonitor\nd.jpg,\n", "commas", ""),
        ("image,classes\na.jpg,cat;dog\nb.jpg,tvmonitor\nd.jpg,\n", "commas", ""),
        ("a.jpg;cat\na.jpg;dog\nb.jpg;tvmonitor\nd.jpg;\n", "semicolons", "separated by semicolons"),
        ("a.jpg;cat,dog\nb.jpg;tvmonitor\nd.jpg;\n", "semicolons", "separated by semicolons"),
        ("\ufeffImage;Labels\r\na.jpg;cat|dog\r\nb.jpg;tvmonitor\r\nd.jpg;\r\n", "semicolons", "semicolons"),
        ("a.jpg\tcat,dog\nb.jpg\ttvmonitor\nd.jpg\t\n", "tabs", "separated by tabs"),
        ("a.jpg|cat,dog\nb.jpg|tvmonitor\nd.jpg|\n", "bars (|)", "separated by bars"),
        ("picture,what\na.jpg,cat|dog\nb.jpg,tvmonitor\nd.jpg,\n", "commas", ""),
        ("frame,seen\na.jpg,cat|dog\nb.jpg,tvmonitor\nd.jpg,\n", "commas", "taken for a header (frame, seen)"),
        ("id,width,label\na.jpg,640,cat\na.jpg,640,dog\nb.jpg,20,tvmonitor\nd.jpg,9,\n", "commas", ""),
        ("a.jpg,\"['cat', 'dog']\"\nb.jpg,[tvmonitor]\nd.jpg,[]\n", "commas", ""),
        ('image;cat;dog;tvmonitor\na.jpg;1;1;0\nb.jpg;0;0;1\n"d.jpg";0;0;0\n', "semicolons", "semicolons"),
    ],
)
def test_tables(content: str, separated: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(content.encode())
    found = read_label_file(path, VOC)
    assert found.labels == WANTED
    assert found.read_as == f"CSV separated by {separated}"
    assert told in " ".join(found.notes)
    assert bool(told) == bool(found.notes)


def test_names_with_separators(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text('my, cat.jpg;cat\n"my; dog.jpg";dog\n')
    assert read_label_file(path, VOC).labels == {"my, cat": (7,), "my; dog": (11,)}


def folder(tmp_path: Path) -> DatasetOptions:
    images = tmp_path / "photos"
    images.mkdir()
    for number, name in enumerate(("a.jpg", "b.jpg")):
        photo(number, 20, 30).save(images / name)
    exif = Image.Exif()
    exif[274] = 6
    photo(3, 20, 30).save(images / "turned.jpg", exif=exif)
    frames = [photo(k, 20, 30) for k in (4, 5)]
    frames[0].save(images / "moving.gif", save_all=True, append_images=frames[1:])
    (images / "c.HEIC").write_bytes(b"x")
    (images / "raw.CR2").write_bytes(b"x")
    return DatasetOptions("folder", images=images, labels=tmp_path / "labels.csv", classes="voc")


def test_notes(tmp_path: Path) -> None:
    options = folder(tmp_path)
    (tmp_path / "labels.csv").write_text("a.jpg;cat\nb.jpg;dog\n")
    notes = open_dataset(options).notes
    assert [note.removeprefix(f"{tmp_path}/") for note in notes] == [
        "labels.csv: columns are separated by semicolons",
        "2 files are in formats not read here and passed over (c.HEIC, raw.CR2); convert to JPEG or PNG",
        "1 of 4 images carry an EXIF orientation and are taken as stored; --exif turns them",
        "1 of 4 images have several frames or pages; the first is taken",
    ]
    assert not peculiarities([tmp_path / "photos" / "turned.jpg", tmp_path / "photos" / "raw.CR2"], exif=True)


def test_errors_in_the_order_of_looking(tmp_path: Path) -> None:
    options = folder(tmp_path)
    (tmp_path / "labels.csv").write_text("x.jpg:cat\n")
    with pytest.raises(InputError, match=r"none of its 1 ids .* \(read as CSV separated by commas; first label id"):
        open_dataset(options)
    (tmp_path / "labels.csv").write_text("a.jpg,catt\n")
    with pytest.raises(InputError, match="unknown class 'catt'"):
        open_dataset(options)
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="photos: no such image folder"):
        open_dataset(options)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "c.heic").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no images here .*1 file is in a format not read here"):
        open_dataset(options)
