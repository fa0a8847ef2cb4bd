"""Label files, vocabularies, split lists and sample ids: what is accepted, and how mistakes are reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipseed.data.labels import read_labels
from clipseed.data.listing import clean_id, list_images, read_split
from clipseed.data.types import check_id
from clipseed.data.vocabulary import ClassText, Vocabulary, load_vocabulary, parse_vocabulary
from clipseed.errors import ClipseedError, InputError

from helpers.images import photo

VOC = load_vocabulary("voc")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "id,label\na,cat\na,dog\nb/c.jpg,tvmonitor\nd,\n"),
        ("cells.csv", "a,cat,dog\nb/c,tvmonitor\nd\n"),
        ("lists.csv", "image,labels\na,cat;dog\nb/c,tv_monitor|tvmonitor\nd,\n".replace("tv_monitor|", "")),
        ("quoted.csv", '"a","cat;dog"\n"b/c",19\n"d",\n'),
        ("tabs.tsv", "id\tlabel\na\tcat\na\tdog\nb/c\ttvmonitor\nd\t\n"),
        ("hot.csv", "id,cat,dog,TVMonitor\na,1,1,0\n./b/c.png,0,0,1\nd,0,0,-1\n"),
        ("map.json", '{"a": ["cat", "dog", "cat"], "b/c.jpg": 19, "d": []}'),
        ("list.json", '[{"id": "a", "labels": [7, 11]}, {"file_name": "b/c.jpg", "labels": "tvmonitor"},'
                      ' {"image": "d", "labels": []}]'),
        ("plain.txt", "# ids\na 7 11\nb/c tvmonitor\n\nd\n"),
        ("bom.txt", "\ufeffa cat dog\nb/c 19\nd\n"),
    ],
)  # fmt: skip
def test_formats(name: str, content: str, tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path / name, content), VOC)
    assert labels == {"a": (7, 11), "b/c": (19,), "d": ()}


def test_names_with_blanks(tmp_path: Path) -> None:
    coco = load_vocabulary("coco")
    path = write(tmp_path / "a.txt", "x traffic_light TRAFFIC-LIGHT hot_dog\n")
    assert read_labels(path, coco) == {"x": (9, 52)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,label\nx,cat\ny,catt\n", r"a.csv: line 3: unknown class 'catt'.*did you mean 'cat'"),
        ("a.csv", "x,99\n", r"line 1: there is no class 99; those of vocabulary 'voc' are numbered from 0 to 19"),
        ("a.csv", "id,cat,dog\nx,1\n", r"line 2: 1 values for 2 classes"),
        ("a.csv", "id,cat,dog\nx,1,maybe\n", r"line 2: 'maybe' is neither 0 nor 1"),
        ("a.csv", 'x,"cat\n', r"a.csv: line \d: not valid CSV"),
        ("a.csv", "../x,cat\n", "leaves the image folder"),
        ("a.csv", "/etc/x,cat\n", "leaves the image folder"),
        ("a.csv", "", "is empty"),
        ("a.csv", b"x,\xff\xfe\n", "must be UTF-8"),
        ("a.json", '{"x": ["cat"],\n "y": }', r"a.json: line 2: not valid JSON"),
        ("a.json", '{"x": [true]}', r"'x': labels must be class names or indices"),
        ("a.json", '{"x": {"cat": 1}}', r"'x': labels must be"),
        ("a.json", '[{"labels": ["cat"]}]', r"entry 0: needs 'labels' and one of"),
        ("a.json", '"cat"', "a mapping id -> labels"),
        ("a.json", "[" * 100_000, "nested too deeply|not valid JSON"),
        ("a.txt", "x\0y cat\n", "NUL"),
        ("a.txt", "x -3\n", "unknown class '-3'"),
    ],
)
def test_mistakes_name_file_and_line(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_labels(write(tmp_path / name, content), VOC)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.csv: a label file cannot be read \(No such file"):
        read_labels(tmp_path / "nowhere.csv", VOC)


@settings(max_examples=150, deadline=None)
@given(
    content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)),
    suffix=st.sampled_from(["csv", "json", "txt"]),
)
def test_any_bytes_are_labels_or_an_input_error(
    content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("labels") / f"a.{suffix}", content)
    try:
        labels = read_labels(path, VOC)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert all(check_id(key, "x") and all(0 <= label < 20 for label in row) for key, row in labels.items())


@settings(max_examples=100, deadline=None)
@given(
    rows=st.dictionaries(
        st.text("abcxyz/-_.é ", min_size=1, max_size=12), st.lists(st.integers(0, 19), unique=True), min_size=1
    )
)
def test_json_round_trip(rows: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for key, row in rows.items():
        try:
            identifier = clean_id(key, "x")
        except InputError:
            return
        wanted[identifier] = tuple(dict.fromkeys((*wanted.get(identifier, ()), *row)))
    path = tmp_path_factory.mktemp("labels") / "a.json"
    path.write_text(json.dumps({key: [VOC.class_names[k] for k in row] for key, row in rows.items()}))
    assert read_labels(path, VOC) == wanted


# Vocabularies ---------------------------------------------------------------------------------------------------------


def test_builtin_vocabularies() -> None:
    coco = load_vocabulary("coco")
    assert (len(VOC.classes), len(VOC.background)) == (20, 25)
    assert (len(coco.classes), len(coco.background)) == (80, 23)
    assert VOC.classes[14].name == "person"
    assert VOC.classes[14].prompt == "person with clothes,people,human"
    assert coco.classes[31].name == "snowboard"
    assert coco.classes[31].prompt == "sknowboard"  # CLIP-ES's own misspelling
    corrected = load_vocabulary("coco-corrected")
    assert corrected.class_names == coco.class_names
    assert corrected.classes[31].prompt == "snowboard"
    assert load_vocabulary("toy").class_names[0] == "boat"


def test_own_vocabularies(tmp_path: Path) -> None:
    yaml = "templates: ['a {} here']\nclasses:\n  - rust\n  - {name: crack, text: thin crack, synonyms: [fissure]}\n"
    found = load_vocabulary(write(tmp_path / "defects.yaml", yaml))
    assert found == Vocabulary(
        "defects", (ClassText("rust"), ClassText("crack", "thin crack", ("fissure",))), VOC.background, ("a {} here",)
    )
    assert found.background_from == "general"
    text = "# defects\nrust\ncrack: thin crack, fissure  # both words\n\n"
    lines = load_vocabulary(write(tmp_path / "defects.txt", text))
    assert [item.prompt for item in lines.classes] == ["rust", "thin crack,fissure"]
    assert parse_vocabulary(found.as_dict(), "x", "x") == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("classes: [a, b", r"a.yaml: line \d: not valid YAML"),
        ("classes: []", "has no classes"),
        ("- a\n- b", "a mapping with a list 'classes'"),
        ("classes: [a]\nkind: x", "unknown key 'kind'"),
        ("classes: [{name: a, colour: red}]", "class 0: unknown key 'colour'"),
        ("classes: [{text: a}]", "class 0: must be a name"),
        ("classes: [a, yes]", "class 1: must be a name"),  # YAML reads yes as true
        ("classes: [a, A]", "'A' is listed twice"),
        ("classes: [a, '7']", "must not be empty or a bare number"),
        ("classes: [a]\ntemplates: ['a photo']", r"must contain exactly one \{\}"),
        ("classes: [a]\nbackground: [1]", "background: must be a list of non-empty strings"),
        ("classes: [{name: a, synonyms: b}]", "synonyms: must be a list"),
        ("classes: !!python/object/apply:os.system ['touch x']", "not valid YAML"),
        ("classes: [" + ", ".join(f"c{k}" for k in range(255)) + "]", "8-bit masks hold at most 254"),
    ],
)
def test_vocabulary_mistakes(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_vocabulary(write(tmp_path / "a.yaml", content))


def test_vocabulary_not_found() -> None:
    with pytest.raises(InputError, match=r"no such class list.*coco, coco-corrected, toy, voc"):
        load_vocabulary("vok")


# Ids, listings and splits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "a/../b", "/a", "a\nb", "a\rb", "a\0b", "a\\b", "x" * 1025, "../../etc/passwd"]
)
def test_ids_that_could_leave_the_output(bad: str) -> None:
    with pytest.raises(InputError, match="the image id"):
        check_id(bad, "somewhere")


def test_long_and_unusual_ids_are_fine() -> None:
    for good in ("x" * 300, "ü/日本/…", "a b", "a.b.c", "..a"):
        assert check_id(good, "x") == good


def test_listing(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/c.PNG", "a/b/d.e.jpeg", ".hidden.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo(0, 4, 4).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert list(list_images(tmp_path)) == ["a/b/d.e", "a/c", "b"]
    photo(0, 4, 4).save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"two images with the id 'b'"):
        list_images(tmp_path)


def test_listing_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images here"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="no such image folder"):
        list_images(tmp_path / "missing")


def test_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "s.txt", "/JPEGImages/a.jpg /SegmentationClassAug/a.png\nb\n# c\n\nd/e.png 1\n")
    assert read_split(path, folders=("JPEGImages",)) == ["a", "b", "d/e"]
    for content, message in (
        ("", "is empty"),
        ("a\na.jpg\n", "line 2: 'a' is already on line 1"),
        ("../a\n", "leaves"),
    ):
        with pytest.raises(InputError, match=message):
            read_split(write(path, content))


def test_every_error_is_one_of_ours() -> None:
    assert issubclass(InputError, ClipseedError)
    assert InputError("x").exit_code == 1
