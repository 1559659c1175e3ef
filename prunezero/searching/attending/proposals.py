"""Which criteria of keys to try next: published ones first, then children of the best so far.

The genetics are those of every search (`strategies/genetics.py`). Every draw has a generator of its
own, seeded by (search seed, slot), so proposals follow from the seed and from what was measured.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prunezero.errors import CriterionError, PruneZeroError, SearchError
from prunezero.formula.criterion import Criterion
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe, published_of
from prunezero.searching.attending.rungs import column_policy
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.spaces.space_choices import competing_units, is_within
from prunezero.searching.strategies.evolution import generator
from prunezero.searching.strategies.genetics import as_seen, cross, mutate, random_criterion


@dataclass(frozen=True)
class Proposal:
    """A recipe that nobody has measured yet."""

    recipe: Recipe
    """its name is that of the recipe it was published as, or `candidate-SLOT`"""
    origin: str
    """seed, random, mutate, cross or choose"""
    parents: tuple[str, ...] = ()
    """names of the recipes it was made from"""


def choices_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe of keys says beside its formula, in one spelling."""
    return {key: value for key, value in recipe.effect.items() if key != "criterion"}


def key_of(recipe: Recipe) -> str:
    """The recipe on one line of JSON, equal for equal formulas and choices."""
    return json.dumps(recipe.effect, sort_keys=True)


def competing(recipe: Recipe) -> str:
    """Who competes under a recipe, as a formula sees it."""
    choices = choices_of(recipe)
    return competing_units(choices["unit"], choices["compare"])


def ranked_alike(recipe: Recipe, space: SearchSpace) -> str:
    """Equal for recipes of equal choices whose formulas always keep the same keys."""
    form = recipe.criterion
    with suppress(CriterionError):
        form = as_seen(recipe.criterion, space, competing(recipe))
    return json.dumps([form.text, choices_of(recipe)], sort_keys=True)


def published_within(space: SearchSpace) -> list[Recipe]:
    """The published recipes of keys that look at no costlier signal than the space allows."""
    return [one for one in published_of("kv_column") if is_within(one.signal, space.signals)]


def seeds_of(
    space: SearchSpace, start: Sequence[Recipe] = (), *, from_scratch: bool = False
) -> list[Recipe]:
    """What a search starts from: recipes that were handed over, and published ones of its words.

    From scratch it starts from the former alone.

    Recipes by which keys go at each step are none: what a probe of the prompt says of them is not
    what they do.

    Raises:
        SearchError: a recipe that was handed over looks at what the space excludes, is of no keys,
            or lets keys go at each step.
    """
    for one in start:
        _refuse(one, space)
    published = [
        one
        for one in ([] if from_scratch else published_within(space))
        if space.speaks(one.criterion) and space.holds(one.criterion) and not _is_stepwise(one)
    ]
    return [*start, *published]


def _refuse(recipe: Recipe, space: SearchSpace) -> None:
    where = f"recipe {recipe.name} cannot start a search of space {space.name}"
    if recipe.unit.word != space.unit:
        raise SearchError(f"{where}: it is of unit: {recipe.unit.word}; use one of {space.unit}")
    if not is_within(recipe.signal, space.signals):
        raise SearchError(
            f"{where}: it looks at '{recipe.signal}', and the space allows '{space.signals}' at "
            "most; leave it out, or use another space"
        )
    if _is_stepwise(recipe):
        raise SearchError(f"{where}: its keys go at each step, which no rung sees; leave it out")
    if "STREAM" in recipe.features:
        raise SearchError(f"{where}: STREAM is of whole heads, which no rung sees; leave it out")


def _is_stepwise(recipe: Recipe) -> bool:
    return getattr(recipe.unit.options, "when", "prompt") == "step"


class Proposer:
    """Draws recipes of a space from those that were measured best."""

    def __init__(self, space: SearchSpace, kept: float, seed: int) -> None:
        """Get ready.

        Args:
            kept: share of keys that stay, under which a recipe has to be possible.
        """
        self._space, self._kept, self._seed = space, kept, seed
        self._options = space.choices_for("free")

    def draw(self, slot: int, population: Sequence[Recipe]) -> Proposal | None:
        """The recipe of a slot; None where the draw came to nothing.

        Args:
            population: what breeds, the best first; where it is empty, all is drawn afresh.
        """
        rng = generator(self._seed, slot, "attention")
        found = self._fresh(rng) if not population else self._child(rng, population)
        if found is None:
            return None
        criterion, choices, origin, parents = found
        fields = {"name": f"candidate-{slot}", "criterion": criterion, **choices}
        try:
            recipe = validated(Recipe, fields, fields["name"])
            column_policy(recipe, self._kept)
        except PruneZeroError:
            return None
        return Proposal(recipe, origin, parents)

    def _child(self, rng: random.Random, population: Sequence[Recipe]) -> _Draw | None:
        space = self._space
        chance = rng.random()
        if chance < space.fresh:
            return self._fresh(rng)
        mother, father = (self._parent(rng, population) for _ in range(2))
        choices, criterion = choices_of(mother), mother.criterion
        if chance < space.fresh + space.chosen and self._options:
            choices = self._other_choices(rng, choices)
            return self._seen(criterion, choices), choices, "choose", (mother.name,)
        group = competing(mother)
        if chance < space.fresh + space.chosen + space.crossover:
            child = cross(criterion, father.criterion, space, rng, compare=group)
            return _drawn(child, choices, "cross", mother.name, father.name)
        child = mutate(criterion, space, rng, compare=group)
        return _drawn(child, choices, "mutate", mother.name)

    def _parent(self, rng: random.Random, population: Sequence[Recipe]) -> Recipe:
        """The best of a tournament."""
        places = [rng.randrange(len(population)) for _ in range(self._space.tournament)]
        return population[min(places)]

    def _fresh(self, rng: random.Random) -> _Draw | None:
        choices: dict[str, Any] = {"unit": self._space.unit, "compare": self._space.compare}
        for key, values in sorted(self._options.items()):
            choices[key] = rng.choice(values)
        group = competing_units(choices["unit"], choices["compare"])
        criterion = random_criterion(self._space, rng, compare=group)
        return _drawn(criterion, choices, "random")

    def _other_choices(self, rng: random.Random, choices: Mapping[str, Any]) -> dict[str, Any]:
        key = rng.choice(sorted(self._options))
        others = [value for value in self._options[key] if value != choices.get(key)]
        return {**choices, key: rng.choice(others)}

    def _seen(self, criterion: Criterion, choices: Mapping[str, Any]) -> Criterion:
        """The formula without what these choices do not let a selection see."""
        with suppress(CriterionError):
            group = competing_units(choices["unit"], choices["compare"])
            return as_seen(criterion, self._space, group)
        return criterion


# A formula, choices around it, what made them, and names of parents.
_Draw = tuple[Criterion, dict[str, Any], str, tuple[str, ...]]


def _drawn(
    criterion: Criterion | None, choices: dict[str, Any], origin: str, *parents: str
) -> _Draw | None:
    return None if criterion is None else (criterion, choices, origin, parents)
