"""Where is running text cut into documents?

At the headings of its articles, else between paragraphs, lines or words, whichever gives enough.
A document never hangs on how long a line or a paragraph is: endless ones are cut as well.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence, Set
from itertools import chain, islice

# Running text without articles is cut into documents of this many characters, or more and shorter
# ones when there is too little of it.
DOCUMENT_CHARACTERS = 2000
FEWEST_DOCUMENTS = 40
# What is longer is no paragraph and no word, and is cut by itself.
PARAGRAPH_CHARACTERS = 100_000
WORD_CHARACTERS = 1000
# A line that WikiText begins every article with.
ARTICLE_HEADING = re.compile(r"^[ ]?= [^=\n]+ = ?$", re.M)
# Such a line, or one that it begins a part of an article with.
_ANY_HEADING = re.compile(r" ?(?:= )+[^=\n]+(?: =)+ ?\n?")
# Of WikiText's rows a third are blank, and a third of the others are headings.
_FEWEST_BLANK = 0.1
_FEWEST_HEADINGS = 0.02
_FEWEST_SINGLE = 0.99
# A paragraph that two texts do not share by chance.
_TELLING_CHARACTERS = 100


def cut_running_text(text: str) -> tuple[list[str], str]:
    """Documents of one running text, and in words where it was cut."""
    starts = [match.start() for match in ARTICLE_HEADING.finditer(text)]
    if len(starts) >= FEWEST_DOCUMENTS:
        ends = [*starts[1:], len(text)]
        articles = [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        return articles, "at the headings of articles"
    target = max(1, min(DOCUMENT_CHARACTERS, len(text) // FEWEST_DOCUMENTS))
    paragraphs, where = _paragraphs(text, target)
    return list(_gathered(paragraphs, target)), where


def are_lines(rows: Sequence[str]) -> bool:
    """Whether rows are the lines of one running text, as those of WikiText are.

    Many are blank, many are headings, and hardly one has a line end inside. No few rows can make
    documents into lines, or lines into documents.
    """
    full = [row for row in rows if row.strip()]
    headings = sum(len(row) < WORD_CHARACTERS and bool(_ANY_HEADING.fullmatch(row)) for row in full)
    single = sum("\n" not in row.strip() for row in full)
    return (
        len(full) >= FEWEST_DOCUMENTS
        and len(rows) - len(full) >= _FEWEST_BLANK * len(rows)
        and headings >= max(1, _FEWEST_HEADINGS * len(full))
        and single >= _FEWEST_SINGLE * len(full)
    )


def content_digest(text: str) -> bytes:
    """A digest of all but white space, in parts because words take far more memory than text."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(text), PARAGRAPH_CHARACTERS):
        digest.update("".join(text[start : start + PARAGRAPH_CHARACTERS].split()).encode())
    return digest.digest()


def paragraph_digests(text: str) -> set[bytes]:
    """What `without_paragraphs` knows the paragraphs and lines of a text by."""
    parts = chain(_split(r"\n\s*\n", text), _split(r"\n", text))
    return {content_digest(part) for part in parts}


def without_paragraphs(text: str, known: Set[bytes]) -> tuple[str, int]:
    """The text without paragraphs that another has too, and how many these are.

    Short ones, such as the number of a chapter, tell nothing: without a long one in common, texts
    have nothing in common.
    """
    if not any(
        len(one) >= _TELLING_CHARACTERS and content_digest(one) in known for one in _parts(text)
    ):
        return text, 0
    parts = list(_parts(text))
    kept = [part for part in parts if content_digest(part) not in known]
    return "\n\n".join(kept), len(parts) - len(kept)


def _parts(text: str) -> Iterator[str]:
    """Paragraphs, or lines when there are too few."""
    are_paragraphs = _are_enough(_split(r"\n\s*\n", text))
    return _split(r"\n\s*\n" if are_paragraphs else r"\n", text)


def _gathered(paragraphs: Iterator[str], target: int) -> Iterator[str]:
    """Paragraphs joined until they have `target` characters."""
    some: list[str] = []
    for paragraph in paragraphs:
        some.append(paragraph)
        if sum(map(len, some)) >= target:
            yield "\n\n".join(some)
            some = []
    if some:
        yield "\n\n".join(some)


def _paragraphs(text: str, target: int) -> tuple[Iterator[str], str]:
    """Paragraphs between blank lines; lines, then pieces of words, when there are too few."""
    known = {r"\n\s*\n": "between paragraphs", r"\n": "between lines"}
    for pattern, where in known.items():
        if _are_enough(_split(pattern, text)):
            return _shortened(_split(pattern, text)), where
    lines, pieces = list(_split(r"\n", text)), list(_pieces(text, target))
    if len(pieces) > len(lines):
        return iter(pieces), "between words"
    return iter(lines), "between lines"


def _are_enough(parts: Iterator[str]) -> bool:
    return sum(1 for _ in islice(parts, FEWEST_DOCUMENTS)) == FEWEST_DOCUMENTS


def _split(pattern: str, text: str) -> Iterator[str]:
    """What stands between matches, one part at a time, without blank parts."""
    start = 0
    for match in re.finditer(pattern, text):
        if part := text[start : match.start()].strip():
            yield part
        start = match.end()
    if part := text[start:].strip():
        yield part


def _shortened(paragraphs: Iterator[str]) -> Iterator[str]:
    for paragraph in paragraphs:
        if len(paragraph) <= PARAGRAPH_CHARACTERS:
            yield paragraph
        else:
            yield from _pieces(paragraph, DOCUMENT_CHARACTERS)


def _pieces(text: str, target: int) -> Iterator[str]:
    """Runs of words of about `target` characters; an endless word is cut inside."""
    # About six characters a word, blank included.
    most = max(1, target // 6)
    words: list[str] = []
    for match in re.finditer(r"\S+", text):
        start, end = match.span()
        is_endless = end - start > WORD_CHARACTERS
        if words and (is_endless or len(words) == most):
            yield " ".join(words)
            words = []
        if is_endless:
            yield from (text[at : min(at + target, end)] for at in range(start, end, target))
        else:
            words.append(match[0])
    if words:
        yield " ".join(words)
