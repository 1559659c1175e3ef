"""Gradual removal: units go step by step while low-rank factors train.

Each step of the optimizer scores all units by the factors and their gradients, which no gradient of
a whole weight is needed for; what counts is an average over steps. Every few steps units whose
average is lowest go, those before them included, and their weights are zeros from then on.

Source: Zhang et al. 2024, LoRAPrune (ACL Findings), arXiv:2305.18403.
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
from prunezero.models.anatomy.groups import Group, linears_of
from prunezero.models.editing.selection import Selection
from prunezero.pruning.recipes.word_options import WhileTraining
from prunezero.pruning.recovery.factors import Factors
from prunezero.pruning.schedule import part_gone
from prunezero.scoring.statistics import Statistics

# By layer name.
Known = Mapping[str, Statistics]
# Which units stay when so large a part of what goes in the end is gone, by their scores and by what
# stayed before.
Choose = Callable[[float, Callable[[Group], Tensor], Selection], Selection]


@dataclass
class GradualRemoval:
    """What follows a training of low-rank factors and takes units out of it."""

    groups: Sequence[Group]
    """all of whose linear maps train"""
    options: WhileTraining
    dense: Known
    """sums over the dense model that the formula looks at"""
    score: Callable[[Group, Known], Tensor]
    """the scores [units] of a group at one step"""
    choose: Choose
    selection: Selection = field(default_factory=Selection, init=False)
    """units that stay so far"""
    averages: list[Tensor] = field(default_factory=list, init=False)
    """of the scores over steps, in the places of those groups that may lose units"""
    part: float = field(default=0.0, init=False)
    """of what goes in the end, how much is gone"""
    unscored: int = field(default=0, init=False)
    """steps whose scores ranked nothing, so that the averages are without them"""

    def __post_init__(self) -> None:
        self._free = [group for group in self.groups if not group.is_protected]
        self._places = {group.key: place for place, group in enumerate(self._free)}
        self._fault: ScoreError | None = None

    @property
    def request(self) -> dict[str, Any]:
        """See `Follower`."""
        return {"while_training": self.options.model_dump()}

    def follow(self, optimizer: torch.optim.Optimizer, total: int) -> None:
        """See `Follower`: gradients alone are looked at."""

    def see(self, trained: Factors) -> None:
        """Let the scores of a step count; where they rank nothing, it is left out."""
        try:
            # What is seen of all layers at once would be as large as the model.
            scores = [self.score(group, self._known(group, trained)) for group in self._free]
        except ScoreError as error:
            self._fault, self.unscored = error, self.unscored + 1
            return
        kept = self.options.momentum
        before = self.averages or [torch.zeros_like(one) for one in scores]
        pairs = zip(before, scores, strict=True)
        self.averages = [kept * average + (1 - kept) * score for average, score in pairs]

    def known(self, trained: Factors) -> dict[str, Statistics]:
        """What formulas may look at before a step, by layer name."""
        return {
            layer: seen
            for group in self._free
            for layer, seen in self._known(group, trained).items()
        }

    def act(self, trained: Factors, done: int, total: int) -> None:
        """Take out the units that are due.

        Raises:
            ScoreError: by then no step has given scores that rank anything.
        """
        part = float(part_gone(done, total, self.options))
        is_due = part > self.part and (done % self.options.every == 0 or part == 1)
        if is_due and not self.averages and self._fault is not None:
            raise self._fault
        if is_due and self.averages:
            self.selection = self.choose(part, self._average_of, self.selection)
            self.part = part
            trained.remove(self.selection.matrix_masks())
        if done == total:
            self._settle()

    def state(self) -> dict[str, Any]:
        """See `Follower`."""
        return {
            "averages": self.averages,
            "part": self.part,
            "unscored": self.unscored,
            "kept": list(self.selection.kept),
        }

    def load(self, trained: Factors, state: dict[str, Any]) -> None:
        """See `Follower`."""
        device = self.groups[0].device
        self.averages = [average.to(device) for average in state["averages"]]
        self.part, self.unscored = state["part"], state["unscored"]
        if state["kept"]:
            pairs = zip(state["kept"], self.groups, strict=True)
            kept = (one.to(group.device) for one, group in pairs)
            self.selection = Selection(tuple(self.groups), tuple(kept))
            trained.remove(self.selection.matrix_masks())

    def _known(self, group: Group, trained: Factors) -> dict[str, Statistics]:
        """What formulas may look at of the layers of a group at this step."""
        return {layer.name: self._seen(layer.name, trained) for layer in linears_of([group])}

    def _seen(self, layer: str, trained: Factors) -> Statistics:
        """What formulas may look at of a layer at this step."""
        known = self.dense.get(layer)
        # What is derived from sums stays remembered.
        seen = Statistics(0, 0, {}) if known is None else copy.copy(known)
        seen.of_training = {**trained.seen(layer), "eta": self.options.eta}
        return seen

    def _average_of(self, group: Group) -> Tensor:
        if group.is_protected:
            return torch.zeros(group.shape, device=group.device)
        return self.averages[self._places[group.key]]

    def _settle(self) -> None:
        if self.part < 1:
            raise RecipeError("no step of the training gave scores of units; check the model")
        if self.unscored:
            warnings.warn(
                f"{self.unscored} training steps gave scores that rank no units, and are not in "
                "the averages by which units went",
                PruneZeroWarning,
                stacklevel=2,
            )
