"""What is known of one word that a recipe may choose, whatever it computes?

No torch here: a row names its function, which is found when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from prunezero.pruning.recipes.word_options import Options


@dataclass(frozen=True)
class Word:
    """One word that a recipe may choose: all that is known of it but the arithmetic."""

    options: type[Options]
    meaning: str
    # where its function is, on this floor, as "module:name"
    code: str
    # what it looks at, one of `SIGNALS` of the vocabulary
    cost: str = "none"
    # raw sums over calibration text that it looks at, beside those of the formula
    sums: frozenset[str] = frozenset()
    # whether it runs calibration text through the model itself
    needs_text: bool = False
    # why it needs the whole model at once; nothing where one block at a time is enough
    whole_model: str = ""
    # whether recipes that say nothing have it
    is_usual: bool = False
    # the words of a recipe's `unit` that it speaks of
    units: frozenset[str] = frozenset({"weight"})
    # whether it prunes the dense model on trial, by the recipe's formula and updates
    tries: bool = False
    # Of updates: a lower number stands before a higher one.
    order: int = 0
    # whether it brings removed weights back, which must still have their values
    changes_mask: bool = False
    # whether it solves for the weights that stay. What it solves is so close to singular that the
    # rounding of sums is seen in the result.
    mends: bool = False
    # whether it compares with the weights before all updates
    sees_dense: bool = False
    # whether it needs biases in the layers
    needs_biases: bool = False
    # Of schedules: whether units go while the recovery trains, and not before it
    in_training: bool = False
    # Of schedules: where the function is that chooses which units go, as "module:name"; nothing
    # where the kind of unit says it
    chooser: str = ""

    @property
    def function(self) -> Callable[..., Any]:
        """What does it; words with the same arrow have functions of the same arguments."""
        return _found(self.code)

    @property
    def choose(self) -> Callable[..., Any]:
        """What chooses the units that go, see `chooser`."""
        return _found(self.chooser)


def _found(code: str) -> Callable[..., Any]:
    module, name = code.split(":")
    found: Callable[..., Any] = getattr(import_module(f"prunezero.pruning.{module}"), name)
    return found
