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
from collections.abc import Iterable, Mapping
from typing import Any


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


class FormulaWarning(UserWarning):
    """A formula means its simplified form, which somewhere differs from the text as typed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known word as the tail of a sentence, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a request that is kept on disk has otherwise than the present one, for a message.

    Keys with other values as "key: before, now after", by semicolons; of texts of several lines
    the lines that differ. Nothing where nothing differs.
    """
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return "; ".join(_difference(key, str(before.get(key)), str(now.get(key))) for key in changed)


def _difference(key: str, before: str, now: str) -> str:
    old, new = before.splitlines(), now.splitlines()
    gone = " ".join(line.strip() for line in old if line not in new)
    come = " ".join(line.strip() for line in new if line not in old)
    return f"{key}: {_shortened(gone)}, now {_shortened(come)}"


def _shortened(text: str) -> str:
    return text if 0 < len(text) <= 80 else text[:77] + "..." if text else "nothing"
