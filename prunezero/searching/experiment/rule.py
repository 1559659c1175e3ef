"""Rule: a formula, and the recipe choices around it that a space leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from prunezero.errors import CriterionError
from prunezero.formula.algebra import multiply, without_factor
from prunezero.formula.constants import number
from prunezero.formula.criterion import Criterion
from prunezero.pruning.recipes.recipe import with_patterns


@dataclass(frozen=True)
class Rule:
    """A formula, and the recipe choices beside it that are not those of the task."""

    criterion: Criterion
    """the formula"""
    choices: Mapping[str, Any] = field(default_factory=dict)
    """values of recipe keys, as their YAML spells them"""

    def __hash__(self) -> int:
        return hash(self.text)

    @classmethod
    def read(cls, formula: str, choices: Mapping[str, Any]) -> Rule:
        """The rule of a formula as text, and choices as JSON has them.

        Raises:
            CriterionError: the formula cannot be read.
        """
        return cls(Criterion.parse(formula), choices)

    @cached_property
    def per_layer(self) -> dict[str, Criterion]:
        """The formulas that some layers have instead, by pattern."""
        given = self.choices.get("criteria", {})
        return {pattern: Criterion.parse(text) for pattern, text in given.items()}

    def with_per_layer(self, own: Mapping[str, Criterion]) -> Rule:
        """The rule with these formulas of some layers, and none beside."""
        choices = {key: value for key, value in self.choices.items() if key != "criteria"}
        if own:
            choices["criteria"] = {pattern: own[pattern].text for pattern in sorted(own)}
        return Rule(self.criterion, choices)

    @property
    def formulas(self) -> tuple[Criterion, ...]:
        """The formula, and those that some layers have instead."""
        return tuple(dict.fromkeys((self.criterion, *self.per_layer.values())))

    @property
    def text(self) -> str:
        """The rule on one line, equal for equal rules."""
        return "; ".join([self.criterion.text, *self.other_choices])

    @property
    def other_choices(self) -> list[str]:
        """Each choice in words, in the order of their keys."""
        words = [(key, value) for key, value in sorted(self.choices.items()) if key != "criteria"]
        return [*(f"{key}: {value}" for key, value in words), *with_patterns(self.per_layer)]


def factor_of(criterion: Criterion, base: Criterion) -> float | None:
    """By what a formula is another one multiplied, to three decimals; None if it is not."""
    factor, rest = without_factor(criterion.sympy)
    share, same = without_factor(base.sympy)
    ratio = round(float(factor / share), 3)
    return ratio if rest == same and ratio > 0 else None


def scaled(base: Criterion, factor: float) -> Criterion | None:
    """The formula times a factor; None where a constant becomes too large or too small."""
    with suppress(CriterionError):
        return Criterion.from_sympy(multiply(number(round(factor, 3)), base.sympy))
    return None


def rescaled(
    own: Mapping[str, Criterion], before: Criterion, after: Criterion
) -> dict[str, Criterion]:
    """Formulas that were `before` times a factor, as `after` times it; others are left out."""
    factors = {pattern: factor_of(criterion, before) for pattern, criterion in own.items()}
    found = {pattern: scaled(after, factor) for pattern, factor in factors.items() if factor}
    return {pattern: criterion for pattern, criterion in found.items() if criterion is not None}
