"""Which units stay: one function for each kind of unit, from scores to a selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.selection import Selection
from prunezero.pruning.budget import Budget
from prunezero.scoring.selection import select_model


def select_weights(
    groups: Sequence[Group],
    scores_of: Callable[[Group], Tensor],
    budget: Budget,
    *,
    compare: str,
) -> Selection:
    """The weights that stay where those of all matrices compete; otherwise no group is decided.

    Weights that compete inside their matrix are chosen when it is mended: a sweep chooses some
    columns when it reaches them, on weights that it has changed by then.

    Raises:
        SelectionError: weights are not counted in the budget's measure.
        ScoreError: scores rank nothing.
    """
    for group in groups:
        group.cost_of(budget.measure)
    if compare != "model" or budget.pattern != "free":
        return Selection()
    kept = select_model([scores_of(group) for group in groups], budget.amount)
    return Selection(tuple(groups), tuple(kept))
