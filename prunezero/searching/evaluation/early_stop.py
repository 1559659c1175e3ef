"""Early stop: when have the first windows shown that a candidate cannot reach another one?

Two candidates meet the same windows, so their losses are compared in pairs, and what makes a window
hard for both falls away. A candidate is left alone as soon as a one-sided paired t-test over the
windows seen says that it is worse. Each look may err with a chance of `CHANCE`, if differences are
normal; no credit is given for windows that are still to come being few, since the last of a text
may be unlike the first (`benchmarks/windows.py` puts the rule to the test).

What is known of a stopped candidate is a bound: with that confidence its number is at least so
large. It is a function of window losses alone, so of a whole measurement it makes the same as of
one that was stopped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from prunezero.models.measures import TO_DENSE
from prunezero.searching.experiment.objectives import Objective

# Of taking a look's windows for worse although the candidate is as good as the other.
CHANCE = 0.001
# Windows of the first look: of fewer, nobody knows how much they differ.
FIRST = 4
# Column of a result that says how far a stopped measurement came.
STOPPED = "stopped_early"


def is_worse(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether a candidate is surely worse than another one, after its first windows.

    Args:
        values: of the candidate, one for each window seen; lower is better.
        others: of the other one, for all windows.
    """
    return FIRST <= len(values) < len(others) and _least_difference(values, others) > 0


def windows_needed(values: Sequence[float], others: Sequence[float]) -> int:
    """How many windows are looked at until a candidate is worse; all where it never is."""
    looks = range(FIRST, len(values))
    return next((seen for seen in looks if is_worse(values[:seen], others)), len(values))


def at_least(values: Sequence[float], others: Sequence[float]) -> float:
    """The mean over all windows that a candidate surely exceeds, from its first windows."""
    return math.fsum(others) / len(others) + _least_difference(values, others)


def _least_difference(values: Sequence[float], others: Sequence[float]) -> float:
    """The lower confidence bound of how much worse it is in the mean; NaN where it is no number."""
    differences = [one - other for one, other in zip(values, others, strict=False)]
    if not all(map(math.isfinite, differences)):
        return math.nan
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) - _quantile(CHANCE, len(differences) - 1) * spread


@cache
def _quantile(chance: float, freedom: int) -> float:
    from scipy.stats import t

    return float(t.isf(chance, freedom))


def sees_worse(
    objective: Objective, others: Sequence[float], seen: Mapping[str, Sequence[float]]
) -> bool:
    """Whether what `evaluate` has seen of a candidate is worse than the other's windows."""
    column = "loss" if objective.is_usual else objective.column
    return is_worse([objective.turned(one) for one in seen[column]], others)


def stopped(
    row: dict[str, Any], split: str, objective: Objective, others: Sequence[float]
) -> dict[str, Any]:
    """A row of results as an early stop leaves it; the same row where none was due.

    Numbers of the text as a whole are taken away, and `STOPPED` says how many windows were looked
    at, of how many, and the least that the objective can be.

    Args:
        row: of a measurement that was stopped, or went on to the end.
        split: the text that it is of.
        others: see `is_worse`; nobody is there to be reached where it is empty.
    """
    if not others:
        return row
    measured = row[objective.windows][split]
    values = [math.nan if one is None else objective.turned(one) for one in measured]
    seen = windows_needed(values, others)
    if seen == len(others):
        return row
    mean = at_least(values[:seen], others)
    told = {"windows": seen, "of": len(others), "at_least": _fitness(objective, mean)}
    columns = ("perplexity", "perplexity_by_source", *TO_DENSE)
    whole = {f"{split}_{column}" for column in columns} | {*TO_DENSE}
    found = {key: value for key, value in row.items() if key not in whole}
    for key in [key for key in found if key.startswith("window_")]:
        found[key] = {**row[key], split: list(row[key][split][:seen])}
    return found | {STOPPED: told}


def _fitness(objective: Objective, mean: float) -> float:
    """What orders candidates, of a mean over windows."""
    return math.exp(mean) if objective.is_usual else mean
