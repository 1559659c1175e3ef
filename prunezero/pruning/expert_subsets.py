"""Which experts go together with the least change of what their mixture makes of tokens?

Losses of subsets do not follow from those of single experts, since routers choose others in the
place of those that went. All experts are run once, and any subset is then a choice of the router
and a quadratic form (`prunezero/models/observing/subset_losses.py`). Where there are too many
subsets, experts go one by one, and one that went is exchanged for one that stays as long as that
lowers the loss.

Source: Lu et al. 2024, Not All Experts are Equal (ACL), arXiv:2402.14800, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, islice, product
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import SelectionError
from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.routing import without_experts
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.routing import watching
from prunezero.models.observing.subset_losses import SubsetLosses
from prunezero.models.observing.walk import BlockWalk
from prunezero.pruning.budget import Budget
from prunezero.pruning.recipes.word_options import Subsets
from prunezero.pruning.selecting import left_of, shares_of

# The losses [subsets] of a mixture whose router may choose some experts, bool [subsets, experts].
Losses = Callable[[Tensor], Tensor]

# Subsets that are asked for together.
_TOGETHER = 256
# Equal subsets differ by rounding, as a fraction of their loss.
_ROUNDING = 1e-12


def best_subsets(
    groups: Sequence[Group],
    language_model: LanguageModel,
    windows: Tensor,
    budget: Budget,
    options: Subsets,
    *,
    is_sequential: bool,
    tell: Callable[[str, int, int], None],
) -> Selection:
    """The experts that stay of each mixture, a share of each by itself; one mixture in memory.

    Args:
        windows: calibration token ids [count, length].
        is_sequential: whether a mixture sees what those before it make of the text without what
            went there; its outputs are compared with those of the dense model all the same.
        tell: told (what, done, total) as the work goes on.

    Raises:
        SelectionError: a router that chooses among groups of experts has too many subsets.
        TextError, ModelError: as `BlockWalk`.
    """
    shares = shares_of(groups, budget)
    counts = {one.name: one.units - left_of(one, shares[one.name]) for one in groups}
    for group in groups:
        _refuse_too_many(group, counts[group.name], options.most)
    dense = _Walk(language_model, windows)
    pruned = _Walk(language_model, windows) if is_sequential else None
    chosen = Selection()
    for done, group in enumerate(groups, start=1):
        if not counts[group.name]:
            everyone = torch.ones(group.units, dtype=torch.bool, device=group.device)
            chosen |= Selection((group,), (everyone,))
            continue
        known = SubsetLosses.of(language_model, group, dense.in_front_of(group))
        if pruned is not None:
            with without_experts(language_model, chosen):
                tokens = pruned.in_front_of(group)
            known = SubsetLosses.of(language_model, group, tokens, known.outputs)
        kept = best_subset(group, known.losses, counts[group.name], options)
        chosen |= Selection((group,), (kept.to(group.device),))
        tell("mixtures of experts seen", done, len(groups))
    return chosen


def best_subset(group: Group, losses: Losses, count: int, options: Subsets) -> Tensor:
    """Which experts stay, bool [experts], where so many go; the earlier of equal subsets."""
    if subsets_of(group, count) <= options.most:
        return _lowest(group, losses, _all_subsets(group, count))[0]
    return exchanged(group, losses, one_by_one(group, losses, count), options.swaps)


def subsets_of(group: Group, count: int) -> int:
    """How many subsets of so many experts may go, as many of each stratum."""
    return math.comb(group.units // group.strata, count // group.strata) ** group.strata


def one_by_one(group: Group, losses: Losses, count: int) -> Tensor:
    """Which experts stay, bool [experts], where the one goes whose going costs least, again."""
    kept = torch.ones(group.units, dtype=torch.bool)
    for _ in range(count):
        alive = kept.nonzero().flatten().tolist()
        kept, _ = _lowest(group, losses, ([*_gone(kept), expert] for expert in alive))
    return kept


def exchanged(group: Group, losses: Losses, kept: Tensor, swaps: int) -> Tensor:
    """The same after the best exchanges of one that went and one that stays, bool [experts]."""
    lowest = float(losses(kept[None])[0])
    for _ in range(swaps):
        pairs = list(product(_gone(kept), kept.nonzero().flatten().tolist()))
        others = ([*(one for one in _gone(kept) if one != back), out] for back, out in pairs)
        best, found = _lowest(group, losses, others)
        if not found < lowest * (1 - _ROUNDING):
            return kept
        kept, lowest = best, found
    return kept


def _all_subsets(group: Group, count: int) -> Iterator[list[int]]:
    """Experts that may go together, as many of each stratum, in the order of their numbers."""
    size = group.units // group.strata
    parts = [
        combinations(range(start, start + size), count // group.strata)
        for start in range(0, group.units, size)
    ]
    return ([expert for part in parts for expert in part] for parts in product(*parts))


def _lowest(group: Group, losses: Losses, subsets: Iterable[list[int]]) -> tuple[Tensor, float]:
    """What stays, bool [experts], of the subset that costs least to take away, and its loss."""
    best, lowest, waiting = torch.ones(group.units, dtype=torch.bool), math.inf, iter(subsets)
    while together := list(islice(waiting, _TOGETHER)):
        kept = torch.ones(len(together), group.units, dtype=torch.bool)
        for row, gone in zip(kept, together, strict=True):
            row[gone] = False
        for row, found in zip(kept, losses(kept).tolist(), strict=True):
            if found < lowest * (1 - _ROUNDING):
                best, lowest = row, found
    return best, lowest


def _gone(kept: Tensor) -> list[int]:
    found: list[int] = (~kept).nonzero().flatten().tolist()
    return found


def _refuse_too_many(group: Group, count: int, most: int) -> None:
    """Refuse a search one by one where experts go in several at once.

    Raises:
        SelectionError: there are too many subsets.
    """
    if group.strata > 1 and subsets_of(group, count) > most:
        raise SelectionError(
            f"{subsets_of(group, count)} subsets of {group.units} experts of {group.name} would be "
            f"tried, more than {most}, and its router chooses among {group.strata} groups, of each "
            "of which as many go, so they cannot go one by one; raise most of schedule: subsets, "
            "or use a formula"
        )


class _Walk:
    """A walk through the blocks that shows what experts are given."""

    def __init__(self, language_model: LanguageModel, windows: Tensor) -> None:
        self._language_model = language_model
        self._walk = BlockWalk(language_model, windows)

    def in_front_of(self, group: Group) -> list[Tensor]:
        """The hidden states [tokens, hidden] that the experts of a group get, by sequence.

        The walk stays in front of its block; blocks before it are passed as the model is now.
        """
        walk, found = self._walk, list[Tensor]()
        while walk.position < group.block:
            walk.advance(walk.position)
        with watching(self._language_model.model, [group]) as seen:

            def look(state: Tensor, *rest: Any, **named: Any) -> Tensor:
                walk.blocks[group.block](state, *rest, **named)
                found.append(seen[group.name].tokens)
                return state

            walk.carry(group.block, look, moves=False)
        return found
