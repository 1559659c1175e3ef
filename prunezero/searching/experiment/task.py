"""What does a search look for? The space, the sparsity and the pattern, and where it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from prunezero.errors import CriterionError, ModelError
from prunezero.formula.algebra import multiply, without_factor
from prunezero.formula.constants import number
from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.linears import Linear, matching
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe, with_patterns
from prunezero.searching.experiment.budgets import Budget
from prunezero.searching.spaces.space import SearchSpace


@dataclass(frozen=True)
class Rule:
    """A formula, and the recipe choices around it that are not those of the task."""

    criterion: Criterion
    """the formula"""
    choices: Mapping[str, Any] = field(default_factory=dict)
    """values of recipe keys, as their YAML spells them"""

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


@dataclass(frozen=True)
class Task:
    """What a search looks for."""

    space: SearchSpace
    """the rules it may write"""
    sparsity: float
    """fraction of the weights to remove"""
    pattern: str
    """free or N:M"""
    seed: int
    """of every draw"""
    seeds: tuple[Rule, ...]
    """what to start from"""
    strategy: str = "evolution"
    """who proposes rules, see `strategies/catalogue.py`"""
    also: tuple[Budget, ...] = ()
    """where else its rules have to be good"""
    draws: int = 1
    """of calibration text that its rules have to be good on, see `testbeds.drawn`"""
    ratios: tuple[str, ...] = ()
    """layers, by pattern, whose share of the sparsity its rules may change; see `on`"""
    criteria: tuple[str, ...] = ()
    """layers, by pattern, that its rules may have other formulas for; see `on`"""
    targets: tuple[str, ...] = ()
    """layers to prune, by pattern; all where there is none"""
    ignore: tuple[str, ...] = ()
    """layers to leave alone, by pattern"""

    @cached_property
    def budgets(self) -> tuple[Budget, ...]:
        """All that a rule is judged in; that of `sparsity` and `pattern` first."""
        return (Budget(self.sparsity, self.pattern), *self.also)

    @property
    def competes_freely(self) -> bool:
        """Whether which weights compete matters in some regime; an N:M pattern says it itself."""
        return any(budget.pattern == "free" for budget in self.budgets)

    def competing(self, choices: Mapping[str, Any]) -> str:
        """The group in which weights compete under a rule of these choices, as a mask sees it.

        Inside an N:M pattern that is a part of a row, whatever the rule says.
        """
        return str(choices.get("compare", self.space.compare)) if self.competes_freely else "row"

    @cached_property
    def options(self) -> dict[str, tuple[Any, ...]]:
        """Recipe keys that the space leaves open in all regimes, and their values."""
        patterns = dict.fromkeys(budget.pattern for budget in self.budgets)
        open_choices = [self.space.choices_for(pattern) for pattern in patterns]
        found = {}
        for key in dict.fromkeys(key for offer in open_choices for key in offer):
            # Who competes is ignored by a pattern that says it itself.
            those = (
                [one for one in open_choices if key in one] if key == "compare" else open_choices
            )
            first, *others = [one.get(key, ()) for one in those]
            values = tuple(value for value in first if all(value in other for other in others))
            if len(values) > 1:
                found[key] = values
        return found

    def on(self, *models: Sequence[Linear]) -> Task:
        """The task on models with these layers, some of which its rules may treat apart.

        Every rule has to fit every model, so a pattern that one of them lacks is left out, and a
        rule to start with that speaks of such layers starts without formulas of their own.
        """
        is_free = all(budget.pattern == "free" for budget in self.budgets)
        ratios = tuple(_found(self.space.ratios, models)) if is_free else ()
        criteria: list[str] = []
        taken: set[tuple[int, str]] = set()
        for pattern, names in _found(self.space.criteria, models).items():
            if not names & taken:
                criteria.append(pattern)
                taken |= names
        seeds = (
            seed if set(seed.per_layer) <= set(criteria) else seed.with_per_layer({})
            for seed in self.seeds
        )
        unlike = {seed.text: seed for seed in seeds}
        return replace(self, ratios=ratios, criteria=tuple(criteria), seeds=tuple(unlike.values()))

    def recipe(self, rule: Rule | Criterion, name: str) -> Recipe:
        """The recipe that a rule stands for in this search.

        Raises:
            RecipeError: its choices exclude each other.
        """
        if isinstance(rule, Criterion):
            rule = Rule(rule)
        fields = {"compare": self.space.compare, "pattern": self.pattern, **rule.choices}
        fields |= {"name": name, "criterion": rule.criterion}
        fields |= {"targets": self.targets, "ignore": self.ignore}
        return validated(Recipe, fields, f"candidate {rule.text}")

    def with_formula(self, recipe: Recipe, criterion: Criterion) -> Recipe:
        """The recipe with another formula; where all layers compete, some keep their factors."""
        own = dict(recipe.criteria)
        if self.competing({"compare": recipe.compare}) == "model":
            own = rescaled(own, recipe.criterion, criterion)
        return recipe.model_copy(update={"criterion": criterion, "criteria": own})


def _found(
    patterns: Sequence[str], models: Sequence[Sequence[Linear]]
) -> dict[str, set[tuple[int, str]]]:
    """Of each pattern that no model lacks, which layers of which models it matches."""
    found = {}
    for pattern in patterns:
        with suppress(ModelError):
            found[pattern] = {
                (place, name)
                for place, layers in enumerate(models)
                for name in matching(pattern, layers)
            }
    return found
