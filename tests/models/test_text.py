from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import PruneZeroWarning, TextError
from prunezero.models.text import demo as demo_text
from prunezero.models.text import rows as text_rows
from prunezero.models.text import splits as text_module
from prunezero.models.text.demo import clean
from prunezero.models.text.running_text import cut_running_text
from prunezero.models.text.sources import read_source
from prunezero.models.text.splits import (
    SPLITS,
    Text,
    distinct,
    divide,
    load_text,
    unseen_windows,
    windows,
)
from prunezero.models.text.windows import begin_with
from prunezero.pruning.testbed import Settings, Testbed
from prunezero.report.export import page_parts
from tests.tiny_models import LONGEST, tiny_model, tiny_tokenizer

DOCUMENTS = [f"Document number {place} is about pruning." for place in range(40)]


def write_jsonl(path: Path, documents: list[str], column: str = "text") -> Path:
    rows = [json.dumps({column: document, "url": "x"}) + "\n" for document in documents]
    path.write_text("".join(rows))
    return path


def read_documents(name: str) -> dict[str, list[str]]:
    return read_source(name).documents


def simple(**documents: tuple[str, ...]) -> Text:
    return Text("mine", {split: documents.get(split, ()) for split in SPLITS}, "digest")


def test_of_every_20_documents_10_calibrate_3_search_3_validate_and_4_test() -> None:
    parts = divide({"train": DOCUMENTS})
    assert [len(parts[split]) for split in SPLITS] == [20, 6, 6, 8]
    assert sorted(text for texts in parts.values() for text in texts) == sorted(DOCUMENTS)


def test_even_a_few_documents_reach_every_split() -> None:
    assert all(divide({"train": DOCUMENTS[:6]}).values())


def test_the_same_documents_are_always_divided_alike_and_not_in_their_order() -> None:
    first = divide({"train": DOCUMENTS})
    assert first == divide({"train": list(DOCUMENTS)})
    assert list(first["calibration"]) != sorted(first["calibration"], key=DOCUMENTS.index)


def test_a_document_that_comes_twice_is_in_one_split_only() -> None:
    parts = divide(distinct({"train": DOCUMENTS * 3}))
    assert sum(map(len, parts.values())) == len(DOCUMENTS)


def test_own_validation_and_test_splits_are_kept() -> None:
    parts = divide({"train": DOCUMENTS[:26], "validation": ["v"], "test": ["t"]})
    assert (parts["validation"], parts["test"]) == (("v",), ("t",))
    assert (len(parts["calibration"]), len(parts["search"])) == (20, 6)


def test_a_source_with_a_test_split_alone_is_divided_like_any_other() -> None:
    assert divide({"test": DOCUMENTS}) == divide({"train": DOCUMENTS})


@pytest.mark.parametrize("column", ["text", "content"])
def test_jsonl_parquet_and_folders_hold_documents(column: str, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS, column)
    table = pyarrow.table({column: DOCUMENTS})
    parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read_documents(str(tmp_path / name)) == {"train": DOCUMENTS}
    (tmp_path / "a.parquet").unlink()
    write_jsonl(tmp_path / "test.jsonl", ["t"], column)
    write_jsonl(tmp_path / "validation-0.jsonl", ["v"], column)
    expected = {"train": DOCUMENTS, "test": ["t"], "validation": ["v"]}
    assert read_documents(str(tmp_path)) == expected


def test_a_text_file_is_cut_between_paragraphs_and_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(DOCUMENTS * 30), encoding="utf-8")
    documents = read_documents(str(tmp_path / "book.txt"))["train"]
    assert len(documents) > 15
    assert "\n\n".join(documents) == "\n\n".join(DOCUMENTS * 30)


def test_one_endless_line_is_cut_into_pieces_of_whole_words() -> None:
    pieces, _ = cut_running_text("prune the model " * 2000)
    assert len(pieces) > 15
    assert " ".join(pieces).split() == ["prune", "the", "model"] * 2000


def test_rows_that_are_lines_of_wikitext_become_articles(tmp_path: Path) -> None:
    lines = [
        line
        for place in range(50)
        for line in (f" = Title {place} = \n", "", f" Body {place} .\n", " = = Part = = \n", " b\n")
    ]
    documents = read_documents(str(write_jsonl(tmp_path / "wiki.jsonl", lines)))["train"]
    assert len(documents) == 50
    # Joined as papers do it, on whose perplexities the line ends tell.
    assert documents[7] == "\n\n".join(lines[35:40]).strip()


def test_reading_stops_when_there_is_more_than_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_rows, "MOST_CHARACTERS", 100)
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    assert read_documents(str(path)) == {"train": DOCUMENTS[:3]}


def test_sources_that_cannot_be_read_are_refused_in_one_sentence(tmp_path: Path) -> None:
    for name in ("", "nowhere.txt", "./nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(TextError, match="there is no text file or folder"):
            load_text(name)
    with pytest.raises(TextError, match="holds no .txt, .jsonl"):
        load_text(str(tmp_path))
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(TextError, match="is no text file"):
        load_text(str(tmp_path / "a.pdf"))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(TextError, match="cannot be read as UTF-8"):
        load_text(str(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_text(" \n\n ")
    with pytest.raises(TextError, match="is empty"):
        load_text(str(tmp_path / "b.txt"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(TextError, match="a.jsonl' cannot be read") as caught:
        load_text(str(tmp_path / "a.jsonl"))
    assert "\n" not in str(caught.value)
    with pytest.raises(TextError, match="no column text or content .* columns are body, url"):
        load_text(str(write_jsonl(tmp_path / "c.jsonl", ["a"], "body")))


def test_a_fingerprint_follows_the_documents_and_not_the_name(tmp_path: Path) -> None:
    first = load_text(str(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)))
    same = load_text(str(write_jsonl(tmp_path / "b.jsonl", DOCUMENTS)))
    other = load_text(str(write_jsonl(tmp_path / "c.jsonl", [*DOCUMENTS[1:], "new"])))
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_windows_are_the_first_tokens_with_an_end_between_documents() -> None:
    found = windows(simple(test=("ab", "cde", "fgh")), "test", tiny_model(), length=3, count=3)
    # 1 is </s>; "a" is 68.
    assert found.tolist() == [[68, 69, 1], [70, 71, 72], [1, 73, 74]]
    assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("around", "first", "word"),
    [
        ("<s> $A", [0], "<s>"),
        ("<s> $A </s>", [0], "<s>"),
        ("<s> <unk> $A", [0, 2], "<s> <unk>"),
        ("$A </s>", [], ""),
    ],
)
def test_windows_of_every_split_begin_as_the_tokenizer_begins_a_text(
    around: str, first: list[int], word: str
) -> None:
    tokenizer = tiny_tokenizer(around)
    model = replace(tiny_model(), tokenizer=tokenizer)
    text = simple(**dict.fromkeys(SPLITS, ("abcde", "fghij" * 9)))
    # 1 is </s>, between documents; "a" is 68.
    follow = [68, 69, 70, 71, 72, 1, 73, 74, 75]
    each = 4 - len(first)
    for split in SPLITS:
        found = windows(text, split, model, length=4, count=51 // each).tolist()
        assert found[:2] == [[*first, *follow[at : at + each]] for at in (0, each)]
        assert all(window[: len(first)] == first for window in found)
    assert begin_with(tokenizer) == word
    # The exported page cuts one text, which ends nowhere inside.
    page = page_parts.windows(tokenizer, "abcdefgh", 4)
    plain = list(range(68, 76))
    assert torch.cat(page[:2]).tolist() == [[*first, *plain[at : at + each]] for at in (0, each)]
    with pytest.raises(TextError, match=f"need {(51 // each + 1) * each}"):
        windows(text, "test", model, length=4, count=51 // each + 1)


def test_windows_too_short_for_text_behind_the_first_tokens_are_refused() -> None:
    model = replace(tiny_model(), tokenizer=tiny_tokenizer("<s> <unk> $A"))
    with pytest.raises(TextError, match="no text behind the 2 that .* use a length of at least 3"):
        windows(simple(test=("abc",)), "test", model, length=2, count=1)
    assert page_parts.windows(model.tokenizer, "abc", 2) == []


def test_long_documents_are_tokenized_in_pieces_with_the_ids_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document, model = "prune the model " * 8, tiny_model()
    given: list[int] = []
    whole = windows(simple(test=(document,)), "test", model, length=32, count=4)
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 20)
    tokenizer = model.tokenizer

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text: str, **options: Any) -> Any:
            given.append(len(text))
            return tokenizer(text, **options)

    counting = replace(model, tokenizer=Counting())
    found = windows(simple(test=(document,)), "test", counting, length=32, count=4)
    assert torch.equal(found, whole)
    assert max(given) <= 20 and len(given) > 7


def test_calibration_windows_are_drawn_from_the_whole_split_by_the_seed() -> None:
    text, model = simple(calibration=("abcdefghijklmnopqrst",)), tiny_model()

    def drawn(seed: int) -> list[list[int]]:
        return windows(text, "calibration", model, length=2, count=5, seed=seed).tolist()

    # Ten windows to draw from, "ab" to "st"; "a" is 68.
    every = [[68 + start, 69 + start] for start in range(0, 20, 2)]
    draws = [drawn(seed) for seed in range(20)]
    assert all(draw == [window for window in every if window in draw] for draw in draws)
    assert all(len(draw) == 5 for draw in draws)
    assert {tuple(window) for draw in draws for window in draw} == set(map(tuple, every))
    assert drawn(3) == draws[3] and len({str(draw) for draw in draws}) > 10


@pytest.mark.parametrize("count", [2, 5, 7, 10])
def test_unseen_windows_are_those_that_the_draw_leaves(count: int) -> None:
    text, model = simple(calibration=("abcdefghijklmnopqrst",)), tiny_model()
    every = {(68 + start, 69 + start) for start in range(0, 20, 2)}
    for seed in range(5):
        choice: dict[str, Any] = {"length": 2, "count": count, "seed": seed}
        seen = set(map(tuple, windows(text, "calibration", model, **choice).tolist()))
        unseen = unseen_windows(text, model, **choice)
        left = set(map(tuple, unseen.tolist()))
        assert unseen.shape == (min(count, 10 - count), 2)
        assert left <= every - seen and len(left) == len(unseen)


def test_too_little_text_is_refused_with_both_numbers() -> None:
    with pytest.raises(TextError, match="search split of text 'mine' has 5 tokens .* need 6"):
        windows(simple(search=("abcde",)), "search", tiny_model(), length=3, count=2)


def test_windows_that_make_no_sense_are_refused() -> None:
    text, model = simple(test=("abcdef" * 99,)), tiny_model()
    with pytest.raises(TextError, match="'tset' is not a split; did you mean 'test'"):
        windows(text, "tset", model, length=4, count=1)
    with pytest.raises(TextError, match="0 windows of 4 tokens"):
        windows(text, "test", model, length=4, count=0)
    with pytest.raises(TextError, match="1 windows of 1 tokens"):
        windows(text, "test", model, length=1, count=1)
    with pytest.raises(TextError, match="65 tokens are longer than the 64 positions"):
        windows(text, "test", model, length=LONGEST + 1, count=1)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    text, small = simple(test=("xyz",)), tiny_model(vocab_size=50)
    with pytest.raises(TextError, match="the tokenizer belongs to another model"):
        windows(text, "test", small, length=3, count=1)


def test_leftovers_of_markup_and_short_lines_do_not_reach_the_demo_text() -> None:
    long = "A sentence that is long enough to stay, " * 4
    page = [long, "thumb|350px|" + long, "Short.", "{| " + long, "Category: " + long, "| " + long]
    assert clean("\n".join(page)) == long.strip()


def test_demo_text_without_its_packages_names_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNEZERO_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TextError, match="make setup.*pip install --no-deps gensim"):
        load_text("demo")


def test_a_damaged_copy_of_the_demo_text_is_made_anew_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = tmp_path / "dump.bz2"
    dump.write_bytes(b"it")
    monkeypatch.setattr(demo_text, "_dump_file", lambda: dump)
    monkeypatch.setattr(demo_text, "_articles", lambda found: [found.read_text(), "of letters"])
    assert demo_text.demo_documents() == ["it", "of letters"]
    (copy,) = (tmp_path / "cache" / "text").iterdir()
    copy.write_bytes(copy.read_bytes().replace(b"letters", b"lettErs"))
    with pytest.warns(UserWarning, match="is damaged and is made anew"):
        assert demo_text.demo_documents() == ["it", "of letters"]
    dump.write_bytes(b"IT")
    assert demo_text.demo_documents() == ["IT", "of letters"]


@pytest.mark.slow
def test_the_demo_text_has_91_articles_and_is_built_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNEZERO_CACHE", str(tmp_path))
    text = load_text("demo")
    assert sum(map(len, text.documents.values())) == 91
    assert sum(len(article) for articles in text.documents.values() for article in articles) > 2.9e6
    monkeypatch.setattr(demo_text, "_articles", None)
    assert load_text("demo").fingerprint == text.fingerprint


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x.txt", "x" * 300])
def test_a_name_that_no_file_can_have_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(TextError, match="cannot be read"):
        load_text(name)


def test_a_testbed_holds_out_unseen_windows_first_and_says_where_there_are_none() -> None:
    text, model = simple(calibration=("abcdefghijklmnopqrst",)), tiny_model()
    testbed = Testbed(model, text, Settings(sequence_length=2, calibration_tokens=14))
    unseen = unseen_windows(text, model, length=2, count=7)
    seen = testbed.windows("calibration")
    assert len(unseen) == 3
    assert torch.equal(testbed.held_out, torch.cat([unseen, seen[:4]]))
    whole = Testbed(model, text, Settings(sequence_length=2, calibration_tokens=20))
    with pytest.warns(PruneZeroWarning, match="statistics see the whole calibration split"):
        assert torch.equal(whole.held_out, whole.windows("calibration"))
