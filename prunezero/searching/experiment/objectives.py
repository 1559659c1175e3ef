"""What does a search look for? The measure by which its upper rungs order candidates.

Perplexity is the usual one. The others compare the pruned model with the dense one, token by token,
so that text which neither predicts well counts as well (`models/evaluation.py` defines them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunezero.errors import SearchError, did_you_mean
from prunezero.models.measures import SHARES


@dataclass(frozen=True)
class Objective:
    """One measure of the pruned model."""

    word: str
    """of `--objective`"""
    column: str
    """of results, behind the name of a text"""
    text: str
    """what it is called in a sentence"""
    windows: str
    """column of results that holds it for each window, by the name of a text; loss is in nats"""

    @property
    def is_usual(self) -> bool:
        """Whether it is perplexity."""
        return self.word == USUAL

    @property
    def also(self) -> str:
        """What is measured for it on every text beside perplexity, by its column."""
        return "" if self.is_usual else self.column

    @property
    def rises(self) -> bool:
        """Whether higher is better."""
        return self.column in SHARES

    def key(self, split: str) -> str:
        """The column of results of one text."""
        return f"{split}_{self.column}"

    def rounding_key(self, split: str) -> str:
        """The column of what rounding alone changes in it."""
        return f"{split}_rounding" if self.is_usual else f"{self.key(split)}_rounding"

    def turned(self, value: float) -> float:
        """A number of which lower is better; of a share, what is missing to 1."""
        return 1 - value if self.rises else value

    def of(self, row: Mapping[str, Any], split: str) -> float | None:
        """The turned number of a row on one text; None where it was not measured."""
        value = row.get(self.key(split))
        return None if value is None else self.turned(value)

    def of_windows(self, row: Mapping[str, Any], split: str) -> list[float]:
        """The turned numbers of each window of one text."""
        return [self.turned(value) for value in row[self.windows][split]]


USUAL = "perplexity"
OBJECTIVES = {
    one.word: one
    for one in (
        Objective(USUAL, "perplexity", "perplexity", "window_losses"),
        Objective("kl", "kl", "KL", "window_kl"),
        Objective("agreement", "top1_agreement", "top-1 agreement", "window_top1_agreement"),
        Objective("acceptance", "acceptance", "acceptance", "window_acceptance"),
    )
}
PERPLEXITY = OBJECTIVES[USUAL]
# Columns of the measures that are not there in every search.
FURTHER = tuple(
    one.key(split)
    for one in OBJECTIVES.values()
    if not one.is_usual
    for split in ("search", "validation", "test")
)


def find_objective(word: str) -> Objective:
    """The objective of that name.

    Raises:
        SearchError: there is none; the message gives the nearest.
    """
    if word not in OBJECTIVES:
        near = did_you_mean(word, OBJECTIVES) or "."
        raise SearchError(
            f"'{word}' is not a known objective{near} Known: {', '.join(OBJECTIVES)}."
        )
    return OBJECTIVES[word]


def objective_of(rows: Sequence[Iterable[str]]) -> Objective:
    """The objective of the search that rows of candidates are of, as their columns tell it."""
    columns = set(rows[0]) if rows else set()
    own = (one for one in OBJECTIVES.values() if not one.is_usual and one.key("search") in columns)
    return next(own, PERPLEXITY)
