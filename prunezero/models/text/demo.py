"""Where does the demo text come from?

From the excerpt of Wikipedia that the gensim package carries for its own tests.
The package is found but never imported. Its articles are stripped of markup once, and kept in the
cache as one file.
"""

from __future__ import annotations

import bz2
import importlib.util
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from prunezero.errors import PruneZeroWarning, TextError
from prunezero.files.atomic import replace_bytes
from prunezero.files.cache import cache_dir
from prunezero.files.checked_lines import line_of, record_of
from prunezero.files.digests import joined_digest
from prunezero.files.file_digests import digest_of_file

DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
# Raise it when an article would come out differently.
RULES_VERSION = 1
# Shorter lines are headings, captions and lists; shorter articles are stubs.
SHORTEST_LINE = 120
SHORTEST_ARTICLE = 2000
# What stays of images, tables and categories when their markup is stripped.
LEFTOVERS = re.compile(r"thumb\||\||\{\{|\}\}|\[\[|\]\]|^\s*[{!]|^\s*(Category|File|Image):", re.I)

ADVICE = "run `make setup`, or `pip install --no-deps gensim` and `pip install mwparserfromhell`"


def demo_documents() -> list[str]:
    """The articles of the demo text, each a run of plain paragraphs.

    Raises:
        TextError: the packages it is made from are not installed.
    """
    dump = _dump_file()
    key = joined_digest([digest_of_file(dump), _parser_version(), str(RULES_VERSION)])
    path = cache_dir() / "text" / f"demo-{key}.json"
    known = record_of(path.read_bytes().rstrip(b"\n")) if path.is_file() else None
    if known is None:
        if path.is_file():
            warnings.warn(f"{path} is damaged and is made anew", PruneZeroWarning, stacklevel=2)
        known = {"articles": list(_articles(dump))}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(line_of(known), path)
    return list(known["articles"])


def _parser_version() -> str:
    """Of who strips the markup, or nothing where it is not installed."""
    is_there = importlib.util.find_spec("mwparserfromhell") is not None
    return version("mwparserfromhell") if is_there else ""


def _dump_file() -> Path:
    package = importlib.util.find_spec("gensim")
    if package is None or package.origin is None:
        raise TextError(f"the demo text is not installed; {ADVICE}")
    path = Path(package.origin).parent / DUMP
    if not path.is_file():
        raise TextError(f"{path} is missing, which the demo text is made from; {ADVICE}")
    return path


def _articles(dump: Path) -> Iterator[str]:
    if importlib.util.find_spec("mwparserfromhell") is None:
        raise TextError(f"the demo text is read by a package that is not installed; {ADVICE}")
    import mwparserfromhell

    with bz2.open(dump, "rb") as file:
        for markup in _pages(file):
            article = clean(mwparserfromhell.parse(markup).strip_code())
            if len(article) >= SHORTEST_ARTICLE:
                yield article


def _pages(file: Any) -> Iterator[str]:
    """Markup of every page that is an article and no redirect."""
    for _, element in ElementTree.iterparse(file):
        if element.tag.endswith("}page"):
            is_article = element.findtext("{*}ns") == "0"
            if is_article and element.find("{*}redirect") is None:
                yield element.findtext("{*}revision/{*}text") or ""
            # The tree would otherwise grow to the whole dump.
            element.clear()


def clean(text: str) -> str:
    """The long lines of a stripped page, without leftovers of markup."""
    lines = (line.strip() for line in text.splitlines())
    kept = [line for line in lines if len(line) > SHORTEST_LINE and not LEFTOVERS.search(line)]
    return "\n".join(kept)
