"""Which units stay of a recipe's groups, by their scores and by what went before?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.selection import Selection
from prunezero.pruning.budget import Budget
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.scoring.statistics import Statistics


def formula_of(recipe: Recipe, group: Group, known: Mapping[str, Statistics]) -> Tensor:
    """The value of the recipe's formula for the units of a group, of the group's shape.

    Args:
        known: by the name of a layer or, where groups are observed, of a group.

    Raises:
        ScoreError, StatisticsError: as the scores of the recipe's unit.
    """
    # All layers of a group have one formula.
    name = group.members[0].linear.name if group.members else group.name
    criterion = recipe.criterion_of(name)
    return recipe.unit.row.scores(
        group, criterion, known, damping=recipe.damping, options=recipe.unit.options
    )


def last_what_went(group: Group, scores: Tensor, before: Selection) -> Tensor:
    """The scores of a group, lowest where units went before."""
    for _, kept in before.of([group]):
        # What went in an earlier step goes in this one too, whatever the formula says of zeros.
        scores = scores.masked_fill(~kept.to(scores.device), torch.finfo(scores.dtype).min)
    return scores


def selected(
    recipe: Recipe,
    groups: Sequence[Group],
    share: float,
    scores_of: Callable[[Group], Tensor],
) -> Selection:
    """What stays of groups that lose a share together, as far as it is chosen beforehand.

    Raises:
        SelectionError, ScoreError: as `UnitKind.select`.
    """
    budget = Budget(share, measure=recipe.unit.measure, pattern=recipe.pattern)
    return recipe.unit.row.select(groups, scores_of, budget, compare=recipe.compare)
