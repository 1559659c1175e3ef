"""Budgets that a rule has to serve: one sparsity and pattern, or several at once.

A rule that serves several budgets is worth the geometric mean of what it is worth in each: twice
the perplexity in one weighs as much as twice the perplexity in another, however large either is.
The same holds of several models and draws of calibration text, each pruned under every budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from prunezero.errors import SelectionError
from prunezero.models.measures import SHARES
from prunezero.pruning.budget import Budget
from prunezero.pruning.testbed import beginning


def read_budgets(words: str) -> tuple[Budget, ...]:
    """Budgets of words with commas between them, such as `0.7,2:4`; none of no words.

    Raises:
        SelectionError: one of them is no budget, or none of weights.
    """
    found = tuple(Budget.read(word.strip()) for word in words.split(",") if word.strip())
    for budget in found:
        if budget.measure != "weights":
            raise SelectionError(
                f"a search removes a share of the weights, but '{budget.word}' is one of "
                f"{budget.measure}; write a fraction alone, such as 0.7"
            )
    return found


def in_words(budgets: Sequence[Budget]) -> str:
    """The pattern of the first and the words of the others, for a column of patterns."""
    first, *others = budgets
    return ", ".join([first.pattern, *(budget.word for budget in others)])


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers; of a single one itself, to the last bit."""
    if len(values) == 1:
        return values[0]
    if any(math.isnan(value) or value < 0 for value in values):
        return math.nan
    if 0.0 in values:
        return 0.0
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def over_budgets(
    budgets: Sequence[Budget],
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[Mapping[str, Any]] = ({},),
) -> dict[str, Any]:
    """The row of a recipe over all budgets, from one row for each as `RecipeRunner.row` gives it.

    Perplexities and KL are geometric means, shares of tokens plain ones, and so are the losses of
    the windows, in nats: tests over windows hold for the whole as for a part. `budgets` keeps what
    is meant for each.

    Args:
        rows: of the first model and draw under every budget, then of the next.
        places: of each model and draw, what `budgets` says to tell it from the others.
    """
    first = dict(rows[0])
    if len(rows) == 1:
        return first
    numbers = [key for key in first if not key.startswith("window_")]
    means = [key for key in numbers if key == "kl" or key.endswith(("_perplexity", "_kl"))]
    for key in means:
        first[key] = geometric_mean([row[key] for row in rows])
    shares = [key for key in numbers if key.endswith(SHARES)]
    for key in shares:
        first[key] = math.fsum(row[key] for row in rows) / len(rows)
    for key in [key for key in first if key.startswith("window_")]:
        first[key] = {split: _means([row[key][split] for row in rows]) for split in first[key]}
    first["pattern"] = in_words(budgets)
    first |= beginning(row.get("windows_begin_with", "") for row in rows)
    # There is no one number; each budget has its own.
    first["sparsity_reached"] = None
    first["seconds"] = sum(row["seconds"] for row in rows)
    first["regimes"] = [
        {
            **place,
            "sparsity": budget.amount,
            "pattern": budget.pattern,
            **{key: row[key] for key in (*means, *shares)},
        }
        for (place, budget), row in zip(itertools.product(places, budgets), rows, strict=True)
    ]
    draws = {place["seed"] for place in places if "seed" in place}
    if draws:
        first["draws"] = len(draws)
    return first


def seeds_of(row: Mapping[str, Any]) -> str:
    """The seeds of the calibration text that a row was measured with, in words."""
    first, draws = row["seed"], row.get("draws", 1)
    return f"seed {first}" if draws == 1 else f"seeds {first} to {first + draws - 1}"


def windows_of(row: Mapping[str, Any]) -> str:
    """The windows that a row was measured on, in words."""
    begin = row.get("windows_begin_with", "")
    return f"windows of {row['sequence_length']} tokens{begin and f' that begin with {begin}'}"


def with_names(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A row in whose `budgets` models have other names; one that says no models stays as it is."""
    if not any("model" in part for part in row.get("regimes") or ()):
        return dict(row)
    parts = [{**part, "model": names.get(part["model"], part["model"])} for part in row["regimes"]]
    return {**row, "regimes": parts}


def _means(lists: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(values) / len(values) for values in zip(*lists, strict=True)]
