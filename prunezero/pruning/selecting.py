"""Which units stay: for each kind of unit a function from scores to a selection, and its checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prunezero.errors import SelectionError
from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.selection import Selection
from prunezero.pruning.budget import Budget
from prunezero.scoring.request import check_request, removed_count
from prunezero.scoring.selection import lowest_first, refuse_non_finite, select_model


def check_weights(groups: Sequence[Group], budget: Budget, *, compare: str) -> None:
    """Refuse a sparsity, group or pattern that fits no mask of some matrix.

    Raises:
        SelectionError: names the matrix.
    """
    for group in groups:
        columns = group.shape[1]
        try:
            check_request(columns, budget.amount, compare=compare, pattern=budget.pattern)
        except SelectionError as error:
            raise SelectionError(f"layer {group.name}: {error}") from error


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


def check_units(groups: Sequence[Group], budget: Budget, *, compare: str) -> None:
    """Refuse a budget under which more would go than may.

    Raises:
        SelectionError: names the group, or says what all of them together can lose.
    """
    removed_count(1, budget.amount)
    free = sum(_cost(group, budget) * _free(group) for group in groups)
    is_mixed = len({_cost(group, budget) for group in groups}) > 1
    if (compare == "model" or is_mixed) and free < allowance(groups, budget):
        raise SelectionError(
            f"{budget.amount:g} of the {budget.measure} of all units cannot go, since "
            f"some of each group have to stay; at most {free / _total(groups, budget):.4f} can"
        )
    if compare == "group":
        shares = shares_of(groups, budget)
        for group in groups:
            left = group.units - removed_count(group.units, shares[group.name])
            if left < group.least and not group.is_protected:
                raise SelectionError(
                    f"{shares[group.name]:g} of the {group.units} {group.kind}s of {group.name} "
                    f"leaves {left}, but at least {group.least} have to stay; remove less"
                )


def shares_of(groups: Sequence[Group], budget: Budget) -> dict[str, float]:
    """What each group loses by itself so that together they lose the budget, by name.

    All lose the same share, but for protected ones, which lose nothing. Where units of some groups
    are so large that rounding down leaves much of it, groups of smaller ones take that over.

    Raises:
        SelectionError: those that may lose units do not have as many.
    """
    shares = dict.fromkeys((group.name for group in groups), 0.0)
    left = [group for group in groups if not group.is_protected]
    wanted = budget.amount * _total(groups, budget)
    least = wanted if budget.measure == "milliseconds" else math.floor(wanted)
    if _total(left, budget) < least:
        raise SelectionError(
            f"{budget.amount:g} of the {budget.measure} cannot go, since "
            f"{len(groups) - len(left)} of {len(groups)} groups are protected; remove less, or "
            "protect fewer blocks"
        )
    if len(left) == len(groups) and len({_cost(group, budget) for group in left}) == 1:
        return dict.fromkeys(shares, budget.amount)
    while left:
        largest = max(_cost(group, budget) for group in left)
        share = min(1.0, max(0.0, wanted / _total(left, budget)))
        for group in [group for group in left if _cost(group, budget) == largest]:
            shares[group.name] = min(share, _free(group) / group.units)
            gone = group.units - left_of(group, shares[group.name])
            wanted -= largest * gone
            left.remove(group)
    return shares


def left_of(group: Group, share: float) -> int:
    """How many units stay of a group that loses a share by itself; all, if it is protected."""
    gone = 0 if group.is_protected else removed_count(group.units, share)
    return _rounded_up(group, group.units - gone)


def _free(group: Group) -> int:
    """How many of its units may go."""
    return 0 if group.is_protected else max(0, group.units - group.fewest)


def _rounded_up(group: Group, left: int) -> int:
    """At least so many units, of which kernels can make use; all, where that is more."""
    return min(group.units, -(-left // group.step) * group.step)


def select_units(
    groups: Sequence[Group],
    scores_of: Callable[[Group], Tensor],
    budget: Budget,
    *,
    compare: str,
) -> Selection:
    """The units that stay of groups that have one budget together; the lowest scores go.

    In a group by itself a share of its units goes, rounded down. Where the groups of the model
    compete, units go in the order of their scores as far as what they cost stays within the share
    of what all cost, others after one that no longer fits; a group keeps its least. Where a number
    of units must be a multiple, the best of those that would go come back. Of a group in strata one
    unit of each goes at a time, and their mean score counts. Ties go to the earlier group, then to
    the lower index.

    Args:
        compare: "group" or "model".

    Raises:
        SelectionError: as `check_units`.
        ScoreError: a score is NaN or infinite.
    """
    check_units(groups, budget, compare=compare)
    scores = [scores_of(group).float().cpu() for group in groups]
    for values in scores:
        refuse_non_finite(values)
    if compare == "model":
        removed = _removed_of_all(groups, scores, budget)
    else:
        shares = shares_of(groups, budget)
        removed = [group.units - left_of(group, shares[group.name]) for group in groups]
    kept = [_kept(*one) for one in zip(groups, scores, removed, strict=True)]
    placed = (one.to(group.device) for one, group in zip(kept, groups, strict=True))
    return Selection(tuple(groups), tuple(placed))


def _kept(group: Group, scores: Tensor, removed: int) -> Tensor:
    """Bool [units]: all but the lowest, so many that they are a multiple of what they must be."""
    left = _rounded_up(group, group.units - removed)
    kept = torch.ones(group.units, dtype=torch.bool)
    kept[lowest_first(scores, group.strata)[: group.units - left]] = False
    return kept


def _removed_of_all(groups: Sequence[Group], scores: Sequence[Tensor], budget: Budget) -> list[int]:
    """How many units of each group are among the lowest of all that fit into the budget."""
    # The best of each group stay whatever others score.
    free = [_turns(group, values) for group, values in zip(groups, scores, strict=True)]
    owners = torch.cat([torch.full((len(one),), place) for place, one in enumerate(free)])
    order = lowest_first(torch.cat(free))
    costs = [group.cost_of(budget.measure) * group.strata for group in groups]
    left, removed = allowance(groups, budget), [0] * len(groups)
    # What no longer fits is passed over, so a large unit does not keep small ones from going; of
    # one group they go in order, since all cost the same.
    for owner in owners[order].tolist():
        if costs[owner] <= left:
            left -= costs[owner]
            removed[owner] += groups[owner].strata
        elif left < min(costs):
            break
    return removed


def _turns(group: Group, scores: Tensor) -> Tensor:
    """The rising scores of what may go: units, or the mean of one of each stratum."""
    order = lowest_first(scores, group.strata)[: _free(group)]
    return scores[order].reshape(-1, group.strata).mean(1)


def _cost(group: Group, budget: Budget) -> float:
    return group.cost_of(budget.measure)


def _total(groups: Sequence[Group], budget: Budget) -> float:
    return sum(_cost(group, budget) * group.units for group in groups)


def allowance(groups: Sequence[Group], budget: Budget) -> float:
    """What may go together, in the budget's measure."""
    return budget.allowance(_total(groups, budget))
