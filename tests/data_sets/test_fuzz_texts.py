"""Label files, class lists, VOC and COCO annotations made of anything: a valid result or one of our errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipseed.data.coco import read_instances
from clipseed.data.labels import read_labels
from clipseed.data.listing import read_split
from clipseed.data.templates import load_templates
from clipseed.data.types import check_id
from clipseed.data.voc import object_names
from clipseed.data.vocabulary import ClassText, Vocabulary, load_vocabulary, parse_vocabulary
from clipseed.errors import ClipseedError, InputError

ANIMALS = Vocabulary("animals", (ClassText("cat"), ClassText("dog"), ClassText("guinea pig")))
FUZZ = settings(
    max_examples=300, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

# Pieces of the formats themselves, so that mistakes get past the first check.
NUMBERS = ["0", "1", "-1", "2", "1.0", "²", "٣", "1e9", "NaN", "9" * 30, "9" * 5000]
WORDS = [
    "a",
    "b/c.jpg",
    "../x",
    "/x",
    "cat",
    "dog",
    "guinea_pig",
    "id",
    "label",
    "true",
    "\ufeff",
    "\0",
    "\x1b[2J",
    "é",
    "😀",
]
MARKS = [
    ",",
    ";",
    "|",
    '"',
    "'",
    "\t",
    " ",
    "\n",
    "\r\n",
    "\r",
    "\u2028",
    "{",
    "}",
    "[",
    "]",
    ":",
    "#",
    "\\",
    "-",
    "<",
    "&",
]
soup = st.lists(st.sampled_from(NUMBERS + WORDS + MARKS), max_size=25).map("".join)
contents = st.one_of(soup.map(str.encode), st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")),
                     st.binary(max_size=80))  # fmt: skip
plain = st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.sampled_from(NUMBERS + WORDS),
                  st.text(max_size=4), st.just("\ud800"))  # fmt: skip
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def survives(function: Callable[[], Any]) -> Any:
    """The result, or ``None`` after one of our errors, whose text can be written; anything else is raised."""
    try:
        return function()
    except ClipseedError as error:
        assert 0 < len(str(error)) < 2000
        str(error).encode("utf-8", "backslashreplace")
        return None


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@FUZZ
@given(content=contents, suffix=st.sampled_from(["csv", "tsv", "json", "txt"]))
def test_label_files(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"labels.{suffix}", content)
    labels = survives(lambda: read_labels(path, ANIMALS))
    for key, row in (labels or {}).items():
        assert check_id(key, "") == key
        assert set(row) <= {0, 1, 2}


@FUZZ
@given(rows=st.lists(st.lists(st.sampled_from(["1", "0", "-1", "", "yes", "2", "²"]), max_size=4), max_size=4),
       header=st.lists(st.sampled_from(["cat", "dog", "2", "cow", "label"]), max_size=4))  # fmt: skip
def test_one_hot_tables(rows: list[list[str]], header: list[str], tmp_path: Path) -> None:
    lines = [["id", *header], *([f"p{k}", *row] for k, row in enumerate(rows))]
    path = write(tmp_path / "labels.csv", "\n".join(map(",".join, lines)).encode())
    labels = survives(lambda: read_labels(path, ANIMALS))
    known = [{"cat": 0, "dog": 1, "2": 2}.get(name) for name in header]
    if labels and header and None not in known:
        for k, row in enumerate(rows):
            assert set(labels[f"p{k}"]) == {c for c, cell in zip(known, row, strict=True) if cell in {"1", "yes"}}


@FUZZ
@given(data=values | st.lists(st.fixed_dictionaries({"id": plain, "labels": values}), max_size=3))
def test_label_files_in_json(data: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "labels.json", json.dumps(data).encode())
    for key, row in (survives(lambda: read_labels(path, ANIMALS)) or {}).items():
        assert check_id(key, "") == key
        assert set(row) <= {0, 1, 2}


@FUZZ
@given(content=contents)
def test_split_lists_and_templates(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "list.txt", content)
    for key in survives(lambda: read_split(path, folders=("JPEGImages",))) or ():
        assert check_id(key, "") == key
    for suffix in ("txt", "yaml"):
        for template in survives(lambda: load_templates(write(tmp_path / f"t.{suffix}", content))) or ():  # noqa: B023
            assert template.format("x").count("x") >= 1


YAML = ["classes:", " ", "\n", "\n  - ", "- ", "[", "]", "{", "}", "name: ", "text: ", "synonyms: ", "templates: ", "a",
        "b {}", "'{}'", "{x}", "&n ", "*n", "<<: ", "!!int ", "!!bool ", "!!timestamp ", "!!float ''", "!!binary ",
        "!!set ", "!!python/name:os.system", "? ", ": ", "2001-13-45", "1:2:3", "0x", "~", "|\n", ">", "%YAML 9\n---\n",
        '"\\ud800"', '"\\0"', "---\n", "...", "\t", "@", "background: ", "[x, y]"]  # fmt: skip


def usable(vocabulary: Vocabulary) -> None:
    """What every command relies on."""
    assert 1 <= len(vocabulary.classes) <= 254
    for template in vocabulary.templates:
        for item in vocabulary.classes:
            assert item.prompt in template.format(item.prompt)
    json.dumps(vocabulary.as_dict()).encode()
    "".join((*vocabulary.class_names, *vocabulary.background)).encode()
    assert parse_vocabulary(vocabulary.as_dict(), "again", "x") == vocabulary


@FUZZ
@given(
    content=st.lists(st.sampled_from(YAML), max_size=14).map("".join), start=st.sampled_from(["", "classes: [a, b]\n"])
)
def test_class_lists_in_yaml(content: str, start: str, tmp_path: Path) -> None:
    found = survives(lambda: load_vocabulary(write(tmp_path / "classes.yaml", (start + content).encode())))
    if found is not None:
        usable(found)


@FUZZ
@given(data=st.fixed_dictionaries({"classes": st.lists(values, max_size=3) | values},
                                  optional={"name": values, "templates": values, "background": values}))  # fmt: skip
def test_vocabularies_of_manifests(data: Any) -> None:
    found = survives(lambda: parse_vocabulary(data, "manifest", "x"))
    if found is not None:
        usable(found)


@FUZZ
@given(content=contents)
def test_class_lists_in_text(content: bytes, tmp_path: Path) -> None:
    found = survives(lambda: load_vocabulary(write(tmp_path / "classes.txt", content)))
    if found is not None:
        usable(found)


XML = ["<annotation>", "</annotation>", "<object>", "</object>", "<name>", "</name>", "cat", "<part>", "</part>",
       "<!--", "-->", "<![CDATA[", "]]>", "&amp;", "&x;", "&#0;", "&#99999999;", "<!DOCTYPE a [<!ENTITY x 'y'>]>",
       "<?pi?>", "\0", '<?xml version="1.0" encoding="', "utf-8", "utf-16", "utf-7", "idna", "gb2312", "rot13", "hex",
       "none", '"?>']  # fmt: skip


@FUZZ
@given(
    content=st.lists(st.sampled_from(XML), max_size=14).map(lambda parts: "".join(parts).encode())
    | st.binary(max_size=60)
)
def test_voc_annotations(content: bytes) -> None:
    assert all(isinstance(name, str) for name in survives(lambda: object_names(content, "a.xml")) or ())


identifiers = st.integers(0, 3) | plain
category = st.fixed_dictionaries({"id": identifiers, "name": plain})
image = st.fixed_dictionaries({"id": identifiers, "file_name": st.sampled_from(WORDS) | values})
annotation = st.fixed_dictionaries({"image_id": identifiers, "category_id": identifiers})
instances = st.fixed_dictionaries(
    {
        "categories": st.just([{"id": k} for k in range(3)]) | st.lists(category, min_size=3, max_size=3) | values,
        "images": st.lists(image, max_size=4) | values,
        "annotations": st.lists(annotation, max_size=4) | values,
    }
)


@FUZZ
@given(data=instances)
def test_coco_annotations(data: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "instances_x.json", json.dumps(data).encode())
    found = survives(lambda: read_instances(path, tmp_path, ANIMALS, None))
    if found is not None:
        samples = found[1]
        assert len({sample.id for sample in samples}) == len(samples)
        assert all(check_id(sample.id, "") and set(sample.labels or ()) <= {0, 1, 2} for sample in samples)


# What fuzzing and reading found, one by one ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,²\n", "line 1: unknown class '²'"),
        ("a.txt", f"x {'9' * 5000}\n", "line 1: there is no class 99999999999999999999"),
        ("a.json", '{"x": ' + "9" * 5000 + "}", "thousands of digits"),
        ("a.json", '{"\\ud800": ["cat"]}', "holds half a character"),
        ("a.json", '{"x": ["cat"], "x": ["dog"]}', "'x' occurs twice"),
        ("a.txt", "x " + "c" * 100_000, r"unknown class 'c{80}' \("),
    ],
)
def test_odd_labels(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_labels(write(tmp_path / name, content.encode()), ANIMALS)
    assert len(str(caught.value)) < 500


def test_spreadsheets_with_mark_tabs_and_windows_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbfid\tlabel\r\na\tcat\r\na\tdog\r\n")
    assert read_labels(path, ANIMALS) == {"a": (0, 1)}
    path = write(
        tmp_path / "classes.txt", "\ufeffcat\r\nC#  # a comment\r\n😀, big\r\n<b>x</b>\r\n# no class\r\n".encode()
    )
    assert load_vocabulary(path).class_names == ("cat", "C#", "😀, big", "<b>x</b>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("classes: [a]\ntemplates: ['a {x} {}']", "exactly one {} and no other brace"),
        ("classes: [a]\ntemplates: ['a {0}{}']", "exactly one {} and no other brace"),
        ("classes: [!!bool x]", "not valid YAML"),
        ("classes: [!!timestamp x]", "not valid YAML"),
        ("classes: [!!int '_']", "not valid YAML"),
        ('classes: ["a\\0b"]', "holds a line break, a control character"),
        ('classes: [{name: a, text: "\\ud800"}]', "a control character or half a character"),
        ("classes: [a]\nname: [1]", "'name' must be a string"),
        ("x: &n [a]\nclasses: *n", r"line 2: aliases \(\*n\) are not read"),
    ],
)
def test_odd_class_lists(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message.replace("{}", r"\{\}")):
        load_vocabulary(write(tmp_path / "a.yaml", content.encode()))


def test_endless_class_lists_are_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "a.yaml"):
        with pytest.raises(InputError, match="too long for a class list"):
            load_vocabulary(write(tmp_path / name, b"classes: [" + b"a, " * 400_000 + b"b]"))


@pytest.mark.parametrize("encoding", ["utf-7", "none", "gb2312", "rot13", "idna"])
def test_encodings_that_xml_cannot_have(encoding: str) -> None:
    with pytest.raises(InputError, match=r"a.xml: its encoding cannot be read .* save it as UTF-8"):
        object_names(f'<?xml version="1.0" encoding="{encoding}"?><a>x</a>'.encode(), "a.xml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "./a.png"}]},
            "two images have the id 'a'",
        ),
        ({"images": [{"id": 1, "file_name": "\ud800.jpg"}]}, "half a character"),
        ({"images": [{"id": True, "file_name": "a.jpg"}]}, "'id' is not an integer"),
        ({"images": [{"id": [[[[[[[[1]]]]]]]], "file_name": "a.jpg"}]}, "'id' is not an integer"),
        ({"categories": [{"id": 1}, {"id": 1}, {"id": 2}]}, "two categories have the same id"),
    ],
)
def test_odd_coco_files(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = {"categories": [{"id": k} for k in range(3)], "images": [], "annotations": [], **change}
    with pytest.raises(InputError, match=message):
        read_instances(write(tmp_path / "i.json", json.dumps(data).encode()), tmp_path, ANIMALS, None)
