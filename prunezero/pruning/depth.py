"""Which parts of the depth go, where a score depends on which others are gone or go along?

Both ways see units as whole groups of one unit each, ask for scores of the model without some of
them, and spend a budget that all groups have together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunezero.errors import ScoreError
from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.selection import Selection
from prunezero.pruning.budget import Budget
from prunezero.pruning.selecting import allowance, select_units

# Scores of groups on the model without others: (groups, gone) -> one number each.
Scores = Callable[[Sequence[Group], Sequence[Group]], Sequence[float]]


def one_by_one(groups: Sequence[Group], scores_of: Scores, budget: Budget) -> Selection:
    """The selection of which the lowest goes, then of what is left, scored anew, the lowest again.

    It ends when the lowest costs more than is left of the budget. Ties go to the earlier group.

    Source: Song et al. 2024, SLEB, arXiv:2402.09025, algorithm 1.

    Raises:
        ScoreError: a score is NaN or infinite, or all are equal.
    """
    gone: list[Group] = []
    left = allowance(groups, budget)
    while True:
        names = {group.name for group in gone}
        alive = [one for one in groups if one.name not in names and not one.is_protected]
        costs = [group.cost_of(budget.measure) for group in alive]
        if not alive or min(costs) > left:
            return _without(groups, gone)
        lowest = _lowest(alive, scores_of(alive, gone))
        if costs[lowest] > left:
            return _without(groups, gone)
        left -= costs[lowest]
        gone.append(alive[lowest])


def best_span(groups: Sequence[Group], scores_of: Scores, budget: Budget) -> Selection:
    """The selection without so many neighbouring layers as the budget allows, scored as one.

    Ties go to the earlier span.

    Source: Gromov et al. 2024, arXiv:2403.17887, section 3.2.

    Raises:
        ScoreError: a score is NaN or infinite, or all are equal.
    """
    dearest = max(group.cost_of(budget.measure) for group in groups)
    count = int(allowance(groups, budget) // dearest)
    spans = [groups[start : start + count] for start in range(len(groups) - count + 1)]
    free = [span for span in spans if span and _may_go_together(span)]
    if not free:
        return _without(groups, [])
    lowest = _lowest([_joined(span) for span in free], scores_of([*map(_joined, free)], []))
    return _without(groups, free[lowest])


def all_at_once(
    groups: Sequence[Group], scores_of: Callable[[Group], Tensor], budget: Budget, *, compare: str
) -> Selection:
    """The selection without those that score lowest, as many as the budget allows.

    Raises:
        ScoreError: a score is NaN or infinite, or all are equal.
        SelectionError: as `select_units`.
    """
    scores = {group.name: scores_of(group) for group in groups}
    _lowest(groups, [float(value) for value in scores.values()])
    return select_units(groups, lambda group: scores[group.name], budget, compare=compare)


def _may_go_together(span: Sequence[Group]) -> bool:
    blocks = [group.block for group in span]
    is_whole = blocks == list(range(blocks[0], blocks[0] + len(blocks)))
    return is_whole and not any(group.is_protected for group in span)


def _joined(span: Sequence[Group]) -> Group:
    """Neighbouring layers as one unit."""
    first, last = span[0], span[-1]
    return replace(
        first,
        name=first.name if first is last else f"{first.name} to {last.block}",
        members=tuple(member for group in span for member in group.members),
        cost={key: sum(group.cost[key] for group in span) for key in first.cost},
    )


def _lowest(groups: Sequence[Group], scores: Sequence[float]) -> int:
    """The place of the lowest score; the earlier of equal ones.

    Raises:
        ScoreError: a score is NaN or infinite, or all are equal.
    """
    for group, value in zip(groups, scores, strict=True):
        if not math.isfinite(value):
            raise ScoreError(f"the score of {group.name} is {value:g}; it ranks nothing")
    if len(scores) > 1 and min(scores) == max(scores):
        raise ScoreError(
            f"every {groups[0].kind} has the same score {scores[0]:g}; the criterion ranks nothing"
        )
    return min(range(len(scores)), key=lambda place: (scores[place], place))


def _without(groups: Sequence[Group], gone: Sequence[Group]) -> Selection:
    names = {group.name for group in gone}
    kept = [torch.tensor([group.name not in names], device=group.device) for group in groups]
    return Selection(tuple(groups), tuple(kept))
