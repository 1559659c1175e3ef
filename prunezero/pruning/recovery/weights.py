"""Weights in training: those that stay are free, and those that are zero stay so.

Weights of 16 bits are trained as float32 copies, since small steps would be lost in their rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunezero.models.anatomy.linears import Linear
from prunezero.models.observing.expert_calls import own_weights
from prunezero.models.observing.hooks import removing


@dataclass(frozen=True)
class _Weight:
    """The weight of one layer in training."""

    parameter: Tensor
    """a parameter of the model, or that part of a stack of experts which is one's own"""
    master: Tensor
    """what the optimizer sees: the same storage, or a float32 copy of 16-bit weights"""
    is_removed: Tensor
    """bool of the parameter's shape: exactly zero before the training"""

    def add_gradient(self, parameter: Tensor) -> None:
        """Move the gradient of one sequence to the master; removed weights have none."""
        assert parameter.grad is not None  # the hook runs after it was set
        gradient, parameter.grad = parameter.grad.to(self.master.dtype), None
        gradient.masked_fill_(self.is_removed, 0.0)
        self.master.grad = gradient if self.master.grad is None else self.master.grad + gradient

    def write(self) -> None:
        """Bring the master into the model, with the mask."""
        self.master.masked_fill_(self.is_removed, 0.0)
        self.parameter.detach().copy_(self.master)


@dataclass(frozen=True)
class Weights:
    """The weights of some layers in training."""

    weights: list[_Weight]

    @property
    def masters(self) -> list[Tensor]:
        """What the optimizer changes; backward passes fill their gradients."""
        return [one.master for one in self.weights]

    def write(self) -> None:
        """Let the model compute with the masters as they are now."""
        for one in self.weights:
            one.write()

    def measuring(self) -> AbstractContextManager[None]:
        """Within it the model computes what it will once training is done: what it does anyway."""
        return nullcontext()

    def merge(self) -> None:
        """Leave in the model's weights what was trained: it is there already."""


@contextmanager
def train_weights(model: nn.Module, layers: Sequence[Linear]) -> Iterator[Weights]:
    """Within it, backward passes add to the gradients of the layers' masters."""
    handles: list[Any] = []
    with removing(handles), own_weights(layers) as leaves:
        weights = [_weight(leaves[layer.name]) for layer in layers]
        for one in weights:
            one.parameter.requires_grad_(True)
            register: Any = one.parameter.register_post_accumulate_grad_hook
            handles.append(register(one.add_gradient))
        yield Weights(weights)


def _weight(parameter: Any) -> _Weight:
    weight = parameter.detach()
    master = weight.float() if weight.dtype.itemsize < 4 else weight
    return _Weight(parameter, master, weight == 0)
