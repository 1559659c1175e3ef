"""How much of its units does each stage of a recipe lose, so that all remove what is asked for?

Parameters are counted on what would be left of the matrices of all blocks, so that a weight that
goes by two stages counts once. How many go does not depend on which: it is settled before the work,
on units of no particular order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunezero.errors import SelectionError
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.budget import Budget
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.staged import StagedRecipe
from prunezero.pruning.recipes.word_options import Options, Part, Power
from prunezero.pruning.selecting import select_units
from prunezero.scoring.request import removed_count

# Halvings of the interval in which a share is searched.
_HALVINGS = 26


@dataclass(frozen=True)
class Asked:
    """What a stage may know when it says how much it takes."""

    sparsity: float
    """fraction of the parameters that all stages remove together"""
    total: int
    """parameters of all blocks"""
    own: int
    """parameters of all of its units"""
    units: int
    """how many there are"""
    others: int
    """parameters of all units of the other stages"""


@dataclass(frozen=True)
class Plan:
    """How much the stages of a recipe remove from a model."""

    shares: tuple[float, ...]
    """fraction of its units that each stage loses, in its own measure"""
    selection: Selection
    """as many units as will go, of no particular order"""
    removed: int
    """parameters that go"""
    total: int
    """parameters of all blocks: weights and biases of their linear maps"""


def rest(asked: Asked, options: Options) -> float | None:
    """None: the stage takes what the others leave."""
    return None


def part(asked: Asked, options: Part) -> float | None:
    """The parameters that a part of what is asked for amounts to."""
    return options.of * asked.sparsity * asked.total


def power(asked: Asked, options: Power) -> float | None:
    """The parameters of so many units as a power of the sparsity says, and half a unit more.

    Source: Sandri et al. 2025, 2SSP, arXiv:2501.17771: round(L * s ** (P_mlp / P_attn / 1.5)).
    """
    exponent = asked.others / asked.own / options.divisor
    count = round(asked.units * asked.sparsity**exponent) if asked.sparsity else 0
    return min((count + 0.5) * asked.own / asked.units, asked.sparsity * asked.total)


def parameters_left(linears: Sequence[Linear], decided: Iterable[tuple[Group, Tensor]]) -> int:
    """How many weights and biases some linear maps keep without units that go.

    Args:
        decided: groups, and bool of their shape what stays of each.
    """
    stays: dict[tuple[str, int], Tensor] = {}
    for group, kept in decided:
        for member in group.members:
            key, staying = (member.linear.name, member.axis), member.kept_rows(kept)
            stays[key] = stays[key] & staying if key in stays else staying
    left = 0
    for linear in linears:
        rows, columns = (
            int(stays[linear.name, axis].sum())
            if (linear.name, axis) in stays
            else linear.weight.shape[axis]
            for axis in (0, 1)
        )
        left += rows * columns + (rows if linear.bias is not None else 0)
    return left


def plan_of(
    language_model: LanguageModel,
    recipe: StagedRecipe,
    sparsity: float,
    groups: Sequence[Sequence[Group]],
) -> Plan:
    """How much each stage removes, so that all of them remove a share of all blocks' parameters.

    Stages that say how much they take are settled first, in their order. Those that take the rest
    lose one share of their units, rounded down to whole ones; where that leaves something, the one
    with the largest steps keeps its number, and the others go on.

    Args:
        sparsity: fraction of the weights and biases of all linear maps of the blocks.
        groups: of each stage.

    Raises:
        SelectionError: its stages cannot remove as much.
    """
    planner = _Planner(find_linears(language_model.model), recipe, groups)
    wanted = removed_count(planner.total, sparsity)
    own = [planner.own(place) for place in range(len(groups))]
    open_places = []
    for place, stage in enumerate(recipe.stages):
        units = sum(group.units for group in groups[place])
        asked = Asked(sparsity, planner.total, own[place], units, sum(own) - own[place])
        amount = stage.share.row.function(asked, stage.share.options)
        if amount is None:
            open_places.append(place)
        else:
            planner.settle([place], planner.removed({}) + amount)
    # Large steps first: smaller ones make up for what they leave.
    while open_places:
        planner.settle(open_places, wanted)
        coarsest = max(open_places, key=lambda place: planner.step(place))
        open_places.remove(coarsest)
        for place in open_places:
            del planner.shares[place]
    removed = planner.removed({})
    largest = max(planner.step(place) for place in range(len(groups)))
    if removed + largest <= wanted:
        raise SelectionError(
            f"{sparsity:g} of the parameters of all blocks cannot go by the stages of recipe "
            f"{recipe.name}, since some of each kind have to stay; at most "
            f"{removed / planner.total:.4f} can"
        )
    shares = tuple(planner.shares[place] for place in range(len(groups)))
    return Plan(shares, planner.selection({}), removed, planner.total)


class _Planner:
    """The shares of the stages that are settled so far."""

    def __init__(
        self, linears: Sequence[Linear], recipe: StagedRecipe, groups: Sequence[Sequence[Group]]
    ) -> None:
        self._linears, self._recipes, self._groups = linears, recipe.recipes, groups
        self.total = parameters_left(linears, ())
        self.shares: dict[int, float] = {}
        """by place of the stage"""

    def own(self, place: int) -> int:
        """The parameters of all units of a stage."""
        nothing = [
            (group, torch.zeros(group.shape, dtype=torch.bool)) for group in self._groups[place]
        ]
        return self.total - parameters_left(self._linears, nothing)

    def step(self, place: int) -> float:
        """About how many parameters go when a stage loses one unit more, where it can."""
        recipe, groups = self._recipes[place], self._groups[place]
        if recipe.competes_freely:
            return self.own(place) / sum(group.units for group in groups)
        return self.own(place) / min(group.units / group.step for group in groups)

    def settle(self, places: Sequence[int], wanted: float) -> None:
        """Find the largest share of some stages with which so many parameters go, at most."""
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            try:
                fits = self.removed(dict.fromkeys(places, middle)) <= wanted
            except SelectionError:
                fits = False
            low, high = (middle, high) if fits else (low, middle)
        self.shares |= dict.fromkeys(places, low)

    def removed(self, more: Mapping[int, float]) -> int:
        """The parameters that go with the settled stages and some more, by place."""
        return self.total - parameters_left(self._linears, self.selection(more))

    def selection(self, more: Mapping[int, float]) -> Selection:
        """As many units as go with the settled stages and some more, by place."""
        found = Selection()
        for place, share in sorted({**self.shares, **more}.items()):
            groups = still_there(self._groups[place], found)
            if groups:
                found |= _of_no_order(self._recipes[place], groups, share)
        return found


def still_there(groups: Sequence[Group], gone: Selection) -> list[Group]:
    """The groups of whose matrices not all are gone as a whole."""
    whole = {
        member.linear.name
        for group, kept in gone
        for member in group.members
        if group.units == 1 and not bool(kept.any())
    }
    return [
        group
        for group in groups
        if any(member.linear.name not in whole for member in group.members)
    ]


def _of_no_order(recipe: Recipe, groups: Sequence[Group], share: float) -> Selection:
    """As many units as a recipe removes, whatever their scores."""
    compare = "model" if recipe.competes_freely else "group"
    budget = Budget(share, measure=recipe.unit.measure)
    equal: Callable[[Group], Tensor] = lambda group: torch.zeros(group.units)  # noqa: E731
    return select_units(groups, equal, budget, compare=compare)
