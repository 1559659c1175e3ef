"""Which text is a model calibrated, searched and judged on?

A text is a set of documents, each in exactly one split: no sentence that a criterion was tuned on
can turn up in what judges it. The same name gives the same documents in the same splits on every
machine.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, tensor

from prunezero.errors import TextError, did_you_mean
from prunezero.models.demo_text import demo_documents
from prunezero.models.language_model import LanguageModel
from prunezero.models.text_sources import OWN_SPLITS, read_documents
from prunezero.models.windows import check_length, check_windows

__all__ = ["SPLITS", "Text", "load_text", "windows"]

SPLITS = ("calibration", "search", "validation", "test")
# Who gets which of every 20 documents: 10, 3, 3 and 4. Mixed, so that a few documents serve all.
TURNS = "cvtcscctcvcstcccvtcs"
SHUFFLE_SEED = 20240601


@dataclass(frozen=True)
class Text:
    """Documents, divided once and for all."""

    name: str
    """as the user wrote it"""
    documents: dict[str, tuple[str, ...]]
    """by split, see `SPLITS`"""
    fingerprint: str
    """changes when a document or its split changes"""


def load_text(name: str) -> Text:
    """The text of that name, divided into splits without a common document.

    Args:
        name: "demo", a .txt, .jsonl or .parquet file or a folder of them, or a hub dataset id,
            which may be followed by ":" and the name of a configuration.

    A source's own validation and test splits are kept; calibration and search share its training
    split. Without such splits, of every 20 documents 10 are calibration, 3 search, 3 validation
    and 4 test text.

    Raises:
        TextError: the source cannot be found or read, or holds no text.
    """
    own = {"train": demo_documents()} if name == "demo" else read_documents(name)
    own = {split: [text for text in texts if text.strip()] for split, texts in own.items()}
    if not any(own.values()):
        raise TextError(f"text '{name}' is empty; give a source with text in it")
    documents = divide(own)
    digest = hashlib.blake2b(json.dumps(documents, sort_keys=True).encode(), digest_size=16)
    return Text(name, documents, digest.hexdigest())


def divide(own: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """Documents by our splits, from documents by the source's own.

    A split that the source lacks is taken from its training documents, or from all it has when it
    has none of those. The same documents in the same order are always divided alike.
    """
    kept = {split: own.get(split, []) for split in OWN_SPLITS if split != "train"}
    pool = list(own.get("train", []))
    if not pool:
        pool = [text for texts in kept.values() for text in texts]
        kept = {}
    # The same document twice would stand on both sides.
    pool = list(dict.fromkeys(pool))
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

    Raises:
        TextError: unknown split, too little text, or a length or token that the model cannot take.
    """
    if split not in SPLITS:
        raise TextError(
            f"'{split}' is not a split{did_you_mean(split, SPLITS)}; splits: {', '.join(SPLITS)}"
        )
    if count < 1 or length < 2:
        raise TextError(
            f"{count} windows of {length} tokens were asked for; ask for at least 1 of at least 2"
        )
    check_length(length, language_model)
    is_drawn = split == "calibration"
    needed = count * length
    ids = _token_ids(text.documents[split], language_model.tokenizer, None if is_drawn else needed)
    available = len(ids) // length
    if available < count:
        raise TextError(
            f"the {split} split of text '{text.name}' has {len(ids)} tokens but {count} windows of "
            f"{length} tokens need {needed}; ask for fewer or shorter windows, or give more text"
        )
    drawn = sorted(random.Random(seed).sample(range(available), count)) if is_drawn else []
    places = drawn or list(range(count))
    chosen = tensor([ids[place * length : (place + 1) * length] for place in places])
    check_windows(chosen, language_model)
    return chosen


def _token_ids(documents: Sequence[str], tokenizer: Any, enough: int | None) -> list[int]:
    """Token ids of the joined documents; those after `enough` tokens are not read."""
    ids: list[int] = []
    end = tokenizer.eos_token_id
    for document in documents:
        if enough is not None and len(ids) >= enough:
            break
        if ids and end is not None:
            ids.append(end)
        # verbose: a document longer than the model's positions is no mistake, it is cut later.
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
