"""Which rows does a local file hold, and which column of them is text?

A row is whatever stands between two others: what holds no text is told by its absence, and never
decides how the others are read.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from prunezero.errors import TextError

COLUMNS = ("text", "content")
# A split is read no further: it is far more text than any run uses.
MOST_CHARACTERS = 20_000_000
MOST_ROWS = 1_000_000
# The column is chosen by the first rows: so many with text, or at most so many in all.
ROWS_WITH_TEXT = 1000
ROWS_TO_JUDGE_BY = 100_000
# What fewer than this fraction of the rows have says nothing about the others.
ODD = 0.1
# Longer byte order marks first: that of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _open_zstandard(path: Path, mode: str = "rb") -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(path.open(mode), "zstd"))


_OPENERS: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


@dataclass(frozen=True)
class Rows:
    """The text of each row."""

    texts: list[str]
    """in order; blank where a row holds no text"""
    column: str
    """in which the text stands"""
    is_whole: bool
    """False where reading stopped because there was more than enough"""


def ending_of(path: Path) -> str:
    """How the name of a file ends, in lower case and without the ending of its compression."""
    if path.suffix.lower() in _OPENERS:
        path = path.with_suffix("")
    return path.suffix.lower()


def is_compressed(path: Path) -> bool:
    """Whether the name of a file says that its bytes are packed."""
    return path.suffix.lower() in _OPENERS


def open_text(path: Path) -> IO[str]:
    """A file as text: unpacked, decoded by its byte order mark, else UTF-8."""
    opener = _OPENERS.get(path.suffix.lower())
    file = opener(path) if opener else path.open("rb")
    head = file.peek(4)
    encodings = (word for mark, word in _BYTE_ORDER_MARKS.items() if head.startswith(mark))
    return io.TextIOWrapper(file, encoding=next(encodings, "utf-8"))


def json_rows(path: Path) -> Iterator[Any]:
    """Rows of a file with one JSON value in each line, or with one array of all.

    Raises:
        ValueError: it is neither.
    """
    with open_text(path) as file:
        numbered = ((place, line) for place, line in enumerate(file, start=1) if line.strip())
        first = next(numbered, None)
        if first is None:
            return
        second = next(numbered, None)
        if second is None or not _is_json(first[1]):
            whole = "".join([first[1], *([second[1]] if second else []), *file])
            value = _parsed(whole, "it")
            yield from value if isinstance(value, list) else [value]
            return
        for place, line in chain((first, second), numbered):
            yield _parsed(line, f"line {place}")


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, of which the columns that could be text are read."""
    from pyarrow import parquet, types

    with path.open("rb") as file:
        table = parquet.ParquetFile(file)
        # Pictures and lists of numbers are long.
        short = [field for field in table.schema_arrow if not types.is_nested(field.type)]
        known = [field.name for field in short if field.name.lower() in COLUMNS]
        columns = known or [field.name for field in short]
        for batch in table.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()


def read_rows(name: str, rows: Iterable[Any]) -> Rows:
    """The texts of rows, read until there is more than enough.

    The column is text or content (the first that holds text in at least half as many rows as the
    other), else the only one with text in it.

    Raises:
        TextError: no column can be chosen.
    """
    rest = iter(rows)
    first = list(_first_rows(rest))
    column = _column(name, first)
    texts: list[str] = []
    characters = 0
    every = chain(first, rest)
    for row in every:
        texts.append(_text(_columns(row).get(column)))
        characters += len(texts[-1])
        if characters >= MOST_CHARACTERS or len(texts) >= MOST_ROWS:
            return Rows(texts, column, is_whole=next(every, None) is None)
    return Rows(texts, column, is_whole=True)


def _first_rows(rows: Iterator[Any]) -> Iterator[Any]:
    """Rows to choose a column by, taken from the iterator."""
    found = characters = 0
    for place, row in enumerate(rows, start=1):
        yield row
        known = [_text(value) for key, value in _columns(row).items() if key.lower() in COLUMNS]
        found += any(text.strip() for text in known)
        characters += sum(map(len, known))
        if found >= ROWS_WITH_TEXT or place >= ROWS_TO_JUDGE_BY or characters >= MOST_CHARACTERS:
            return


def _column(name: str, rows: list[Any]) -> str:
    """The column of the text, chosen by what is no oddity of a few rows."""
    present, filled = Counter[str](), Counter[str]()
    for row in rows:
        columns = _columns(row)
        present.update(columns.keys())
        filled.update(key for key, value in columns.items() if _text(value).strip())
    fewest = ODD * sum(bool(_columns(row)) for row in rows)
    known = [key for key, count in present.items() if key.lower() in COLUMNS and count >= fewest]
    most = max((filled[key] for key in known), default=0)
    # Known columns that are blank everywhere: the source is empty, and no other column stands in.
    chosen = sorted((key for key in known if 2 * filled[key] >= most), key=_rank)
    chosen = chosen or [key for key, count in filled.items() if count >= fewest]
    if not rows:
        return COLUMNS[0]
    if known or len(chosen) == 1:
        return chosen[0]
    told = f"its columns are {', '.join(present)}" if present else "its rows have no columns"
    raise TextError(f"text '{name}' has no column {' or '.join(COLUMNS)} with text; {told}")


def _rank(column: str) -> tuple[int, bool]:
    return COLUMNS.index(column.lower()), column not in COLUMNS


def _columns(row: Any) -> Mapping[str, Any]:
    """A row's columns; a row that is but text has one called text."""
    if isinstance(row, str):
        return {COLUMNS[0]: row}
    return row if isinstance(row, Mapping) else {}


def _text(value: Any) -> str:
    """A value as text; nothing where it is none."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8-sig")
        except UnicodeDecodeError:
            return ""
    if not isinstance(value, str):
        return ""
    # JSON can spell halves of characters, which no tokenizer takes.
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{what} is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {error}") from error
