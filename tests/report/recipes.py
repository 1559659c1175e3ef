"""Recipes as tests of exported pages write them."""

from __future__ import annotations

from typing import Any

from prunezero.formula.criterion import Criterion
from prunezero.pruning.recipes.recipe import Recipe


def recipe_of(name: str, criterion: Criterion, **choices: Any) -> Recipe:
    return Recipe.model_validate({"name": name, "criterion": criterion, **choices})
