"""Baselines: the published recipes that a search is compared with, as they are and on its terms."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from prunezero.errors import RecipeError
from prunezero.formula.criterion import Criterion
from prunezero.formula.ranking import ranking_form
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe, published_of
from prunezero.pruning.testbed import with_choices
from prunezero.scoring.second_order import DAMPING
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.task import Task
from prunezero.searching.spaces.space_choices import word_of

# Published recipes by the schedule under which their units go in a training.
IN_TRAINING = {"while_training": ("lora_prune",), "periods": ("hesso",)}
# How the names of baselines on the terms of a found recipe end.
SAME_TERMS = " +"


def baselines(task: Task) -> list[Recipe]:
    """The published recipes that a search is compared with, under the search's conditions.

    Formulas by the same dense statistics come first; recipes that mend weights, each as its paper
    has it, where the search may mend them too. A search that uses no gradients is not compared with
    recipes that would need them collected, nor one among units that changes no biases with those
    that do.
    """
    has_gradients = "gradients" in {terminal.signal for terminal in task.space.terminals}
    same = {
        "pattern": task.budgets[0].pattern,
        "targets": task.config.targets,
        "ignore": task.config.ignore,
    }
    found = []
    unit = task.space.unit
    for published in map(Recipe.load, UNITS[unit].baselines):
        if not published.extras and unit == "weight":
            found.append(with_choices(published, statistics="dense", **same))
        elif "update" in task.options or unit != "weight":
            found.append(with_choices(published.on_unit(unit), **same))
    found += [with_choices(one, **same, **task.space.training) for one in _in_training(task)]
    has_biases = unit == "weight" or any("bias" in one for one in task.options.get("update", ()))
    return [
        one
        for one in found
        if (has_gradients or one.criterion.signal != "gradients")
        and (has_biases or not one.needs_biases)
    ]


def published_rules(task: Task) -> list[Rule]:
    """What a search starts from: published formulas of its units, with the choices around them.

    Simplest first: of formulas with equal masks the first one stands for all.
    """
    unit = task.space.unit
    if unit == "weight":
        rules = [Rule(recipe.criterion) for recipe in published_of(unit)]
    else:
        recipes = [*_for_units(unit), *_in_training(task)]
        rules = [rule for recipe in recipes for rule in _as_published(recipe, task)]
    rules.sort(key=lambda rule: (rule.criterion.complexity, rule.text))
    return rules


def _for_units(unit: str) -> list[Recipe]:
    """Published recipes of such units, and those of others whose formulas say as much of them.

    Those whose units go in a training are left out; see `_in_training`.
    """
    names = dict.fromkeys([*(one.name for one in published_of(unit)), *UNITS[unit].baselines])
    found = [Recipe.load(name) for name in names]
    return [one.on_unit(unit) for one in found if not one.schedule.row.in_training]


def _in_training(task: Task) -> list[Recipe]:
    """Published recipes whose units go in a training by the schedule that the space has."""
    word = word_of(task.space.training.get("schedule", ""))
    found = map(Recipe.load, IN_TRAINING.get(word, ()))
    return [one.on_unit(task.space.unit) for one in found]


def _as_published(recipe: Recipe, task: Task) -> list[Rule]:
    """The rule of a recipe, as far as the space offers its choices, and its formula alone."""
    alone = Rule(recipe.criterion)
    effect, usual = recipe.effect, task.recipe(alone, "alone").effect
    keys = [key for key in task.options if key in effect and effect[key] != usual.get(key)]
    return [Rule(recipe.criterion, {key: effect[key] for key in keys}), alone]


def on_terms_of(found: Recipe, task: Task) -> tuple[list[Recipe], dict[str, str]]:
    """The baselines' formulas under every choice that a found recipe makes around its own.

    Where all layers compete under a found recipe, or it mends weights, and its baselines do not,
    much of its gain is not its formula's; beside these rows one sees how much is. A baseline whose
    own choices are the same stands in `baselines` already.

    Returns:
        The recipes, and by name of those that exclude such choices why they do.
    """
    published = baselines(task)
    known = [_measured_by(recipe, task) for recipe in published]
    recipes: list[Recipe] = []
    refused: dict[str, str] = {}
    for recipe in published:
        name = f"{recipe.name}{SAME_TERMS}"
        unknown = set(recipe.criterion.features) - set(task.space.features)
        if found.unit.word == "expert" and unknown:
            # Of some routers such features are not known, and the formula alone would need them.
            refused[name] = f"the search space leaves out {', '.join(sorted(unknown))}"
            continue
        try:
            under = _under(found, name, recipe.criterion)
        except RecipeError as error:
            refused[name] = str(error)
            continue
        if _measured_by(under, task) not in known:
            known.append(_measured_by(under, task))
            recipes.append(under)
    return recipes, refused


def rivals_of(found: Recipe) -> list[Recipe]:
    """Published recipes of the units that a recipe removes, as they are and on its terms.

    Those whose formula excludes its choices stand there as published alone, and of two that do the
    same the first.
    """
    unit, known = found.unit.word, [found.effect]
    rivals: list[Recipe] = []
    same = {"pattern": found.pattern, "targets": found.targets, "ignore": found.ignore}
    published = [Recipe.load(name).on_unit(unit) for name in UNITS[unit].baselines]
    for recipe in published:
        with suppress(RecipeError):
            rivals.append(with_choices(recipe, statistics=found.statistics, **same))
    for recipe in published:
        with suppress(RecipeError):
            rivals.append(_under(found, f"{recipe.name}{SAME_TERMS}", recipe.criterion))
    unlike = []
    for recipe in rivals:
        if recipe.effect not in known:
            known.append(recipe.effect)
            unlike.append(recipe)
    return unlike


def _under(found: Recipe, name: str, criterion: Criterion) -> Recipe:
    kept = {key: value for key, value in found.effect.items() if key != "criteria"}
    return validated(Recipe, {**kept, "name": name, "criterion": criterion}, f"recipe {name}")


def choices_in_words(found: Recipe) -> str:
    """What a found recipe chooses around its formula."""
    updates = ", ".join(found.updates) or "none"
    usual = {
        **{"allocate": "uniform", "update": "none", "permute": "none", "recover": "none"},
        **{"schedule": "one-shot", "statistics": "dense", "damping": DAMPING},
    }
    told = {
        "compare": found.compare,
        "allocate": found.allocate.text,
        "update": updates,
        "permute": found.permute.text,
        "schedule": found.schedule.text,
        "recover": found.recover.text,
        "statistics": found.statistics,
        "damping": found.damping,
    }
    return ", ".join(f"{key} {word}" for key, word in told.items() if usual.get(key) != word)


def _measured_by(recipe: Recipe, task: Task) -> dict[str, Any]:
    """Equal for recipes that are measured alike in this search."""
    # An N:M pattern says itself who competes.
    alike = {} if task.competes_freely else {"compare": "row"}
    return recipe.effect | alike


def published_equivalent(task: Task, rule: Rule | Criterion) -> str | None:
    """The published recipe that does what the rule does; None if it is new.

    Recipes that do more than rank, and those of other comparison groups, are not equivalent.
    """
    own = task.recipe(rule, "own")
    if own.extras or own.criteria:
        return None
    if task.space.unit != "weight":
        return _published_units(own)
    compare = task.competing({"compare": own.compare})
    mine = ranking_form(own.criterion.sympy, compare)
    for recipe in published_of("weight"):
        competes_alike = not task.competes_freely or recipe.compare == compare
        if competes_alike and not recipe.extras:
            if ranking_form(recipe.criterion.sympy, compare) == mine:
                return recipe.name
    return None


def _published_units(own: Recipe) -> str | None:
    """The published recipe of such units with the same effect."""
    alike = (recipe for recipe in _for_units(own.unit.word) if recipe.effect == own.effect)
    return next((recipe.name for recipe in alike), None)
