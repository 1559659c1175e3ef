"""Budget: how much is to be removed, of what, and in which pattern."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from prunezero.errors import SelectionError, did_you_mean
from prunezero.scoring.request import parse_pattern, removed_count

# What an amount may be a fraction of. What a unit costs in each is a matter of its group.
MEASURES = {
    "weights": "numbers in the weight matrices",
    "parameters": "weights and biases, those of norms among them",
    "units": "units, however large each is",
    "flops": "multiplications and additions of a forward pass, for each token",
    "kv bytes": "memory of keys and values, for each token",
    "milliseconds": "time of a forward pass, as measured on this machine",
    "links": "pairs of a query and a key",
}
# Of sums of measured times, the part that may be rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Budget:
    """How much groups lose together."""

    amount: float
    """fraction of the measure to remove"""
    _: KW_ONLY
    measure: str = "weights"
    """one of MEASURES"""
    pattern: str = "free"
    """free or N:M"""

    @classmethod
    def read(cls, word: str) -> Budget:
        """The budget of a word such as `0.7`, `2:4` or `0.2 kv bytes`.

        Raises:
            SelectionError: it is none, or nothing can be removed so.
        """
        if ":" in word:
            pattern = parse_pattern(word)
            assert pattern is not None  # only the pattern free is none
            return cls(pattern.sparsity, pattern=str(pattern))
        number, _, measure = word.strip().partition(" ")
        measure = measure.strip() or "weights"
        if measure not in MEASURES:
            near = did_you_mean(measure, MEASURES) or "."
            raise SelectionError(
                f"'{measure}' of '{word}' is nothing that a budget is counted in{near} Known: "
                f"{', '.join(MEASURES)}"
            )
        try:
            amount = float(number)
        except ValueError:
            raise SelectionError(
                f"'{word}' is no budget; write a fraction such as 0.7, one of a measure such as "
                "'0.2 parameters', or a pattern such as 2:4"
            ) from None
        removed_count(1, amount)
        return cls(amount, measure=measure)

    def allowance(self, total: float) -> float:
        """What may go of so much in the measure; whole numbers, but of time.

        Raises:
            SelectionError: the amount is not at least 0 and below 1.
        """
        if self.measure != "milliseconds":
            return removed_count(round(total), self.amount)
        removed_count(1, self.amount)
        return total * self.amount * (1 + _ROUNDING)

    @property
    def word(self) -> str:
        """What `read` makes it from."""
        if self.pattern != "free":
            return self.pattern
        return repr(self.amount) if self.measure == "weights" else f"{self.amount} {self.measure}"
