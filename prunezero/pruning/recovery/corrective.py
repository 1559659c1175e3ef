"""Which units are redundant: what do scores say of them while others are gone on trial?

Scores are of a series that holds near the weights as they are, and a unit is about to become zero.
So units that rank lowest are shrunk to nothing within a cycle, step by step, and scored on the way:

    V_1 = the K lowest          V_{c+1} = those among the K lowest at a step of cycle c, without
                                          V_1 ... V_c

When a cycle ends, weights are again what they were before the first, and the next one tries V. That
goes on until V is small enough or there were enough cycles; then those units go whose mean score,
over all steps of all cycles, is lowest. What the optimizer remembers of gradients stays as it is.

Source: the corrective redundant identification cycle of HESSO, Chen et al. 2024, arXiv:2409.09085,
and its code, which also adds to the scores how the loss grows without parts of a layer; that is
left out, since all units of a layer get the same. There the last score of a cycle is of units that
are zero; here each step is scored before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.selection import Selection
from prunezero.pruning.recipes.word_options import Periods
from prunezero.pruning.recovery.factors import Factors
from prunezero.pruning.recovery.weights import Weights
from prunezero.pruning.schedule import cycle_bounds

Key = tuple[str, str]


@dataclass
class CorrectiveCycles:
    """Units that shrink on trial before any goes, and the scores seen meanwhile."""

    groups: Sequence[Group]
    options: Periods
    lowest: Callable[[Mapping[Key, Tensor]], Selection]
    """what would stay by scores [units] of all groups, if all went at once"""
    masks: Callable[[Sequence[Tensor]], dict[str, Tensor]]
    """masks of matrices by what is kept of all groups"""
    trying: list[Tensor] = field(default_factory=list, init=False)
    """units that are shrinking, bool [units] of each group; empty before the first cycle"""
    tried: list[Tensor] = field(default_factory=list, init=False)
    """those, and those of earlier cycles"""
    low: list[Tensor] = field(default_factory=list, init=False)
    """units that were not tried yet, and ranked low at a step of this cycle"""
    sums: list[Tensor] = field(default_factory=list, init=False)
    """of the scores over steps, float64 [units] of each group"""
    count: int = field(default=0, init=False)
    """of those steps"""
    end: int = field(default=0, init=False)
    """steps of the training after which the cycle under way ends"""
    is_over: bool = field(default=False, init=False)
    before: tuple[list[Tensor], dict[str, Tensor]] = field(default=([], {}), init=False)
    """masters, and weights of layers that are none, as they were before the first cycle"""

    def follow(self, total: int) -> None:
        """Know of how many steps the training is."""
        self._bounds = cycle_bounds(total, self.options)

    def look_at(self, done: int) -> bool:
        """Whether the scores of the step behind so many are asked for."""
        return not self.is_over and done >= self._bounds[0]

    def see(self, trained: Factors | Weights, done: int, scores: Mapping[Key, Tensor]) -> None:
        """Let the scores of all groups count, and begin with the first cycle."""
        kept = self.lowest(scores)
        lowest = [~one for one in kept.kept]
        found = [scores[group.key].double() for group in self.groups]
        before = self.sums or [torch.zeros_like(one) for one in found]
        self.sums = [one + other for one, other in zip(before, found, strict=True)]
        self.count += 1
        if self.trying:
            pairs = zip(self.low, lowest, self.tried, strict=True)
            self.low = [one | (other & ~tried) for one, other, tried in pairs]
            return
        masters = [one.detach().to("cpu", copy=True) for one in trained.masters]
        weights = {name: one.to("cpu", copy=True) for name, one in trained.layer_weights().items()}
        self.before = masters, weights
        self.tried = [torch.zeros_like(one) for one in lowest]
        self._begin(lowest, done)

    def act(self, trained: Factors | Weights, done: int) -> None:
        """Make units on trial smaller, and end a cycle."""
        if self.trying:
            left = max(0, self.end - done)
            trained.shrink(self.masks([~one for one in self.trying]), left / (left + 1))
            if left == 0:
                self._restore(trained)
                self._begin(self.low, done)
                self.is_over = sum(int(one.sum()) for one in self.trying) <= self.options.tolerance
        self.is_over = self.is_over or done >= self._bounds[-1]
        if self.is_over:
            # The copies of all weights are wanted no longer.
            self.trying, self.before = [], ([], {})

    def mean_scores(self) -> dict[Key, Tensor]:
        """The mean over all steps that were seen, by group; nothing where there are none."""
        pairs = zip(self.groups, self.sums, strict=True) if self.count else ()
        return {group.key: (total / self.count).float() for group, total in pairs}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        names = ("trying", "tried", "low", "sums", "count", "end", "is_over")
        masters, weights = self.before
        return {name: getattr(self, name) for name in names} | {
            "masters": masters,
            "weights": weights,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Be as it was when `state` was taken."""
        for name in ("trying", "tried", "low", "sums"):
            pairs = zip(state[name], self.groups, strict=True) if state[name] else ()
            setattr(self, name, [one.to(group.device) for one, group in pairs])
        self.count, self.end, self.is_over = state["count"], state["end"], state["is_over"]
        self.before = state["masters"], state["weights"]

    def _begin(self, units: list[Tensor], done: int) -> None:
        """Try some units in the cycle that is under way behind so many steps."""
        self.trying, self.low = units, [torch.zeros_like(one) for one in units]
        self.tried = [one | other for one, other in zip(self.tried, units, strict=True)]
        self.end = next((bound for bound in self._bounds if bound > done), done)

    @torch.no_grad()
    def _restore(self, trained: Factors | Weights) -> None:
        """Let all weights be what they were before the first cycle."""
        masters, weights = self.before
        for master, value in zip(trained.masters, masters, strict=True):
            master.detach().copy_(value)
        trained.load_frozen(weights)
        trained.write()
