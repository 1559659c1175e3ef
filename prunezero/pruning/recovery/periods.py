"""Removal in periods: in each, the lowest units shrink to nothing while everything else trains.

When a period begins, all units that stay are scored, and as many of the lowest go as in any other
period. Within it they keep training, but after each step of the optimizer are made smaller, so that
they are exactly zero when it ends; from then on they are held at zero.

    linear      x <- (left - 1) / left * (x + change)
    half_space  x <- (1 - 1 / left) x + change, and the factors of the change begin anew;
                zero at once where its product with the x before is below epsilon |x|^2

`left` are the steps to the end of the period, x a unit's weights in all its matrices, and change
what low-rank factors make of them; in a training of the weights themselves it is in x already.

With `cycles` units are tried before the first period, and go by the mean of what scores said then
(`corrective.py`).

Source: linear is HESSO, Chen et al. 2024, arXiv:2409.09085. half_space, and the change that weights
take up, are a reconstruction of LoRAShear, Chen et al. 2023, arXiv:2310.18356, of which no code was
published: the paper takes lambda x / |x| away and lets lambda grow; that it is |x| / left, and that
what is left when a period ends is cut off, is ours.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import PruneZeroWarning, RecipeError, ScoreError
from prunezero.formula.feature_row import UNIT_TERMS
from prunezero.models.anatomy.groups import Group, linears_of
from prunezero.models.editing.selection import Selection
from prunezero.pruning.recipes.word_options import Periods
from prunezero.pruning.recovery.corrective import CorrectiveCycles
from prunezero.pruning.recovery.factors import Factors
from prunezero.pruning.recovery.gradual import Choose, Known
from prunezero.pruning.recovery.moves import clip_scale
from prunezero.pruning.recovery.saliency import shares, unit_terms
from prunezero.pruning.recovery.weights import Weights
from prunezero.pruning.schedule import period_bounds
from prunezero.scoring.statistics import Statistics

# Layers in training that units can be taken out of.
Removable = Factors | Weights


@dataclass
class PeriodicRemoval:
    """What follows a training and takes units out of it, period after period."""

    groups: Sequence[Group]
    """all of whose linear maps train"""
    options: Periods
    dense: Known
    """sums over the dense model that the formula looks at"""
    score: Callable[[Group, Known], Tensor]
    """the scores [units] of a group"""
    choose: Choose
    selection: Selection = field(default_factory=Selection, init=False)
    """units that stay, without those that are on their way out"""
    going: list[Tensor] = field(default_factory=list, init=False)
    """which units are on their way out, bool [units] of each group; empty between two periods"""
    done: int = field(default=0, init=False)
    """steps of the training"""
    chosen: int = field(default=0, init=False)
    """periods whose units were chosen"""
    unscored: int = field(default=0, init=False)
    """times that scores ranked nothing, so that a choice waited for the next step"""

    def __post_init__(self) -> None:
        self._free = [group for group in self.groups if not group.is_protected]
        self._bounds: tuple[int, ...] = ()
        self._fault: ScoreError | None = None
        self.cycles: CorrectiveCycles | None = None
        if self.options.cycles:
            self.cycles = CorrectiveCycles(self.groups, self.options, self._lowest, self._masks)

    @property
    def request(self) -> dict[str, Any]:
        """See `Follower`."""
        kept = [group.name for group in self.groups if group.is_protected]
        return {"periods": self.options.model_dump(), "protected": kept}

    def follow(self, optimizer: torch.optim.Optimizer, total: int) -> None:
        """See `Follower`."""
        self._optimizer = optimizer
        self._bounds = period_bounds(total, self.options)
        if self.cycles is not None:
            self.cycles.follow(total)

    def see(self, trained: Removable) -> None:
        """Choose the units of a period that begins, by what the coming step will do."""
        if self.cycles is not None and not self.cycles.is_over:
            self._try(self.cycles, trained)
        elif self.options.direction == "optimizer" and self._is_due:
            self._choose(self._moving(trained))

    def known(self, trained: Removable) -> dict[str, Statistics]:
        """What formulas may look at before a step, by layer name."""
        if isinstance(trained, Factors) and self.options.direction == "change":
            return self._known(trained.changing)
        return self._known(self._moving(trained))

    def act(self, trained: Removable, done: int, total: int) -> None:
        """Make those that are on their way out smaller, and end a period.

        Raises:
            ScoreError: when all periods are over, no step has given scores that rank anything.
        """
        self.done = done
        if self.cycles is not None and not self.cycles.is_over:
            self.cycles.act(trained, done)
            if not self.cycles.is_over:
                return
            self._bounds = period_bounds(total, self.options, behind=done)
        left = max(0, self._bounds[self.chosen] - done)
        is_over = bool(self.going) and left == 0
        if self.going and left:
            self._shrink(trained, left + 1)
        elif is_over:
            self._remove(trained)
        if isinstance(trained, Factors) and self.options.direction == "change" and self._is_due:
            # What weights are about to take up is what they are compared with.
            self._choose(trained.changing)
            if self.going and self._bounds[self.chosen] <= done:
                self._remove(trained)
        if isinstance(trained, Factors) and self.options.transfer and is_over:
            trained.transfer()
        if done == total:
            self._settle()

    def state(self) -> dict[str, Any]:
        """See `Follower`."""
        return {
            "done": self.done,
            "chosen": self.chosen,
            "unscored": self.unscored,
            "kept": list(self.selection.kept),
            "going": self.going,
            "bounds": self._bounds,
            "cycles": None if self.cycles is None else self.cycles.state(),
        }

    def load(self, trained: Removable, state: dict[str, Any]) -> None:
        """See `Follower`."""
        self.done, self.chosen, self.unscored = (
            state[name] for name in ("done", "chosen", "unscored")
        )
        self._bounds = tuple(state["bounds"])
        if self.cycles is not None:
            self.cycles.load(state["cycles"])
        self.going = self._placed(state["going"])
        if state["kept"]:
            self.selection = Selection(tuple(self.groups), tuple(self._placed(state["kept"])))
            still = self.going or [torch.zeros_like(kept) for kept in self.selection.kept]
            pairs = zip(self.selection.kept, still, strict=True)
            trained.remove(self._masks([kept | one for kept, one in pairs]))

    @property
    def _is_due(self) -> bool:
        """Whether a period has begun whose units are not chosen yet, and none is under way."""
        begun = sum(bound <= self.done for bound in self._bounds[:-1])
        return begun > self.chosen and not self.going

    def _choose(self, moving: Callable[[str], tuple[Tensor, Tensor]]) -> None:
        """Choose the units of all periods that have begun; where nothing is ranked, wait."""
        begun = sum(bound <= self.done for bound in self._bounds[:-1])
        before = self.selection
        known = {} if self.cycles is None else self.cycles.mean_scores()
        try:
            scores = known or self._scores(moving)
        except ScoreError as error:
            self._fault, self.unscored = error, self.unscored + 1
            return
        part = begun / self.options.periods
        self.selection = self.choose(part, lambda group: scores[group.key], before)
        stayed = before.kept or [torch.ones_like(kept) for kept in self.selection.kept]
        pairs = zip(stayed, self.selection.kept, strict=True)
        self.going = [was & ~stays for was, stays in pairs]
        self.chosen = begun

    def _try(self, cycles: CorrectiveCycles, trained: Removable) -> None:
        """Let cycles see the scores of a step; where they rank nothing, it is left out."""
        if not cycles.look_at(self.done):
            return
        moving = self._moving(trained)
        if isinstance(trained, Factors) and self.options.direction == "change":
            moving = trained.changing
        try:
            scores = self._scores(moving)
        except ScoreError as error:
            self._fault, self.unscored = error, self.unscored + 1
            return
        cycles.see(trained, self.done, scores)

    def _lowest(self, scores: Mapping[tuple[str, str], Tensor]) -> Selection:
        """What would stay by these scores if all that goes in the end went at once."""
        return self.choose(1.0, lambda group: scores[group.key], Selection())

    def _scores(
        self, moving: Callable[[str], tuple[Tensor, Tensor]]
    ) -> dict[tuple[str, str], Tensor]:
        """Scores of all groups, by their keys; of those that lose nothing zeros."""
        known = self._known(moving)
        scores = {group.key: self.score(group, known) for group in self._free}
        zeros = {
            group.key: torch.zeros(group.shape, device=group.device)
            for group in self.groups
            if group.is_protected
        }
        return scores | zeros

    def _moving(self, trained: Removable) -> Callable[[str], tuple[Tensor, Tensor]]:
        """Weights, and what the coming step takes from them."""
        scale = clip_scale(trained.masters)
        return lambda layer: trained.moving(layer, self._optimizer, scale)

    def _known(self, moving: Callable[[str], tuple[Tensor, Tensor]]) -> dict[str, Statistics]:
        """Sums over the dense model, and beside them the terms of units."""
        terms = [unit_terms(group, moving) for group in self._free]
        kept = {group.key: one for group, one in self.selection}
        free = [kept[group.key] if group.key in kept else _all(group) for group in self._free]
        known = {layer.name: self._sums(layer.name) for layer in linears_of(self._free)}
        for group, found in zip(self._free, shares(terms, free), strict=True):
            known[group.reader.linear.name].of_training = dict(zip(UNIT_TERMS, found, strict=True))
        return known

    def _sums(self, layer: str) -> Statistics:
        known = self.dense.get(layer)
        # What is derived from sums stays remembered.
        return Statistics(0, 0, {}) if known is None else copy.copy(known)

    def _shrink(self, trained: Removable, left: int) -> None:
        """One step of the way out, of so many that are left with this one."""
        if isinstance(trained, Weights) or self.options.shrink == "linear":
            trained.shrink(self._masks([~one for one in self.going]), (left - 1) / left)
            return
        turned = [self._turned(group, one, trained, left) for group, one in self._pairs()]
        trained.take_up(self._masks([~one for one in self.going]), 1 - 1 / left)
        trained.remove(self._masks([~one for one in turned]))
        self.going = [one & ~gone for (_, one), gone in zip(self._pairs(), turned, strict=True)]

    def _turned(self, group: Group, going: Tensor, trained: Factors, left: int) -> Tensor:
        """Which units on their way out would leave their half space by this step, bool [units]."""
        square, product = torch.zeros(2, group.units, dtype=torch.float64, device=going.device)
        if not bool(going.any()):
            return going
        for member in group.members:
            weight, change = (one.double() for one in trained.changing(member.linear.name))
            square += member.oriented(weight.square()).sum(1)
            product += member.oriented(weight * change).sum(1)
        stays = square * (1 - 1 / left) + product
        return going & (stays < self.options.epsilon * square)

    def _remove(self, trained: Removable) -> None:
        """Let all be gone that was on its way."""
        trained.remove(self.selection.matrix_masks())
        self.going = []

    def _pairs(self) -> list[tuple[Group, Tensor]]:
        return list(zip(self.groups, self.going, strict=True))

    def _masks(self, kept: Sequence[Tensor]) -> dict[str, Tensor]:
        """Masks [out, in] of matrices by what is kept of all groups."""
        masks: dict[str, Tensor] = {}
        for group, one in zip(self.groups, kept, strict=True):
            for member in () if bool(one.all()) else group.members:
                name, mask = member.linear.name, member.mask(one)
                masks[name] = masks[name] & mask if name in masks else mask
        return masks

    def _placed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(tensors, self.groups, strict=True) if tensors else ()
        return [one.to(group.device) for one, group in pairs]

    def _settle(self) -> None:
        if self.chosen < self.options.periods or self.going:
            raise self._fault or RecipeError(
                "the training ended before all units had gone; check the model, or let it have "
                "more steps behind the end of the last period"
            )
        if self.unscored:
            warnings.warn(
                f"{self.unscored} training steps gave scores that rank no units, so those of a "
                "period went later",
                PruneZeroWarning,
                stacklevel=2,
            )


def _all(group: Group) -> Tensor:
    return torch.ones(group.units, dtype=torch.bool, device=group.device)
