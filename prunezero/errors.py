"""Every error prunezero raises, so that a caller can catch one type and a user reads one sentence.

    PruneZeroError
    ├── CriterionError     a formula that may not be read, or that ranks nothing
    ├── RecipeError        a recipe or search space with unknown or contradictory choices
    ├── SelectionError     a sparsity, group or pattern that no mask can satisfy
    ├── ScoreError         scores that must not become a mask: NaN, infinite, all equal
    ├── ModelError         a model that cannot be loaded, pruned or saved
    ├── TextError          text that cannot be read, or is too short for what is asked
    ├── StatisticsError    calibration sums that are missing, damaged or of another model
    │   └── FactorizationError  a Gram matrix that no damping makes positive definite
    ├── SearchError        a search that cannot start, or cannot go on where it stopped
    └── OutputError        a folder that cannot be written

The message says what is wrong with the value, where it stands and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PruneZeroError(Exception):
    """A mistake that the user can mend; the message is one sentence meant for them."""


class CriterionError(PruneZeroError):
    """A formula that may not be read, or that ranks nothing."""


class RecipeError(PruneZeroError):
    """A recipe or search space with unknown or contradictory choices."""


class SelectionError(PruneZeroError):
    """A sparsity, comparison group or pattern that no mask can satisfy."""


class ScoreError(PruneZeroError):
    """Scores that must not become a mask: NaN, infinite, or all equal."""


class ModelError(PruneZeroError):
    """A model that cannot be loaded, pruned or saved."""


class TextError(PruneZeroError):
    """Text that cannot be read, or is too short for what is asked."""


class StatisticsError(PruneZeroError):
    """Calibration sums that are missing, damaged, or of another model."""


class FactorizationError(StatisticsError):
    """A Gram matrix that is not positive definite, however strongly it is damped."""


class SearchError(PruneZeroError):
    """A search that cannot start, or cannot go on where it stopped."""


class OutputError(PruneZeroError):
    """A folder that cannot be written."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known word as the tail of a sentence, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
