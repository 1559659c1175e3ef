"""Which published recipes is a search compared with, and which of them does what a rule does?"""

from __future__ import annotations

from prunezero.formula.criterion import Criterion
from prunezero.formula.ranking import ranking_form
from prunezero.pruning.recipes.recipe import Recipe, published_recipes
from prunezero.pruning.testbed import with_choices
from prunezero.searching.experiment.task import Rule, Task

# What every search is compared with, in this order: formulas by the same dense statistics.
FORMULAS = ("magnitude", "wanda", "ria", "gblm", "pruner_zero")
# What a search that may mend weights is compared with as well, each as its paper has it.
PIPELINES = ("sparsegpt", "admm")


def baselines(task: Task) -> list[Recipe]:
    """The published recipes that a search is compared with, under the search's conditions.

    A search that uses no gradients is not compared with recipes that would need them collected.
    """
    has_gradients = "gradients" in {terminal.signal for terminal in task.space.terminals}
    layers = {"targets": task.targets, "ignore": task.ignore}
    formulas = [
        with_choices(Recipe.load(name), pattern=task.pattern, statistics="dense", **layers)
        for name in FORMULAS
    ]
    mending = PIPELINES if "update" in task.options else ()
    pipelines = [
        with_choices(Recipe.load(name), pattern=task.pattern, **layers) for name in mending
    ]
    return [
        recipe
        for recipe in (*formulas, *pipelines)
        if has_gradients or recipe.criterion.signal != "gradients"
    ]


def published_equivalent(task: Task, rule: Rule | Criterion) -> str | None:
    """The published recipe that does what the rule does; None if it is new.

    Recipes that do more than rank, and those of other comparison groups, are no twins.
    """
    own = task.recipe(rule, "own")
    if own.extras or own.criteria:
        return None
    compare = task.competing({"compare": own.compare})
    mine = ranking_form(own.criterion.sympy, compare)
    for name in published_recipes():
        recipe = Recipe.load(name)
        competes_alike = not task.competes_freely or recipe.compare == compare
        if competes_alike and not recipe.extras:
            if ranking_form(recipe.criterion.sympy, compare) == mine:
                return name
    return None
