"""How do units go while a recovery trains: who follows the training, and what does it choose?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.selection import Selection
from prunezero.pruning.choosing import formula_of, last_what_went, selected
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.word_options import Options, Periods, WhileTraining
from prunezero.pruning.recovery.gradual import GradualRemoval
from prunezero.pruning.recovery.periods import PeriodicRemoval
from prunezero.scoring.statistics import Statistics

# What follows a training, by the numbers of the word of `schedule`.
FOLLOWERS: dict[type[Options], type[Any]] = {
    WhileTraining: GradualRemoval,
    Periods: PeriodicRemoval,
}


@dataclass(frozen=True)
class InTraining:
    """What a recipe says of units that go while layers train."""

    recipe: Recipe
    groups: Sequence[Group]
    dense: Mapping[str, Statistics]
    """sums over the dense model, by layer name"""
    sparsity: float
    """the fraction that goes in the end"""
    ratios: Mapping[str, float]
    """of each layer, by its name, where units compete in their group"""

    def follower(self) -> GradualRemoval | PeriodicRemoval:
        """What goes along with the training; its selection is in the end what stays."""
        options = self.recipe.schedule.options
        found: GradualRemoval | PeriodicRemoval = FOLLOWERS[type(options)](
            self.groups, options, self.dense, self.score, self.choose
        )
        return found

    def score(self, group: Group, known: Mapping[str, Statistics]) -> Tensor:
        """The value of the recipe's formula for the units of a group."""
        return formula_of(self.recipe, group, known)

    def choose(
        self, part: float, scores_of: Callable[[Group], Tensor], before: Selection
    ) -> Selection:
        """Which units stay when so large a part of what goes in the end is gone.

        Args:
            scores_of: scores [units] of a group; the lowest go.
            before: what stayed so far; what went before goes anyway.
        """

        def scores(group: Group) -> Tensor:
            return last_what_went(group, scores_of(group), before)

        if self.recipe.compare == "model":
            return selected(self.recipe, self.groups, self.sparsity * part, scores)
        found = Selection()
        for group in self.groups:
            # All members of a group lose the same share.
            share = self.ratios[group.members[0].linear.name] * part
            found |= selected(self.recipe, [group], share, scores)
        return found
