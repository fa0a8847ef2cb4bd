"""Background words: which lists get which, and what competes with a class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipseed.clip.text import TextBank
from clipseed.data.background import choose_background
from clipseed.data.background_words import unlike_classes
from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.data.vocabulary import (
    ClassText,
    Vocabulary,
    builtin_vocabularies,
    load_vocabulary,
    with_general_background,
)
from clipseed.errors import InputError, UsageError
from clipseed.store.manifest import differences

VOC = load_vocabulary("voc")


def words_left_out(*classes: str) -> set[str]:
    vocabulary = Vocabulary("own", tuple(map(ClassText, classes)))
    return set(VOC.background) - set(with_general_background(vocabulary).background)


@pytest.mark.parametrize("name", ["voc", "coco", "coco-corrected"])
def test_the_rule_gives_the_lists_of_clip_es(name: str) -> None:
    """CLIP-ES wrote its two lists by hand: COCO's lacks what its classes name (keyboard, and sign for stop sign)."""
    own = load_vocabulary(name)
    assert with_general_background(own).background == own.background
    assert own.background_from == "class list"


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["rust", "crack", "TV", "tv monitor", "sheep", "bus"], set()),
        (["Trees"], {"tree"}),
        (["Valleys", "bridges"], {"valley", "bridge"}),
        (["stop sign"], {"sign"}),
        (["key-board"], {"keyboard"}),
        (["Rail_Road"], {"railroad", "railway", "road", "street"}),
        (["green-houses"], {"house", "building"}),
        (["greenhouse"], {"house"}),
        (["husky", "aeroplane"], set()),
        (["pond"], {"lake", "water", "river", "sea", "ocean"}),
        (["highway"], {"road", "street"}),
    ],
)
def test_words_that_a_class_may_be_called(classes: list[str], expected: set[str]) -> None:
    assert words_left_out(*classes) == expected


def test_texts_and_synonyms_name_classes_too() -> None:
    vocabulary = Vocabulary("own", (ClassText("a", "old helmet", ("wet grass",)),))
    assert unlike_classes(["helmet", "grass", "big old helmet", "helmets for sale", "sand"], vocabulary.phrases) == (
        "helmets for sale",
        "sand",
    )


def test_lists_that_say_nothing_get_the_general_words(tmp_path: Path) -> None:
    for name, content in {
        "a.txt": "rust\nhouse: cottage\n",
        "b.yaml": "classes: [rust, house]\n",
        "c.yaml": "classes: [rust, house]\nbackground:\n",
        "d.json": '{"classes": ["rust", "house"]}',
    }.items():
        (tmp_path / name).write_text(content)
        found = load_vocabulary(tmp_path / name)
        assert found.background == tuple(word for word in VOC.background if word not in ("house", "building")), name
        assert found.background_from == "general"
    for name, content, expected in (
        ("e.yaml", "classes: [rust]\nbackground: []\n", ()),
        ("f.yaml", "classes: [rust]\nbackground: [rust, paint]\n", ("rust", "paint")),
    ):
        (tmp_path / name).write_text(content)
        found = load_vocabulary(tmp_path / name)
        assert (found.background, found.background_from) == (expected, "class list")


def test_the_general_words_are_no_class_list() -> None:
    assert builtin_vocabularies() == ("coco", "coco-corrected", "toy", "voc")


def test_choosing(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("# what else there is\nwall\n\nwet floor  # often\nwall\n")
    (tmp_path / "words.yaml").write_text("[wall, wet floor]")
    toy = load_vocabulary("toy")
    assert choose_background(toy, "none").background == ()
    assert choose_background(toy, "general") == with_general_background(toy)
    assert choose_background(toy, "coco").background == tuple(
        word for word in load_vocabulary("coco").background if word not in ("house", "building")
    )
    for name in ("words.txt", "words.yaml"):
        found = choose_background(toy, str(tmp_path / name))
        assert found.background == ("wall", "wet floor")
        assert found.as_dict()["background_from"] == name
    images = open_dataset(DatasetOptions("toy", background="none", limit=2))
    assert images.vocabulary.as_dict()["background"] == []
    assert images.vocabulary.as_dict()["background_from"] == "none"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.txt", "# nothing\n", "holds no words; --background none"),
        ("w.yaml", "words: [a]", "must be a list of non-empty strings"),
        ("w.yaml", "[a, 3]", "must be a list of non-empty strings"),
        ("w.yaml", "[a", "not valid YAML"),
        ("w.txt", "a\x1bb", "a control character"),
    ],
)
def test_files_without_words(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        choose_background(VOC, str(tmp_path / name))


def test_no_such_background() -> None:
    with pytest.raises(UsageError, match=r"--background vok: no such file.*none, general, coco, coco-corrected, toy"):
        choose_background(VOC, "vok")


def test_where_words_come_from_is_a_note() -> None:
    """The same words from elsewhere are no other settings."""
    one = {"vocabulary": VOC.as_dict()}
    other = {"vocabulary": {**VOC.as_dict(), "background_from": "general"}}
    assert differences(one, other) == []
    assert differences(one, {"vocabulary": choose_background(VOC, "none").as_dict()})


def test_what_competes() -> None:
    text = TextBank(torch.zeros(3, 4), torch.zeros(2, 4), 1.0)
    present = torch.tensor([[True, False, True], [False, False, False]])
    assert text.competing(present).tolist() == [[True, False, True, True, True], [False, False, False, True, True]]
