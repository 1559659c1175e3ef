"""Rung correlation: can the cheap rungs be trusted? And paired tests between two rules.

A search promotes some candidates at random, so that a rung is compared with the next one also where
it did not choose. The correlation is over the last candidates that stand on both, which are what
the search now has to tell apart; it decides how many climb.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.history import beside_mask

# The last candidates on both rungs that are looked at.
WINDOW = 40
# Fewer say nothing.
_FEWEST = 8
# A rung is trusted above the first and mistrusted below the second rank correlation.
_TRUSTED, _MISTRUSTED = 0.7, 0.3


@dataclass(frozen=True)
class RungCorrelation:
    """How well one rung foretells the order on the next."""

    tau: float
    """Kendall's rank correlation, -1 to 1; NaN from fewer than two candidates"""
    recall: float
    """share of the best quarter on the upper rung that is in the best quarter on the lower one"""
    count: int
    """candidates on both rungs"""

    @property
    def says_much(self) -> bool:
        """Whether so many candidates stand on both rungs that something follows."""
        return self.count >= _FEWEST and not math.isnan(self.tau)

    @property
    def text(self) -> str:
        """The two numbers in a few words."""
        if not self.count or math.isnan(self.tau):
            return "not known yet"
        return f"tau {self.tau:.2f}, recall {self.recall:.2f} over {self.count}"


def rung_correlation(candidates: Sequence[Candidate], lower: str, upper: str) -> RungCorrelation:
    """How well the order by one field foretells that by another, over the last that have both.

    The layer error sees masks alone, so it is asked about candidates that mend, permute and
    allocate alike: those of the commonest kind.

    Args:
        candidates: in order of their slots.
        lower: name of the cheap rung's field, such as `layer_error`.
        upper: name of the dear rung's field, such as `kl`.
    """
    on_both = [
        one
        for one in candidates
        if getattr(one, lower) is not None and getattr(one, upper) is not None
    ]
    if lower == "layer_error":
        on_both = _of_one_kind(on_both)
    pairs = [(getattr(one, lower), getattr(one, upper)) for one in on_both[-WINDOW:]]
    if not pairs:
        return RungCorrelation(math.nan, math.nan, 0)
    low, high = zip(*pairs, strict=True)
    return RungCorrelation(kendall_tau(low, high), _recall(low, high), len(pairs))


def width(usual: int, seen: RungCorrelation) -> int:
    """How many candidates climb: the usual number, fewer if the rung is right, more if it errs."""
    if not seen.says_much:
        return usual
    if seen.tau >= _TRUSTED:
        return max(1, usual // 2)
    return 2 * usual if seen.tau < _MISTRUSTED else usual


def kendall_tau(left: Sequence[float], right: Sequence[float]) -> float:
    """Kendall's rank correlation with the usual correction for ties (tau-b); NaN when undefined."""
    from scipy.stats import kendalltau

    return float(kendalltau(left, right).statistic) if len(left) > 1 else math.nan


def chance_of_no_gain(losses: Sequence[float], others: Sequence[float]) -> float:
    """How likely window losses this much lower than others' are if the two rules are equally good.

    One-sided Wilcoxon signed-rank test over windows; 1 where all are equal.

    Args:
        losses: mean nats per token of each window, of the rule that should be better.
        others: the same windows, of the rule it is compared with.
    """
    from scipy.stats import wilcoxon

    if list(losses) == list(others):
        return 1.0
    return float(wilcoxon(losses, others, alternative="less").pvalue)


def _of_one_kind(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those with the commonest choices beside the mask."""
    kinds = [str(beside_mask(one.rule)) for one in candidates]
    counts = Counter(kinds)
    commonest = max(counts, key=lambda kind: counts[kind], default="")
    return [one for one, kind in zip(candidates, kinds, strict=True) if kind == commonest]


def _recall(low: Sequence[float], high: Sequence[float]) -> float:
    count = max(1, len(low) // 4)
    return len(_best(low, count) & _best(high, count)) / count


def _best(values: Sequence[float], count: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda place: values[place])[:count])
