"""Task: an experiment on its models, and what becomes of a rule there: one recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from prunezero.errors import ModelError
from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.linears import Linear, matching
from prunezero.pruning.budget import Budget
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.searching.experiment.config import SearchConfig
from prunezero.searching.experiment.objectives import Objective, find_objective
from prunezero.searching.experiment.rule import Rule, rescaled
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.spaces.space_choices import competing_units


@dataclass(frozen=True)
class Task:
    """What a search looks for on its models."""

    config: SearchConfig
    """the experiment as it was asked for"""
    seeds: tuple[Rule, ...] = ()
    """what to start from"""
    ratios: tuple[str, ...] = ()
    """layers, by pattern, whose share of the sparsity its rules may change; see `on`"""
    criteria: tuple[str, ...] = ()
    """layers, by pattern, that its rules may have other formulas for; see `on`"""

    @property
    def space(self) -> SearchSpace:
        """The rules it may write."""
        return self.config.space_content

    @property
    def objective(self) -> Objective:
        """What its rules are measured by on the upper rungs."""
        return find_objective(self.config.objective)

    @property
    def seed(self) -> int:
        """Of every draw."""
        return self.config.seed

    @cached_property
    def budgets(self) -> tuple[Budget, ...]:
        """All that a rule has to serve, the search's own first."""
        return self.config.budgets

    @property
    def measures_once(self) -> bool:
        """Whether a rule is measured on one model, draw and budget, and not on several."""
        return not self.config.also_model and self.config.draws == len(self.budgets) == 1

    @property
    def competes_freely(self) -> bool:
        """Whether it matters under some budget which weights compete; N:M patterns say it."""
        return any(budget.pattern == "free" for budget in self.budgets)

    def competing(self, choices: Mapping[str, Any]) -> str:
        """The group in which weights compete under a rule of these choices, as a mask sees it.

        Inside an N:M pattern that is a part of a row, whatever the rule says.
        """
        compare = str(choices.get("compare", self.space.compare))
        if self.space.unit != "weight":
            return competing_units(choices.get("unit", self.space.unit), compare)
        return compare if self.competes_freely else "row"

    @cached_property
    def options(self) -> dict[str, tuple[Any, ...]]:
        """Recipe keys that the space leaves open under all budgets, and their values."""
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

    @cached_property
    def usual(self) -> Rule:
        """The rule that others are told apart from: the reference of the units, if it may be."""
        unit, features = self.space.unit, self.space.features
        if unit == "weight":
            return Rule(Criterion.parse("abs(W)*X" if "X" in features else "abs(W)"))
        reference = Criterion.parse(UNITS[unit].reference)
        if set(reference.features) <= set(features):
            return Rule(reference)
        return Rule(next(one for one in self.space.terminals if self.space.holds(one)))

    def recipe(self, rule: Rule | Criterion, name: str) -> Recipe:
        """The recipe that a rule stands for in this search.

        Raises:
            RecipeError: its choices exclude each other.
        """
        if isinstance(rule, Criterion):
            rule = Rule(rule)
        fields: dict[str, Any] = {"unit": self.space.unit, "compare": self.space.compare}
        fields |= {"pattern": self.budgets[0].pattern, **self.space.training, **rule.choices}
        fields |= {"name": name, "criterion": rule.criterion}
        fields |= {"targets": self.config.targets, "ignore": self.config.ignore}
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
