"""A training that has begun: what formulas see of it when the first units are about to go.

Which units a rule takes in a training shows only when that has run. What the cheap rungs look at is
one moment of it, the first in which units could go, of a training in which none went: masks are
those that a rule would choose then, all at once. How a rule does, only the upper rungs say, which
train.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from prunezero.models.anatomy.groups import Group, linears_of
from prunezero.models.observing.calibration import Progress
from prunezero.pruning.in_training import InTraining
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recovery.words import known_of_dense, layers_trained
from prunezero.pruning.testbed import Testbed
from prunezero.scoring.statistics import Statistics


class _SeenError(Exception):
    """Ends a training that has been looked at; whoever began it catches it."""


class _Look:
    """A follower that looks at one step, takes nothing out, and ends the training."""

    request: Mapping[str, Any] = {}

    def __init__(self, follower: Any, share: float) -> None:
        self._follower, self._share = follower, share
        self.seen: dict[str, Statistics] = {}

    def follow(self, optimizer: torch.optim.Optimizer, total: int) -> None:
        """See `Follower`."""
        self._follower.follow(optimizer, total)
        # Before the second step, if there is one: before the first, factors make no change.
        self._left = min(total - 1, max(1, math.floor(self._share * total)))

    def see(self, trained: Any) -> None:
        """See `Follower`."""
        if self._left <= 0:
            self.seen = self._follower.known(trained)
            for one in self.seen.values():
                one.of_training = {key: _copy(value) for key, value in one.of_training.items()}
            raise _SeenError

    def act(self, trained: Any, done: int, total: int) -> None:
        """See `Follower`."""
        self._left -= 1

    def state(self) -> dict[str, Any]:
        """See `Follower`; it is never kept."""
        return {}

    def load(self, trained: Any, state: dict[str, Any]) -> None:
        """See `Follower`."""


def begin_training(
    testbed: Testbed,
    recipe: Recipe,
    groups: Sequence[Group],
    statistics: Mapping[str, Statistics],
    progress: Progress | None = None,
) -> dict[str, Statistics]:
    """Statistics of layers with what their training has come to, by name.

    The model is dense afterwards, bit for bit as it was.

    Args:
        recipe: has a schedule by which units go in a training.
        statistics: sums over the dense model.

    Raises:
        RecipeError, ModelError: as the training.
    """
    model, options = testbed.language_model, recipe.recover.options
    windows = testbed.windows("calibration")
    follower = InTraining(recipe, groups, statistics, 0.0, {}).follower()
    look = _Look(follower, float(getattr(recipe.schedule.options, "begin", 0.0)))
    known = known_of_dense(model, options, windows, testbed.sources("calibration"), progress)
    layers = layers_trained(model, linears_of(groups), options)
    of_dense = {"answers": known.answers, "mixture": known.mixture}
    with suppress(_SeenError):
        text = (model, layers, windows, options)
        recipe.recover.row.function(*text, progress=progress, follower=look, **of_dense)
    return look.seen


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
