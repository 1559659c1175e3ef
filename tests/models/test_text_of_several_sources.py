"""Text of several sources: each divided by itself, and windows that know where they are from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prunezero.errors import TextError
from prunezero.models.text.mixing import in_turn, names_of_sources, shares
from prunezero.models.text.splits import SPLITS, Text, load_text, unseen_windows, windows
from prunezero.pruning.testbed import Settings, Testbed
from tests.tiny_models import tiny_model

LENGTH = 8


def write(path: Path, letter: str, *, count: int = 40, also: tuple[str, ...] = ()) -> str:
    """A file of documents of one letter each, all different by their lengths."""
    rows = [letter * (30 + place) for place in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (*rows, *also)))
    return str(path)


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """Files of the letters a, b and c."""
    return [write(tmp_path / f"{letter}.jsonl", letter) for letter in "abc"]


def letters(ids: torch.Tensor) -> list[set[str]]:
    """The letters in each window, without ends of documents."""
    return [{chr(token - 3 + 32) for token in row if token != 1} for row in ids.tolist()]


@pytest.mark.parametrize("split", SPLITS)
def test_windows_come_from_the_sources_in_turn_and_are_those_of_each_alone(
    split: str, three: list[str]
) -> None:
    text, model = load_text(",".join(three)), tiny_model()
    found = windows(text, split, model, length=LENGTH, count=8, seed=3)
    assert letters(found) == [{letter} for letter in "abcabcab"]
    assert text.sources(8) == tuple(three[place % 3] for place in range(8))
    for place, count in enumerate((3, 3, 2)):
        alone = load_text(three[place])
        expected = windows(alone, split, model, length=LENGTH, count=count, seed=3)
        assert torch.equal(found[place::3], expected)


def test_a_single_source_is_what_it_was_and_names_none(three: list[str]) -> None:
    text = load_text(three[0])
    assert text.parts == () and text.sources(5) == ()
    assert load_text(f"{three[0]},{three[1]}").parts[0] == text


def test_the_fingerprint_follows_every_source_and_their_order(three: list[str]) -> None:
    names = [",".join(some) for some in (three[:2], three[1::-1], three[1:], three)]
    found = [load_text(name).fingerprint for name in [*names, three[0]]]
    assert len(set(found)) == len(found)
    assert load_text(names[0]).fingerprint == found[0]


def test_a_document_of_two_sources_is_in_the_latest_split_and_then_in_the_first_source(
    tmp_path: Path,
) -> None:
    shared, asked = "the same in both " * 3, "asked for in the end " * 3
    first = write(tmp_path / "a.jsonl", "a", also=(shared, asked))
    folder = tmp_path / "b"
    folder.mkdir()
    write(folder / "train.jsonl", "b", also=(shared,))
    write(folder / "test.jsonl", "c", also=(asked,))
    text = load_text(f"{first},{folder}")
    one, other = text.parts
    inside = [
        [name for name in SPLITS for found in part.documents[name] if found == document]
        for document in (shared, asked)
        for part in (one, other)
    ]
    assert len(inside[0]) == 1 and inside[1:] == [[], [], ["test"]]
    every = [document for split in SPLITS for document in text.documents[split]]
    assert len(every) == len(set(every))


def test_unseen_windows_are_those_that_the_draw_of_each_source_leaves(three: list[str]) -> None:
    text, model = load_text(",".join(three)), tiny_model()
    seen = windows(text, "calibration", model, length=LENGTH, count=9, seed=1)
    found = unseen_windows(text, model, length=LENGTH, count=9, seed=1)
    assert letters(found) == [{letter} for letter in "abcabcabc"]
    for place, name in enumerate(three):
        alone = unseen_windows(load_text(name), model, length=LENGTH, count=3, seed=1)
        assert torch.equal(found[place::3], alone)
    assert len(seen) == 9


def test_a_testbed_knows_the_source_of_each_window_in_either_order(three: list[str]) -> None:
    text = load_text(",".join(three))
    settings = Settings(LENGTH, calibration_tokens=7 * LENGTH, evaluation_tokens=5 * LENGTH)
    testbed = Testbed(tiny_model(), text, settings)
    assert testbed.sources("calibration") == text.sources(7)
    turned = testbed.reversed()
    # The first source stays the first, so that nothing but the order within each differs.
    assert turned.sources("calibration") == text.sources(7)
    assert letters(turned.windows("calibration")) == [{letter} for letter in "abcabca"]
    assert turned.sources("validation") == testbed.sources("validation") == text.sources(5)
    single = Testbed(tiny_model(), load_text(three[0]), settings)
    assert single.sources("calibration") == ()


def test_fewer_windows_than_sources_are_refused(three: list[str]) -> None:
    with pytest.raises(TextError, match="2 windows of test text cannot hold all 3 sources"):
        windows(load_text(",".join(three)), "test", tiny_model(), length=LENGTH, count=2)


def test_a_source_with_too_little_text_is_refused_by_its_name(tmp_path: Path) -> None:
    long, short = write(tmp_path / "a.jsonl", "a"), write(tmp_path / "b.jsonl", "b", count=5)
    text = load_text(f"{long},{short}")
    with pytest.raises(TextError, match=r"calibration split of text '.*b.jsonl' has .* need 160"):
        windows(text, "calibration", tiny_model(), length=LENGTH, count=40)


def test_names_with_commas_are_several_sources_unless_a_file_has_that_name(tmp_path: Path) -> None:
    odd = write(tmp_path / "a,b.jsonl", "a")
    assert names_of_sources(odd) == [odd]
    assert names_of_sources("demo") == ["demo"]
    assert names_of_sources("demo, a.txt") == ["demo", "a.txt"]
    assert names_of_sources("~nobody-of-that-name/x,y") == ["~nobody-of-that-name/x", "y"]
    assert names_of_sources("x" * 300 + ",y") == ["x" * 300, "y"]
    with pytest.raises(TextError, match="a comma with no source beside it"):
        load_text("a.txt,,b.txt")
    with pytest.raises(TextError, match="names 'a.txt' twice"):
        load_text("a.txt,a.txt")
    with pytest.raises(TextError, match="no text file or folder 'nowhere.txt'"):
        load_text(f"{write(tmp_path / 'c.jsonl', 'c')},nowhere.txt")


def test_a_source_that_only_repeats_another_is_refused(tmp_path: Path) -> None:
    first, again = write(tmp_path / "a.jsonl", "a"), write(tmp_path / "b.jsonl", "a")
    with pytest.raises(TextError, match=r"b.jsonl' holds no document that the others do not"):
        load_text(f"{first},{again}")


def test_shares_add_up_and_those_that_end_early_are_passed_over() -> None:
    assert [shares(count, 3) for count in (1, 7, 9)] == [[1, 0, 0], [3, 2, 2], [3, 3, 3]]
    some, more = torch.tensor([[1], [2], [3]]), torch.tensor([[7]])
    assert in_turn([some, more, some[:0]]).tolist() == [[1], [7], [2], [3]]


def test_notes_say_of_which_source_they_are(tmp_path: Path, three: list[str]) -> None:
    (tmp_path / "d.txt").write_text("\n\n".join("d" * (40 + place) for place in range(60)))
    text = load_text(f"{three[0]},{tmp_path / 'd.txt'}")
    assert isinstance(text, Text) and text.notes
    assert all(note.startswith(str(tmp_path / "d.txt")) for note in text.notes)
