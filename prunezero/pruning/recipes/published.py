"""Is a dense model what the papers pruned? Its perplexity, beside the published one.

Pruned models can be compared with published ones only where the dense ones agree: the same text,
windows of the same length, and the same perplexity before anything is removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunezero.models.loading.names import is_spelled_as_path

# Perplexity by tokens in a window, over the test split of WikiText-2. Models are called as in the
# `published` rows of recipes, in lower case. Papers tokenize the split as one text: of their
# windows the first alone begins with the token that a tokenizer begins a text with, of ours all do.
PUBLISHED: Mapping[str, Mapping[int, float]] = {
    # Sun et al. 2023, arXiv:2306.11695; windows of 128: Ma et al. 2023, arXiv:2305.11627
    "llama-7b": {128: 12.62, 2048: 5.68},
    "llama-13b": {2048: 5.09},
    # windows of 4,096: Sun et al. 2023; of 2,048: Das et al. 2023, arXiv:2311.04902, and for 13B
    # Shao et al. 2024, arXiv:2310.09499
    "llama-2-7b": {2048: 5.47, 4096: 5.12},
    "llama-2-13b": {2048: 4.88, 4096: 4.57},
    "llama-2-70b": {4096: 3.12},
    # 2,048: Zhang et al. 2024, the code of RIA; 4,096: Fang et al. 2024, arXiv:2409.17481;
    # 8,192: the code of D2Prune
    "llama-3-8b": {2048: 6.14, 4096: 5.75, 8192: 5.54},
    # Frantar and Alistarh 2023, arXiv:2301.00774
    "opt-125m": {2048: 27.66},
    "opt-1.3b": {2048: 14.62},
    "opt-2.7b": {2048: 12.47},
    "opt-6.7b": {2048: 10.86},
    "opt-13b": {2048: 10.13},
    "opt-30b": {2048: 9.56},
    "opt-66b": {2048: 9.34},
}
_TEXT = "wikitext:wikitext-2-raw-v1"
# What copies on the hub put around the name of a model whose weights they leave as they are.
_PREFIXES = ("decapoda-research-", "meta-")
_SUFFIXES = ("-hf", "-fp16")
# Fraction by which equal measurements of one model may differ, in dtype and in versions.
TOLERANCE = 0.02
# Windows of 2,048 tokens in the test split, by tokenizer; papers leave the rest out.
_WHOLE_TEST = {"llama-3": 140, "llama": 166, "opt": 140}


def dense_warning(
    model: str,
    text: str,
    *,
    sequence_length: int,
    tokens: int,
    perplexity: float,
    begin: str = "",
) -> str | None:
    """Why a dense model is not the one that was published; None if it is, or nothing is known.

    Only names of the hub are known, whoever the owner is: what a folder or a file holds, its name
    does not tell.

    Args:
        model, text: as the user wrote them.
        tokens: of the test split that were measured.
        perplexity: of the dense model on them.
        begin: what the tokenizer begins every window with.
    """
    name = _hub_name(model)
    known = PUBLISHED.get(name or "")
    if known is None or _hub_name(text) != _TEXT:
        return None
    lengths = " and ".join(f"{length:,}" for length in sorted(known))
    if sequence_length not in known:
        return (
            f"published perplexities of {name} on WikiText-2 are of windows of {lengths} tokens; "
            f"those of {sequence_length:,} cannot be compared with them"
        )
    where = f"{name}, WikiText-2, windows of {sequence_length:,} tokens"
    expected = known[sequence_length]
    windows = next(count for start, count in _WHOLE_TEST.items() if (name or "").startswith(start))
    if tokens < windows * 2048 - sequence_length:
        return (
            f"the published dense perplexity of {expected:.2f} ({where}) is of the whole test "
            f"split; {tokens:,} tokens of it cannot be compared with that"
        )
    # Written so that NaN is off too.
    if abs(perplexity / expected - 1) <= TOLERANCE:
        return None
    other = f"; each window here begins with {begin}, there the first alone did" if begin else ""
    return (
        f"dense perplexity {perplexity:.2f} where {expected:.2f} was published ({where}): check "
        f"the checkpoint, the dtype and the text{other}"
    )


def warning_of(model: str, text: str, row: Mapping[str, Any]) -> str | None:
    """`dense_warning` of the dense row of a comparison."""
    length = row["sequence_length"]
    return dense_warning(
        model,
        text,
        sequence_length=length,
        tokens=len(row["window_losses"]["test"]) * length,
        perplexity=math.nan if row["test_perplexity"] is None else row["test_perplexity"],
        begin=row.get("windows_begin_with", ""),
    )


def _hub_name(name: str) -> str | None:
    """The last part of a hub id, without what copies add to it; None of a path."""
    if is_spelled_as_path(name) or Path(name).exists():
        return None
    last = name.rsplit("/", 1)[-1].lower()
    for prefix in _PREFIXES:
        last = last.removeprefix(prefix)
    for suffix in _SUFFIXES:
        last = last.removesuffix(suffix)
    return last
