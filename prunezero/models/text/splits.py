"""Splits of text: what a model is calibrated, searched, validated and tested on.

A text is a set of documents, each in exactly one split: no sentence that a criterion was tuned on
can turn up in what measures it. The same name gives the same documents in the same splits on every
machine.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, int64, tensor

from prunezero.errors import TextError, did_you_mean
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.text.demo import demo_documents
from prunezero.models.text.mixing import in_turn, names_of_sources, shares
from prunezero.models.text.running_text import content_digest
from prunezero.models.text.sources import OWN_SPLITS, TextSource, read_source
from prunezero.models.text.windows import check_length, check_windows, first_tokens

__all__ = ["SPLITS", "Text", "load_text", "unseen_windows", "windows"]

SPLITS = ("calibration", "search", "validation", "test")
# Windows of this split are drawn, those of others are its first.
DRAWN = "calibration"
# Who gets which of every 20 documents: 10, 3, 3 and 4. Mixed, so that a few documents serve all.
TURNS = "cvtcscctcvcstcccvtcs"
SHUFFLE_SEED = 20240601
# What a tokenizer is given at once; it takes some hundred bytes for each of these.
PIECE_CHARACTERS = 250_000


@dataclass(frozen=True)
class Text:
    """Documents, divided once and for all."""

    name: str
    """as the user wrote it"""
    documents: dict[str, tuple[str, ...]]
    """by split, see `SPLITS`"""
    fingerprint: str
    """changes when a document or its split changes"""
    notes: tuple[str, ...] = ()
    """what was guessed about the source and what of it was left out, each in a few words"""
    parts: tuple[Text, ...] = ()
    """its sources, each divided by itself, where it has several"""

    def sources(self, count: int) -> tuple[str, ...]:
        """The source of each of so many windows of a split, by name; none where it is one."""
        if not self.parts:
            return ()
        return tuple(self.parts[place % len(self.parts)].name for place in range(count))


def load_text(name: str) -> Text:
    """The text of that name, divided into splits without a common document.

    Args:
        name: "demo", a .txt, .jsonl, .json or .parquet file, packed or not, or a folder of them, or
            a hub dataset id, which may be followed by ":" and the name of a configuration; or
            several of these with commas between, whose windows then come in turn.

    A source's own validation and test splits are kept; calibration and search share its training
    split. Without such splits, of every 20 documents 10 are calibration, 3 search, 3 validation
    and 4 test text. A document that comes several times stays where it stands in the latest split.

    Raises:
        TextError: the source cannot be found or read, or holds no text.
    """
    names = names_of_sources(name)
    sources = [_read(one) for one in names]
    owns = distinct_of_all([source.documents for source in sources])
    parts = tuple(map(_divided, names, sources, owns))
    if len(parts) == 1:
        return parts[0]
    joined = {
        split: tuple(text for part in parts for text in part.documents[split]) for split in SPLITS
    }
    notes = tuple(f"{part.name}: {note}" for part in parts for note in part.notes)
    return Text(name, joined, _digest([part.fingerprint for part in parts]), notes, parts)


def _read(name: str) -> TextSource:
    return TextSource({"train": demo_documents()}) if name == "demo" else read_source(name)


def _divided(name: str, source: TextSource, own: Mapping[str, Sequence[str]]) -> Text:
    """A source as a text of its own.

    Args:
        own: its documents by its own splits, without those that come again.
    """
    if not any(own.values()):
        has_text = any(source.documents.values())
        fault = "holds no document that the others do not" if has_text else "is empty"
        raise TextError(f"text '{name}' {fault}; give a source with text in it")
    documents = divide(own)
    return Text(name, documents, _digest(documents), tuple(_notes(source, own)))


def _digest(value: Any) -> str:
    """Hexadecimal digest of texts in dicts, lists and tuples."""
    digest = hashlib.blake2b(digest_size=16)
    for part in json.JSONEncoder(sort_keys=True).iterencode(value):
        digest.update(part.encode())
    return digest.hexdigest()


def distinct(own: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Every document once: in the latest of the splits that hold it, where it first stands there.

    Documents that differ in white space alone are the same.
    """
    (kept,) = distinct_of_all([own])
    return kept


def distinct_of_all(owns: Sequence[Mapping[str, Sequence[str]]]) -> list[dict[str, list[str]]]:
    """Every document of several sources once, as `distinct`; of one split in the first of them."""
    seen: set[bytes] = set()
    kept: list[dict[str, list[str]]] = [{split: [] for split in own} for own in owns]
    for split in reversed(OWN_SPLITS):
        for own, left in zip(owns, kept, strict=True):
            for text in own.get(split, ()):
                key = content_digest(text)
                if key not in seen:
                    seen.add(key)
                    left[split].append(text)
    return kept


def _notes(source: TextSource, own: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What was guessed and left out, in words."""
    yield from source.guesses
    if source.left_out:
        yield f"rows without text (null, empty or missing) are left out: {source.left_out:,}"
    if source.repeated:
        yield f"paragraphs that a later split has too are left out: {source.repeated:,}"
    several = sum(map(len, source.documents.values())) - sum(map(len, own.values()))
    if several:
        places = "once" if len(own) == 1 else "once, in the latest split that holds them"
        yield f"documents that come again are kept {places}: {several:,} left out"
    if len(own) > 1 and not own.get("train"):
        yield "no training documents are left, so all are divided anew"


def divide(own: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Documents by our splits, from distinct documents by the source's own.

    A split that the source lacks is taken from its training documents, or from all it has when it
    has none of those. The same documents in the same order are always divided alike.
    """
    kept = {split: own.get(split, []) for split in OWN_SPLITS if split != "train"}
    pool = list(own.get("train", []))
    if not pool:
        pool = [text for texts in kept.values() for text in texts]
        kept = {}
    random.Random(SHUFFLE_SEED).shuffle(pool)
    full = {split for split, texts in kept.items() if texts}
    turns = [split for turn in TURNS for split in SPLITS if split[0] == turn and split not in full]
    return {
        split: tuple(kept[split])
        if split in full
        else tuple(text for place, text in enumerate(pool) if turns[place % len(turns)] == split)
        for split in SPLITS
    }


def windows(
    text: Text,
    split: str,
    language_model: LanguageModel,
    *,
    length: int,
    count: int,
    seed: int = 0,
) -> Tensor:
    """Token ids [count, length], int64, of windows that do not overlap.

    The documents of the split are joined in order, with the tokenizer's end token between them.
    Calibration windows are drawn from the whole split by `seed`, all others are its first.

    Where the tokenizer begins a text with tokens of its own, every window begins with them, as the
    model was trained to be fed; text follows up to the same length. A text of several sources gives
    windows of each in turn, so that any part of them is as mixed as all.

    Raises:
        TextError: unknown split, too little text, fewer windows than sources, or a length or token
            that the model cannot take.
    """
    if split not in SPLITS:
        raise TextError(
            f"'{split}' is not a split{did_you_mean(split, SPLITS)}; splits: {', '.join(SPLITS)}"
        )
    if count < 1 or length < 2:
        raise TextError(
            f"{count} windows of {length} tokens were asked for; ask for at least 1 of at least 2"
        )
    if text.parts:
        if count < len(text.parts):
            raise TextError(
                f"{count} windows of {split} text cannot hold all {len(text.parts)} sources of "
                f"text '{text.name}'; ask for at least one window of each"
            )
        counts = zip(text.parts, shares(count, len(text.parts)), strict=True)
        return in_turn(
            [
                windows(part, split, language_model, length=length, count=some, seed=seed)
                for part, some in counts
            ]
        )
    cut = _Cut(split, language_model, length)
    needed = count * cut.each
    ids = cut.ids(text, None if split == DRAWN else needed)
    available = len(ids) // cut.each
    if available < count:
        raise TextError(
            f"the {split} split of text '{text.name}' has {len(ids)} tokens but {count} windows of "
            f"{length} tokens need {needed}; ask for fewer or shorter windows, or give more text"
        )
    is_drawn = split == DRAWN
    return cut.windows(ids, _drawn(available, count, seed) if is_drawn else range(count))


def unseen_windows(
    text: Text, language_model: LanguageModel, *, length: int, count: int, seed: int = 0
) -> Tensor:
    """Token ids [at most count, length] of calibration windows that `windows` does not draw.

    Args:
        count: windows that are drawn there, and at most as many others here; there may be none.
        seed: of the draw.

    Raises:
        TextError: as `windows`.
    """
    if text.parts:
        counts = zip(text.parts, shares(count, len(text.parts)), strict=True)
        return in_turn(
            [
                unseen_windows(part, language_model, length=length, count=some, seed=seed)
                for part, some in counts
            ]
        )
    cut = _Cut(DRAWN, language_model, length)
    ids = cut.ids(text, None)
    available = len(ids) // cut.each
    seen = set(_drawn(available, count, seed))
    left = [place for place in range(available) if place not in seen]
    # In no order: the first few of them are as mixed as all.
    return cut.windows(ids, random.Random(seed).sample(left, min(count, len(left))))


def _drawn(available: int, count: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(available), min(count, available)))


class _Cut:
    """How a split is cut into windows of one length, which begin as the tokenizer begins a text."""

    def __init__(self, split: str, language_model: LanguageModel, length: int) -> None:
        check_length(length, language_model)
        self._split, self._model, self._length = split, language_model, length
        self._first = first_tokens(language_model.tokenizer)
        self.each = length - len(self._first)
        """tokens of text in a window"""
        if self.each < 1:
            raise TextError(
                f"windows of {length} tokens hold no text behind the {len(self._first)} that the "
                f"tokenizer begins with; use a length of at least {len(self._first) + 1}"
            )

    def ids(self, text: Text, enough: int | None) -> array[int]:
        """Token ids of the split; those after `enough` tokens are not read."""
        return _token_ids(text.documents[self._split], self._model.tokenizer, enough)

    def windows(self, ids: array[int], places: Iterable[int]) -> Tensor:
        """Token ids [places, length] of the windows at some places."""
        cut = [[*self._first, *ids[one * self.each : (one + 1) * self.each]] for one in places]
        chosen = tensor(cut, dtype=int64).reshape(-1, self._length)
        if len(chosen):
            check_windows(chosen, self._model)
        return chosen


def _token_ids(documents: Sequence[str], tokenizer: Any, enough: int | None) -> array[int]:
    """Token ids of the joined documents; those after `enough` tokens are not read."""
    ids = array("q")
    end = tokenizer.eos_token_id
    for document in documents:
        if ids and end is not None:
            ids.append(end)
        for piece in _pieces(document):
            if enough is not None and len(ids) >= enough:
                return ids
            # verbose: a piece longer than the model's positions is no mistake, it is cut later.
            ids.extend(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
    return ids


def _pieces(document: str) -> Iterator[str]:
    """A document in parts, so that tokenizing it takes little memory, however long it is.

    Cut before blanks, where the tokens of most tokenizers begin: the ids are those of the whole.
    """
    start = 0
    while len(document) - start > PIECE_CHARACTERS:
        blank = document.rfind(" ", start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS)
        end = blank if blank > 0 else start + PIECE_CHARACTERS
        yield document[start:end]
        start = end
    yield document[start:]
