"""Warm start of a search: the rules that another one found, or that a recipe says."""

from __future__ import annotations

from pathlib import Path

from prunezero.errors import RecipeError
from prunezero.pruning.recipes.recipe import Recipe, published_recipes
from prunezero.report.runs.summary import find_run, front, read_run, rule_of
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.spaces.space_choices import CHOOSABLE


def rules_of(source: str, runs_dir: Path) -> list[Rule]:
    """The rules of a recipe, or of a search: its winner, and the best of each size, best first.

    Args:
        source: name of a published recipe, file of a recipe, or name or folder of a search.
        runs_dir: where searches are looked for by their names.

    Raises:
        PruneZeroError: there is none, or a file of it is damaged.
    """
    if source in published_recipes() or Path(source).is_file():
        return [_rule_of(Recipe.load(source))]
    run = read_run(find_run(source, runs_dir))
    winner = [] if run.recipe is None else [_rule_of(run.recipe)]
    return [*winner, *(rule_of(row) for row in reversed(front(run.candidates or ())))]


def _rule_of(recipe: Recipe) -> Rule:
    if recipe.unit.word != "weight":
        raise RecipeError(
            f"recipe {recipe.name} removes units of kind {recipe.unit.word}, but a search writes "
            "formulas of single weights; start from a recipe of those"
        )
    fields = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    choices = {key: fields[key] for key in (*CHOOSABLE, "criteria") if key in fields}
    return Rule(recipe.criterion, choices)
