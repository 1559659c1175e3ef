"""What must a training be able to ask of what it trains, and of what goes along with it?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Parametrisation(Protocol):
    """What of a model changes in a training."""

    @property
    def masters(self) -> list[Tensor]:
        """What the optimizer changes; backward passes fill their gradients."""

    def write(self) -> None:
        """Let the model compute with the masters as they are now."""

    def measuring(self) -> AbstractContextManager[None]:
        """Within it the model computes what it will once training is done."""

    def frozen(self) -> dict[str, Tensor]:
        """Tensors of the model that are no masters and changed all the same, by names."""

    def load_frozen(self, tensors: Mapping[str, Tensor]) -> None:
        """Be as it was when `frozen` gave these."""

    def merge(self) -> None:
        """Leave in the model's weights what was trained."""


class Follower(Protocol):
    """What goes along with a training, step by step, and may take weights out of it."""

    @property
    def request(self) -> dict[str, Any]:
        """What its doings follow from, as plain numbers and words."""

    def follow(self, optimizer: torch.optim.Optimizer, total: int) -> None:
        """Know the optimizer whose steps it goes along with, and how many there are."""

    def see(self, trained: Any) -> None:
        """Look at the masters and their gradients before a step: finite, and not clipped yet."""

    def act(self, trained: Any, done: int, total: int) -> None:
        """Do what is due after so many steps of all, whether or not the last changed anything."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: tensors, numbers and words, by names."""

    def load(self, trained: Any, state: dict[str, Any]) -> None:
        """Be as it was when `state` was taken."""
