"""What may be asked of a selection: sparsity, comparison group and pattern, as words and numbers.

No tensors here, so that recipes can be read and refused without loading torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from prunezero.errors import SelectionError, did_you_mean

# Comparison groups: which weights compete with each other.
GROUPS = {
    "row": "weights of one output channel",
    "layer": "all weights of one matrix",
    "model": "all weights of all matrices",
    "N columns": "all rows of a block of N input channels, such as 128 columns",
}


@dataclass(frozen=True)
class Pattern:
    """A fixed rhythm along each row: `keep` of every `of` consecutive weights stay."""

    keep: int
    of: int

    @property
    def sparsity(self) -> float:
        """The fraction of weights that the pattern removes."""
        return float(1 - Fraction(self.keep, self.of))

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


def parse_pattern(pattern: str) -> Pattern | None:
    """The pattern that a word such as 2:4 stands for; None for free.

    2:4 keeps 2 of every 4. Some papers count the removed weights instead: their 3:4 is our 1:4.

    Raises:
        SelectionError: neither free nor N:M, or not 1 <= N < M.
    """
    if pattern == "free":
        return None
    found = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", str(pattern))
    if found is None:
        near = did_you_mean(str(pattern), ["free", "2:4", "4:8"])
        raise SelectionError(
            f"pattern '{pattern}' is neither free nor N:M such as '2:4' (in quotes){near}"
        )
    keep, of = int(found[1]), int(found[2])
    if not 1 <= keep < of:
        raise SelectionError(
            f"pattern {pattern} keeps {keep} of every {of} weights; N:M needs 1 <= N < M"
        )
    return Pattern(keep, of)


def pattern_sparsity(pattern: str) -> float | None:
    """The one sparsity that a pattern allows, as a fraction; None where any is allowed (free)."""
    parsed = parse_pattern(pattern)
    return None if parsed is None else parsed.sparsity


def group_columns(compare: str) -> int | None:
    """How many columns a group such as '128 columns' spans; None for row, layer and model.

    Raises:
        SelectionError: `compare` is not one of `GROUPS`.
    """
    found = re.fullmatch(r"([1-9][0-9]{0,8}) columns?", str(compare))
    if found is not None:
        return int(found[1])
    if compare in GROUPS and compare != "N columns":
        return None
    near = did_you_mean(str(compare), ["row", "layer", "model", "128 columns"])
    known = ", ".join(f"{word} ({meaning})" for word, meaning in GROUPS.items())
    raise SelectionError(f"'{compare}' is not a comparison group{near or ';'} known: {known}")


def removed_count(size: int, sparsity: float) -> int:
    """How many of `size` weights go: the fraction rounded down, taken as the decimal it reads as.

    29 of 100 at sparsity 0.29, where floating-point arithmetic would say 28.

    Raises:
        SelectionError: `sparsity` is not at least 0 and below 1.
    """
    if not 0 <= sparsity < 1:
        hint = f"; write {sparsity:g} % as {sparsity / 100:g}" if 2 <= sparsity < 100 else ""
        raise SelectionError(f"sparsity must be at least 0 and below 1 but got {sparsity}{hint}")
    return math.floor(size * Fraction(str(sparsity)))


def checked_request(
    columns: int, sparsity: float, *, compare: str = "row", pattern: str = "free"
) -> Pattern | int:
    """What `check_request` lets pass: the pattern, or how many weights of a row go."""
    return _checked_request(columns, sparsity, str(compare), str(pattern))


# Typed: 0.29 in float32 equals another float64, but reads as 0.29.
@lru_cache(maxsize=1024, typed=True)
def _checked_request(columns: int, sparsity: float, compare: str, pattern: str) -> Pattern | int:
    parsed = check_request(columns, sparsity, compare=compare, pattern=pattern)
    return parsed or removed_count(columns, sparsity)


def check_request(
    columns: int, sparsity: float, *, compare: str = "row", pattern: str = "free"
) -> Pattern | None:
    """Refuse a request that no mask of a matrix with `columns` columns can satisfy.

    Returns the parsed pattern; raises SelectionError naming the impossible choice.
    """
    removed_count(1, sparsity)
    group_columns(compare)
    parsed = parse_pattern(pattern)
    if parsed is None:
        return None
    if abs(sparsity - parsed.sparsity) > 1e-6:
        raise SelectionError(
            f"pattern {pattern} removes exactly {parsed.sparsity:g} of the weights but sparsity is "
            f"{sparsity:g}; ask for sparsity {parsed.sparsity:g} or for pattern free"
        )
    if parsed.of > columns:
        raise SelectionError(
            f"pattern {pattern} is wider than the {columns} columns of the matrix; "
            "choose a smaller M or pattern free"
        )
    if columns % parsed.of:
        raise SelectionError(
            f"pattern {pattern} needs a multiple of {parsed.of} columns but the matrix has "
            f"{columns}; choose an M that divides {columns} or pattern free"
        )
    return parsed
