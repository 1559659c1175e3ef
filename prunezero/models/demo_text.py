"""Where does the demo text come from?

From the excerpt of Wikipedia that the gensim package carries for its own tests.
The package is found but never imported. Its articles are stripped of markup once, and kept in the
cache as one file.
"""

from __future__ import annotations

import bz2
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from prunezero.errors import TextError
from prunezero.models.cache import cache_dir

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
    key = f"{dump.stat().st_size} {RULES_VERSION}".encode()
    digest = hashlib.blake2b(key, digest_size=8).hexdigest()
    path = cache_dir() / "text" / f"demo-{digest}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        rows = (json.dumps({"text": article}) + "\n" for article in _articles(dump))
        unfinished.write_text("".join(rows), encoding="utf-8")
        unfinished.replace(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


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
