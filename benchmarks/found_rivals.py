"""Which published recipes is a found one held against, and with which choices around them?

Each rival stands twice: as published, and as its formula alone with every other choice of the found
recipe. What the second one leaves of a gain is the found formula's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prunezero.errors import PruneZeroError
from prunezero.formula.ranking import ranking_form
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import with_choices

# Formulas, by the same dense statistics as the found ones.
FORMULAS = ("magnitude", "wanda", "ria", "gblm", "pruner_zero", "obd", "fisher")
# Recipes that mend weights, each as its paper has it; rivals of what mends weights too.
PIPELINES = ("sparsegpt", "admm")
PUBLISHED, AROUND, FOUND = "published", "around", "found"
# What a recipe says of itself and does not do, and the formulas.
_TOLD = ("name", "source", "published", "note", "provenance")
_FORMULAS = ("criterion", "criteria")
# Updates that look at scores, not only at which weights go first.
_LOOK_AT_SCORES = {"swaps", "dsnot"}


@dataclass(frozen=True)
class Contender:
    """A recipe to measure, or why there is none."""

    role: str
    """`PUBLISHED`, `AROUND` or `FOUND`"""
    name: str
    """of the rival, or of the found recipe"""
    formula: str
    """with those of some layers behind it"""
    choices: str
    """all other choices in words: those of the recipe, or those that it was refused with"""
    recipe: Recipe | None
    """None where it is refused"""
    refused: str = ""
    """the reason in words"""

    @property
    def ranks_as(self) -> str:
        """The same for recipes that remove and mend the same weights, up to rounding."""
        return "" if self.recipe is None else deed(self.recipe)


def contenders(found: Recipe) -> Iterator[Contender]:
    """All rivals of a found recipe as published, then with its choices, and the found one last."""
    names = FORMULAS + (PIPELINES if found.mends else ())
    yield from (published(name, found) for name in names)
    yield from (around(name, found) for name in names)
    yield contender(FOUND, found)


def published(name: str, found: Recipe) -> Contender:
    """A rival for the pattern and the layers of the found recipe, else as its paper has it."""
    recipe = Recipe.load(name)
    statistics = "dense" if name in FORMULAS else None
    asked = {"pattern": found.pattern, "targets": found.targets, "ignore": found.ignore}
    try:
        return contender(PUBLISHED, with_choices(recipe, statistics=statistics, **asked))
    except PruneZeroError as error:
        return _refused(PUBLISHED, recipe, choices_of(recipe), error)


def around(name: str, found: Recipe) -> Contender:
    """A rival's formula for all layers, with every other choice of the found recipe."""
    rival = Recipe.load(name)
    told = {key: getattr(rival, key) for key in _TOLD}
    try:
        recipe = with_choices(found, **told, criterion=rival.criterion, criteria={})
    except PruneZeroError as error:
        return _refused(AROUND, rival, choices_of(found), error)
    return contender(AROUND, recipe)


def contender(role: str, recipe: Recipe) -> Contender:
    """A recipe that can be measured."""
    return Contender(role, recipe.name, recipe.text, choices_of(recipe), recipe)


def _refused(role: str, recipe: Recipe, choices: str, error: PruneZeroError) -> Contender:
    return Contender(role, recipe.name, recipe.text, choices, None, str(error))


def choices_of(recipe: Recipe) -> str:
    """All that a recipe chooses beside its formulas and the pattern, where it is not the usual."""
    usual = Recipe(name="usual", criterion=recipe.criterion).model_dump(mode="json")
    left_out = {*_TOLD, *_FORMULAS, "schema_version", "pattern", "compare", "statistics"}
    chosen = {
        key: value
        for key, value in recipe.model_dump(mode="json").items()
        if key not in left_out and value != usual[key]
    }
    words = [f"{key} {value}" for key, value in chosen.items()]
    return "; ".join([f"compare {recipe.compare}", *words, f"statistics {recipe.statistics}"])


def deed(recipe: Recipe) -> str:
    """What a recipe does to the weights, the same for formulas that rank alike."""
    sweeps = "obs" in recipe.updates
    group = recipe.compare if recipe.pattern == "free" or sweeps else "row"
    sees_order_alone = (
        recipe.allocate.word == "uniform"
        and recipe.schedule.word == "one-shot"
        and _LOOK_AT_SCORES.isdisjoint(recipe.updates)
    )
    forms = [
        str(ranking_form(one.sympy, group)) if sees_order_alone else one.text
        for one in (recipe.criterion, *recipe.criteria.values())
    ]
    choices = choices_of(recipe).replace(f"compare {recipe.compare}", f"compare {group}")
    return " | ".join([*forms, *recipe.criteria, choices, recipe.pattern])
