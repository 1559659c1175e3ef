"""Weights in training: those that stay are free, and those that are zero stay so.

Weights of 16 bits are trained as float32 copies, since small steps would be lost in their rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.models.anatomy.linears import Linear
from prunezero.models.observing.expert_calls import own_weights
from prunezero.models.observing.hooks import removing
from prunezero.pruning.recovery.moves import coming_move


@dataclass(frozen=True)
class _Weight:
    """The weight of one layer in training."""

    parameter: Tensor
    """a parameter of the model, or that part of a stack of experts which is one's own"""
    master: Tensor
    """what the optimizer sees: the same storage, or a float32 copy of 16-bit weights"""
    is_removed: Tensor
    """bool of the parameter's shape: exactly zero before the training, or removed in it"""
    is_turned: bool
    """whether the module holds it as [in, out]"""

    def turned(self, values: Tensor) -> Tensor:
        """A view [out, in] of values of the parameter's shape, or the other way round."""
        return values.T if self.is_turned else values

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

    weights: dict[str, _Weight]
    """by the names of the layers, in their order"""

    @property
    def masters(self) -> list[Tensor]:
        """What the optimizer changes; backward passes fill their gradients."""
        return [one.master for one in self.weights.values()]

    def write(self) -> None:
        """Let the model compute with the masters as they are now."""
        for one in self.weights.values():
            one.write()

    def measuring(self) -> AbstractContextManager[None]:
        """Within it the model computes what it will once training is done: what it does anyway."""
        return nullcontext()

    def merge(self) -> None:
        """Leave in the model's weights what was trained: it is there already."""

    @torch.no_grad()
    def moving(
        self, layer: str, optimizer: torch.optim.Optimizer, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The weight of a layer and what the coming step takes from it at a rate of 1, [out, in].

        Args:
            scale: of the gradients, before the optimizer sees them.
        """
        one = self.weights[layer]
        return one.turned(one.master), one.turned(coming_move(optimizer, one.master, scale))

    def frozen(self) -> dict[str, Tensor]:
        """What of the model changes and is no master: nothing."""
        return {}

    def layer_weights(self) -> dict[str, Tensor]:
        """The layers' own weights that are no masters: none."""
        return {}

    def load_frozen(self, tensors: Mapping[str, Tensor]) -> None:
        """Be as it was when `frozen` gave these."""

    @torch.no_grad()
    def shrink(self, masks: Mapping[str, Tensor], factor: float) -> None:
        """Multiply weights by a factor, whatever they are by now.

        Args:
            masks: bool [out, in] by the name of a layer, False = is multiplied.
        """
        for layer, mask in masks.items():
            one = self.weights[layer]
            one.turned(one.master).mul_(torch.where(mask, 1.0, factor))
            one.write()

    @torch.no_grad()
    def remove(self, masks: Mapping[str, Tensor]) -> None:
        """Take weights out of the model and of the training: zeros, which stay so.

        Args:
            masks: bool [out, in] by the name of a layer, True = stays.
        """
        for layer, mask in masks.items():
            one = self.weights[layer]
            one.turned(one.is_removed).logical_or_(~mask)
            one.write()


@contextmanager
def train_weights(model: nn.Module, layers: Sequence[Linear]) -> Iterator[Weights]:
    """Within it, backward passes add to the gradients of the layers' masters."""
    handles: list[Any] = []
    with removing(handles), own_weights(layers) as leaves:
        weights = {layer.name: _weight(layer, leaves[layer.name]) for layer in layers}
        for one in weights.values():
            one.parameter.requires_grad_(True)
            register: Any = one.parameter.register_post_accumulate_grad_hook
            handles.append(register(one.add_gradient))
        yield Weights(weights)


def _weight(layer: Linear, parameter: Any) -> _Weight:
    weight = parameter.detach()
    master = weight.float() if weight.dtype.itemsize < 4 else weight
    return _Weight(parameter, master, weight == 0, not isinstance(layer.module, nn.Linear))
