"""What becomes of sources that are not as clean as they should be."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import TextError
from prunezero.models.text import rows as text_rows
from prunezero.models.text.running_text import are_lines, cut_running_text
from prunezero.models.text.sources import read_source
from prunezero.models.text.splits import SPLITS, Text, load_text

# Three paragraphs each, so that a document that is cut is seen to be.
DOCUMENTS = [f"First {place}.\n\nSecond {place}.\n\nThird {place}." for place in range(240)]
ROWS: list[Any] = [{"text": document} for document in DOCUMENTS]


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def placed(text: Text) -> list[str]:
    """All documents, one after another."""
    return [document for split in SPLITS for document in text.documents[split]]


@pytest.mark.parametrize(
    "odd",
    [
        {"text": ""},
        {"text": " \n "},
        {"text": None},
        {"url": "x"},
        {"text": 5},
        {"text": ["a", "b"]},
        {"text": {"a": "b"}},
        {},
        None,
        7,
    ],
    ids=str,
)
@pytest.mark.parametrize("place", [0, 120, 240])
def test_a_row_without_text_is_left_out_told_once_and_changes_no_other(
    odd: Any, place: int, tmp_path: Path
) -> None:
    clean = load_text(write_rows(tmp_path / "clean.jsonl", ROWS))
    rows = [*ROWS[:place], odd, odd, *ROWS[place:]]
    text = load_text(write_rows(tmp_path / "odd.jsonl", rows))
    assert text.documents == clean.documents
    assert text.notes == ("rows without text (null, empty or missing) are left out: 2",)
    assert clean.notes == ()


def test_many_rows_without_text_do_not_make_lines_of_documents(tmp_path: Path) -> None:
    rows = [one for row in ROWS for one in (row, {"text": ""})]
    assert sorted(placed(load_text(write_rows(tmp_path / "a.jsonl", rows)))) == sorted(DOCUMENTS)


def wiki_rows(articles: int) -> list[str]:
    lines = (" = Title {} = \n", "", " Body {} .\n", " = = Part {} = = \n", "", " More {} .\n")
    return [line.format(place) for place in range(articles) for line in lines]


def test_an_odd_row_among_the_lines_of_wikitext_leaves_them_lines(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": line} for line in wiki_rows(50)]
    source = read_source(write_rows(tmp_path / "a.jsonl", [*rows, {"text": "a\n\nb"}, {}]))
    assert len(source.documents["train"]) == 50
    assert source.guesses == [
        "rows are lines of running text, which is cut at the headings of articles"
    ]


@pytest.mark.parametrize("odd", [" = Title = \n", "a\nb", ""])
def test_documents_of_one_line_stay_documents(odd: str) -> None:
    assert are_lines(wiki_rows(50))
    assert not are_lines([*(f"Document {place}." for place in range(240)), odd])


@pytest.mark.parametrize("column", ["content", "Text", "body"])
def test_the_column_is_told_when_it_is_not_text(column: str, tmp_path: Path) -> None:
    rows = [{column: document, "length": 9} for document in DOCUMENTS]
    text = load_text(write_rows(tmp_path / "a.jsonl", rows))
    assert sorted(placed(text)) == sorted(DOCUMENTS)
    assert text.notes == (f"documents stand in column '{column}'",)


def test_one_row_does_not_choose_the_column(tmp_path: Path) -> None:
    for column in ("content", "body"):
        rows = [{column: document} for document in DOCUMENTS]
        odds: list[Any] = [{"text": "odd"}, {"text": None}, {"title": "odd"}]
        for odd in odds:
            source = read_source(write_rows(tmp_path / "a.jsonl", [odd, *rows]))
            assert (source.documents["train"], source.left_out) == (DOCUMENTS, 1)
    both = [{"text": document, "content": "c"} for document in DOCUMENTS]
    source = read_source(write_rows(tmp_path / "b.jsonl", [{"text": None, "content": "c"}, *both]))
    assert (source.documents["train"], source.left_out) == (DOCUMENTS, 1)


def test_of_several_unknown_columns_none_is_guessed(tmp_path: Path) -> None:
    name = write_rows(tmp_path / "a.jsonl", [{"title": "t", "body": "b"}])
    with pytest.raises(TextError, match="no column text or content .* columns are title, body"):
        load_text(name)
    with pytest.raises(TextError, match="is empty"):
        load_text(write_rows(tmp_path / "b.jsonl", [{"text": None, "url": "x"}] * 3))


def test_parquet_holds_text_as_bytes_too_and_one_bad_row_is_left_out(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    values = [*(document.encode() for document in DOCUMENTS), b"\xff", None]
    table = {"text": values, "title": [b"t"] * 242, "pictures": [[1, 2]] * 242}
    parquet.write_table(pyarrow.table(table), tmp_path / "A.PARQUET")
    source = read_source(str(tmp_path / "A.PARQUET"))
    assert (source.documents, source.left_out) == ({"train": DOCUMENTS}, 2)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json", "A.JSONL", "a.txt"])
def test_packed_files_are_read(ending: str, name: str, tmp_path: Path) -> None:
    plain, packed = tmp_path / name, tmp_path / f"{name}{ending}"
    write_rows(plain, ROWS)
    packed.write_bytes(PACKERS[ending](plain.read_bytes()))
    assert read_source(str(packed)).documents == read_source(str(plain)).documents
    # The first half of a download.
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(TextError, match="cannot be read"):
        read_source(str(packed))


def test_zstandard_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(data)
    assert read_source(str(tmp_path / "a.jsonl.zst")).documents == {"train": DOCUMENTS}


@pytest.mark.parametrize("indent", [None, 2])
def test_one_array_of_rows_is_read_like_rows(indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=indent))
    (tmp_path / "b.json").write_text(json.dumps(DOCUMENTS, indent=indent))
    for name in ("a.json", "b.json"):
        assert read_source(str(tmp_path / name)).documents == {"train": DOCUMENTS}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.jsonl"])
def test_byte_order_marks_are_read_and_no_part_of_the_text(
    encoding: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
    text = rows if name.endswith("l") else "\r\n\r\n".join(f"Überschrift {i}" for i in range(60))
    path.write_bytes(text.encode("utf-8"))
    plain = read_source(str(path)).documents
    path.write_bytes(text.encode(encoding))
    assert read_source(str(path)).documents == plain
    assert "\ufeff" not in str(plain) and "\r" not in str(plain)


def test_halves_of_characters_become_question_marks(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b"}\n')
    assert read_source(str(tmp_path / "a.jsonl")).documents == {"train": ["a ? b"]}


@pytest.mark.parametrize(
    "name", ["d[12].jsonl", "d*.jsonl", "d?.jsonl", "{d,e}.jsonl", "a::b.jsonl"]
)
def test_a_name_is_that_file_and_no_pattern(name: str, tmp_path: Path) -> None:
    for other in ("d1.jsonl", "d2.jsonl", "d.jsonl", "e.jsonl"):
        write_rows(tmp_path / other, [{"text": "another"}])
    assert read_source(write_rows(tmp_path / name, ROWS)).documents == {"train": DOCUMENTS}
    folder = tmp_path / "[ab]*"
    folder.mkdir()
    write_rows(folder / name, ROWS)
    assert read_source(str(folder)).documents == {"train": DOCUMENTS}


def test_a_folder_of_equal_files_puts_no_document_into_two_splits(tmp_path: Path) -> None:
    paragraphs = "\n\n".join(f"Paragraph {place} " + "goes on " * 60 for place in range(80))
    for name in ("train.txt", "validation.txt", "test.txt"):
        (tmp_path / name).write_text(paragraphs)
    text = load_text(str(tmp_path))
    assert all(text.documents.values())
    assert len(placed(text)) == len(set(placed(text)))
    assert "paragraphs that a later split has too are left out: 160" in text.notes
    assert "so all are divided anew" in "; ".join(text.notes)


def test_a_text_that_holds_another_loses_its_paragraphs(tmp_path: Path) -> None:
    every = [f"Paragraph {place} " + "goes on " * 30 for place in range(200)]
    (tmp_path / "train.txt").write_text("\n\n".join(["Title", *every]))
    (tmp_path / "test.txt").write_text("\n\n".join(["Title", *every[90:150]]))
    text = load_text(str(tmp_path))
    held = {split: set("\n\n".join(texts).split("\n\n")) for split, texts in text.documents.items()}
    assert held["test"] == {"Title", *(one.strip() for one in every[90:150])}
    assert all(held["test"].isdisjoint(held[split]) for split in SPLITS[:3])
    # A title alone is nothing in common.
    (tmp_path / "train.txt").write_text("\n\n".join(["Title", *every[:90]]))
    notes = load_text(str(tmp_path)).notes
    assert not any("left out" in note for note in notes)


@pytest.mark.parametrize("running", ["train", "test"])
def test_rows_and_running_text_with_the_same_paragraphs_share_none_between_splits(
    running: str, tmp_path: Path
) -> None:
    every = [f"Paragraph {place} " + "goes on " * 30 for place in range(200)]
    of = {"train": every[:150], "test": every[90:]}
    (tmp_path / f"{running}.txt").write_text("\n\n".join(of.pop(running)))
    ((other, rest),) = of.items()
    write_rows(tmp_path / f"{other}.jsonl", [{"text": one} for one in rest])
    text = load_text(str(tmp_path))
    held = {split: set("\n\n".join(texts).split("\n\n")) for split, texts in text.documents.items()}
    assert {one.strip() for one in held["test"]} == {one.strip() for one in every[90:]}
    assert sum(len(held[split]) for split in SPLITS) == 200
    assert "paragraphs that a later split has too are left out: 60" in text.notes


def test_the_later_split_keeps_what_several_hold(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "valid.jsonl", [*ROWS[:3], ROWS[200], ROWS[200]])
    spaced: list[Any] = [{"text": DOCUMENTS[2].replace("\n", "\r\n") + " "}, {"text": "new"}]
    write_rows(tmp_path / "Test.jsonl", spaced)
    text = load_text(str(tmp_path))
    assert text.documents["test"] == tuple(row["text"] for row in spaced)
    assert text.documents["validation"] == (*DOCUMENTS[:2], DOCUMENTS[200])
    trained = [*text.documents["calibration"], *text.documents["search"]]
    assert sorted(trained) == sorted({*DOCUMENTS} - {*DOCUMENTS[:3], DOCUMENTS[200]})
    assert text.notes == (
        "test split: Test.jsonl; train split: train.jsonl; validation split: valid.jsonl",
        "documents that come again are kept once, in the latest split that holds them: 6 left out",
    )


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test-00000-of-00001.jsonl", "test"),
        ("c4-validation.00000-of-00008.json", "validation"),
        ("wiki.valid.jsonl", "validation"),
        ("DEV.JSONL", "validation"),
        ("test1.jsonl", "test"),
        ("test/part-0.jsonl", "test"),
        ("test/train.jsonl", "train"),
        ("testimony.jsonl", "train"),
        ("device.jsonl", "train"),
        ("values.jsonl", "train"),
        ("train-and-test.jsonl", "train"),
    ],
)
def test_a_split_is_a_whole_word_of_a_name(name: str, split: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_rows(tmp_path / name, ROWS)
    assert list(read_source(str(tmp_path)).documents) == [split]


def test_what_lies_in_a_folder_beside_its_text_is_no_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "test.txt").mkdir()
    (tmp_path / "empty.jsonl").touch()
    assert read_source(str(tmp_path)).documents == {"train": DOCUMENTS}
    (tmp_path / "link.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(TextError, match="No such file"):
        read_source(str(tmp_path))


def test_many_rows_are_enough_however_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_rows, "MOST_ROWS", 100)
    source = read_source(write_rows(tmp_path / "a.jsonl", ROWS))
    assert source.documents == {"train": DOCUMENTS[:100]}
    assert source.guesses == ["the first 100 rows are more than enough"]


@pytest.mark.parametrize(
    "text", ["天地玄黄" * 100_000, "a\n" * 60 + "long " * 100_000, "x" * 200_000]
)
def test_endless_lines_and_words_are_cut_and_nothing_is_lost(text: str) -> None:
    pieces, _ = cut_running_text(text)
    assert len(pieces) > 40
    assert max(map(len, pieces)) < 10_000
    assert "".join("".join(pieces).split()) == "".join(text.split())


MEASURE = """
import resource
from prunezero.models.text.splits import Text, windows
from tests.tiny_models import tiny_model
model = tiny_model()
windows(Text("a", {"test": ("prune " * 20,)}, ""), "test", model, length=32, count=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
line = "".join(map(str, range(500_000)))
windows(Text("a", {"calibration": (line,)}, ""), "calibration", model, length=32, count=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_line_of_three_million_characters_takes_little_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    # Kibibytes; tokenized at once it takes a gigabyte.
    assert int(done.stdout) < 300_000


def test_local_text_needs_no_cache_of_the_hub(tmp_path: Path) -> None:
    name = write_rows(tmp_path / "a.jsonl", ROWS)
    program = (
        "import sys; from prunezero.models.text.splits import load_text; load_text(sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", program, name],
        check=True,
        env={**os.environ, "HF_HOME": "/proc/none"},
    )
