"""How do files, folders and hub datasets become documents?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from prunezero.errors import TextError, did_you_mean, reason
from prunezero.models.names import is_spelled_as_path

OWN_SPLITS = ("train", "validation", "test")
COLUMNS = ("text", "content")
# datasets' name of the reader, by file suffix.
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SUFFIXES = (".txt", *READERS)
# A split is read no further: it is far more text than any run uses.
MOST_CHARACTERS = 20_000_000
# Running text without articles is cut into documents of this many characters, or more and shorter
# ones when there is too little of it.
DOCUMENT_CHARACTERS = 2000
FEWEST_DOCUMENTS = 40
# A line that WikiText begins every article with.
ARTICLE_HEADING = re.compile(r"^[ ]?= [^=\n]+ = ?$", re.M)


def read_documents(name: str) -> dict[str, list[str]]:
    """Documents by the source's own splits; all under "train" when it has none.

    Args:
        name: a file, a folder, or a hub dataset id with an optional ":configuration".

    Raises:
        TextError: the source cannot be found or read.
    """
    return _explained(name, lambda: _read(name))


def _read(name: str) -> dict[str, list[str]]:
    path = Path(name).expanduser()
    if path.is_file():
        return {"train": _read_file(path)}
    if path.is_dir():
        return _read_folder(path)
    if is_spelled_as_path(name) or path.suffix in SUFFIXES or not name:
        raise TextError(
            f"there is no text file or folder '{name}'; give one, a hub dataset id, or 'demo'"
        )
    return _read_hub(name)


def _read_folder(folder: Path) -> dict[str, list[str]]:
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise TextError(f"folder '{folder}' holds no {', '.join(SUFFIXES)} file")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_own_split(file.stem), []).append(file)
    return {
        split: [text for file in some for text in _read_file(file, is_one=_are_many(some))]
        for split, some in by_split.items()
    }


def _are_many(files: list[Path]) -> bool:
    """Whether each .txt file may be a document of its own."""
    return len(files) >= FEWEST_DOCUMENTS


def _own_split(stem: str) -> str:
    starts = {"valid": "validation", "dev": "validation", "test": "test"}
    return next((split for start, split in starts.items() if stem.startswith(start)), "train")


def _read_file(path: Path, *, is_one: bool = False) -> list[str]:
    if path.suffix not in SUFFIXES:
        raise TextError(
            f"'{path}' is no text file{did_you_mean(path.suffix, SUFFIXES)}; "
            f"known endings: {', '.join(SUFFIXES)}"
        )
    if path.suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise TextError(
                f"'{path}' cannot be read as UTF-8 text ({reason(error, path)})"
            ) from error
        return [text] if is_one else cut_running_text(text)
    reader = READERS[path.suffix]
    rows = _stream(str(path), reader, data_files={"train": [str(path)]})
    return _documents_of(str(path), rows["train"])


def _read_hub(name: str) -> dict[str, list[str]]:
    dataset, _, configuration = name.partition(":")
    splits = _stream(name, dataset, *([configuration] if configuration else []))
    found = {split: _documents_of(name, splits[split]) for split in splits if split in OWN_SPLITS}
    return found or {"train": _documents_of(name, splits[next(iter(splits))])}


def _stream(name: str, *args: str, **kwargs: Any) -> dict[str, Iterable[dict[str, Any]]]:
    from datasets import load_dataset

    return _explained(name, lambda: load_dataset(*args, streaming=True, **kwargs))


def _documents_of(name: str, rows: Iterable[dict[str, Any]]) -> list[str]:
    """Rows as documents; rows that are lines of one running text are joined and cut anew."""
    texts = _explained(name, lambda: list(_texts(name, rows)))
    if all(text.strip() for text in texts):
        return texts
    # As papers join the rows of WikiText, whose own line ends stay: their perplexities hang on it.
    return cut_running_text("\n\n".join(texts))


def _texts(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    characters = 0
    for row in rows:
        column = next((column for column in COLUMNS if isinstance(row.get(column), str)), None)
        if column is None:
            raise TextError(
                f"text '{name}' has no column {' or '.join(COLUMNS)} with text; "
                f"its columns are {', '.join(row)}"
            )
        yield row[column]
        characters += len(row[column])
        if characters >= MOST_CHARACTERS:
            return


def _explained(name: str, read: Callable[[], Any]) -> Any:
    """Turn whatever the hub, the files or datasets raise into one sentence."""
    try:
        return read()
    except TextError:
        raise
    except Exception as error:
        raise TextError(f"text '{name}' cannot be read ({reason(error, name)})") from error


def cut_running_text(text: str) -> list[str]:
    """Cut one running text into documents: at article headings, else between paragraphs."""
    starts = [match.start() for match in ARTICLE_HEADING.finditer(text)]
    if len(starts) >= FEWEST_DOCUMENTS:
        ends = [*starts[1:], len(text)]
        return [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    target = max(1, min(DOCUMENT_CHARACTERS, len(text) // FEWEST_DOCUMENTS))
    documents: list[str] = []
    pieces: list[str] = []
    for paragraph in _paragraphs(text, target):
        pieces.append(paragraph)
        if sum(map(len, pieces)) >= target:
            documents.append("\n\n".join(pieces))
            pieces = []
    return [*documents, "\n\n".join(pieces)] if pieces else documents


def _paragraphs(text: str, target: int) -> list[str]:
    """Paragraphs between blank lines; lines, then pieces of words, when there are too few."""
    paragraphs: list[str] = []
    for pattern in (r"\n\s*\n", r"\n"):
        paragraphs = [part.strip() for part in re.split(pattern, text) if part.strip()]
        if len(paragraphs) >= FEWEST_DOCUMENTS:
            return paragraphs
    words = iter(text.split())
    pieces: list[str] = []
    # About six characters a word, blank included.
    while some := list(islice(words, max(1, target // 6))):
        pieces.append(" ".join(some))
    return pieces if len(pieces) > len(paragraphs) else paragraphs
