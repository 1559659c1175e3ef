"""How do files, folders and hub datasets become documents, and what was guessed on the way?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunezero.errors import TextError, did_you_mean, reason
from prunezero.models.loading.names import is_spelled_as_path
from prunezero.models.text.rows import (
    COLUMNS,
    ending_of,
    is_compressed,
    json_rows,
    open_text,
    parquet_rows,
    read_rows,
)
from prunezero.models.text.running_text import (
    FEWEST_DOCUMENTS,
    are_lines,
    cut_running_text,
    paragraph_digests,
    without_paragraphs,
)

OWN_SPLITS = ("train", "validation", "test")
READERS: Mapping[str, Callable[[Path], Iterable[Any]]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".parquet": parquet_rows,
}
SUFFIXES = (".txt", *READERS)
# A whole word of a name that says which split it holds.
_SPLIT_WORD = re.compile(
    r"(?<![a-z])(?:(train)|(valid|val|dev)|(test))(?:ing|ation|elopment|s)?(?:[-_ ]?set)?(?![a-z])",
    re.I,
)
# More are counted, not named.
_MOST_NAMES = 3


@dataclass
class TextSource:
    """Documents, and what a reader should know of how they came about."""

    documents: dict[str, list[str]] = field(default_factory=dict)
    """by the source's own splits; all under "train" when it has none"""
    guesses: list[str] = field(default_factory=list)
    """each in a few words, none twice"""
    left_out: int = 0
    """rows and files without text"""
    repeated: int = 0
    """paragraphs that a later split has too, which are left out"""
    read: set[bytes] = field(default_factory=set)
    """digests of the paragraphs of files of a split"""
    known: set[bytes] = field(default_factory=set)
    """of these those in later splits than the one being read"""

    def guess(self, words: str) -> None:
        """Keep what was guessed, unless it is known already."""
        if words not in self.guesses:
            self.guesses.append(words)


def read_source(name: str) -> TextSource:
    """The documents of a source.

    Args:
        name: a file, a folder, or a hub dataset id with an optional ":configuration".

    Raises:
        TextError: the source cannot be found or read.
    """
    source = TextSource()
    _explained(name, lambda: _read(name, source))
    return source


def _read(name: str, source: TextSource) -> None:
    path = Path(name).expanduser()
    # An empty name would be that of the folder at hand.
    is_named = bool(name.strip())
    if is_named and path.is_file():
        source.documents["train"] = _read_file(path, source)
    elif is_named and path.is_dir():
        _read_folder(path, source)
    elif is_spelled_as_path(name) or ending_of(path) in SUFFIXES or not is_named:
        raise TextError(
            f"there is no text file or folder '{name}'; give one, a hub dataset id, or 'demo'"
        )
    else:
        _read_hub(name, source)


def _read_folder(folder: Path, source: TextSource) -> None:
    files = _text_files(folder.iterdir())
    if not files:
        files = _text_files(folder.rglob("*"))
    if not files:
        raise TextError(f"folder '{folder}' holds no {', '.join(SUFFIXES)} file")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_own_split(file.relative_to(folder)), []).append(file)
    if list(by_split) != ["train"]:
        told = (f"{split} split: {_names(some, folder)}" for split, some in by_split.items())
        source.guess("; ".join(told))
    elif len(files) > 1:
        source.guess(f"read from {_names(files, folder)}")
    for split in sorted(by_split, key=OWN_SPLITS.index, reverse=True):
        some = by_split[split]
        # Whether each .txt file may be a document of its own.
        are_documents = len(some) >= FEWEST_DOCUMENTS
        source.documents[split] = [
            text
            for file in some
            for text in _read_file(file, source, is_one=are_documents, are_split=len(by_split) > 1)
        ]
        source.known |= source.read


def _text_files(paths: Iterable[Path]) -> list[Path]:
    """Files of known endings, without those of editors and file systems; broken links too."""
    return sorted(
        path
        for path in paths
        if ending_of(path) in SUFFIXES
        and not path.name.startswith(".")
        and (path.is_file() or path.is_symlink())
        and not path.is_dir()
    )


def _names(files: Sequence[Path], folder: Path) -> str:
    names = [str(file.relative_to(folder)) for file in files]
    if len(names) > _MOST_NAMES:
        return f"{len(names)} files from {names[0]} to {names[-1]}"
    return ", ".join(names)


def _own_split(path: Path) -> str:
    """The split that a name speaks of, or the nearest folder above; a name may speak of none."""
    for part in reversed(path.parts):
        spoken = [match for match in _SPLIT_WORD.finditer(part)]
        splits = {OWN_SPLITS[(match.lastindex or 1) - 1] for match in spoken}
        if len(splits) == 1:
            return splits.pop()
    return "train"


def _read_file(
    path: Path, source: TextSource, *, is_one: bool = False, are_split: bool = False
) -> list[str]:
    ending = ending_of(path)
    if ending not in SUFFIXES or (ending == ".parquet" and is_compressed(path)):
        raise TextError(
            f"'{path}' is no text file{did_you_mean(path.suffix, SUFFIXES)}; "
            f"known endings: {', '.join(SUFFIXES)}, and .gz, .bz2, .xz or .zst behind"
        )
    if ending != ".txt":
        documents = _documents_of(str(path), READERS[ending](path), source)
        return _without_known(documents, source) if are_split else documents
    try:
        with open_text(path) as file:
            text = file.read()
    except (UnicodeError, OSError, EOFError) as error:
        raise TextError(f"'{path}' cannot be read as UTF-8 text ({reason(error, path)})") from error
    if is_one:
        source.guess("each .txt file is a document")
        documents = _with_text([text], source)
        return _without_known(documents, source) if are_split else documents
    text, repeated = without_paragraphs(text, source.known)
    source.repeated += repeated
    if are_split:
        source.read |= paragraph_digests(text)
    documents, where = cut_running_text(text)
    source.guess(f"running text is cut {where}")
    return documents


def _without_known(documents: list[str], source: TextSource) -> list[str]:
    """Those of which a later split does not hold every paragraph."""
    kept = []
    for document in documents:
        rest, repeated = without_paragraphs(document, source.known)
        if rest or not repeated:
            kept.append(document)
            source.read |= paragraph_digests(document)
        else:
            source.repeated += repeated
    return kept


def _read_hub(name: str, source: TextSource) -> None:
    from datasets import load_dataset

    dataset, _, configuration = name.partition(":")
    splits = load_dataset(dataset, *([configuration] if configuration else []), streaming=True)
    own = [split for split in splits if split in OWN_SPLITS]
    if not own:
        own = [next(iter(splits))]
    if left := [split for split in splits if split not in own]:
        source.guess(f"of its splits {', '.join(own)} without {', '.join(left)}")
    for split in own:
        place = split if split in OWN_SPLITS else "train"
        source.documents[place] = _documents_of(name, splits[split], source)


def _documents_of(name: str, rows: Iterable[Any], source: TextSource) -> list[str]:
    """Rows as documents; rows that are lines of one running text are joined and cut anew."""
    read = _explained(name, lambda: read_rows(name, rows))
    if read.column != COLUMNS[0]:
        source.guess(f"documents stand in column '{read.column}'")
    if not read.is_whole:
        source.guess(f"the first {len(read.texts):,} rows are more than enough")
    if not are_lines(read.texts):
        return _with_text(read.texts, source)
    # As papers join the rows of WikiText, whose own line ends stay: their perplexities hang on it.
    documents, where = cut_running_text("\n\n".join(read.texts))
    source.guess(f"rows are lines of running text, which is cut {where}")
    return documents


def _with_text(texts: Sequence[str], source: TextSource) -> list[str]:
    """Those with text in them; the others are counted."""
    found = [text for text in texts if text.strip()]
    source.left_out += len(texts) - len(found)
    return found


def _explained(name: str, read: Callable[[], Any]) -> Any:
    """Turn whatever the hub, the files or datasets raise into one sentence."""
    try:
        return read()
    except TextError:
        raise
    except Exception as error:
        raise TextError(f"text '{name}' cannot be read ({reason(error, name)})") from error
