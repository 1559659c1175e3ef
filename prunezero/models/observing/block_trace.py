"""What does a block of a model remember for a backward pass, and which layers read the same inputs?

The block runs on tensors without numbers, so this takes no memory and no arithmetic, and may be
asked of a model whose weights are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prunezero.models.anatomy.linears import Linear, find_blocks, find_linears
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.gradients import asking_anew
from prunezero.models.observing.hooks import removing
from prunezero.models.observing.walk import first_block_call

# Where a block cannot be traced: of what its layers read and write, so much is remembered. The
# families of the tests remember 0.7 to 1.8.
USUAL_SHARE = 2.0


@dataclass(frozen=True)
class BlockTrace:
    """The first block at work on one sequence."""

    saved_bytes: int
    """of all that a backward pass will read beside the weights"""
    readers: tuple[tuple[str, ...], ...]
    """names of its layers, those that read the same inputs together"""


def trace_block(language_model: LanguageModel, length: int) -> BlockTrace:
    """The trace of the first block on one sequence; an upper estimate where it cannot be traced.

    Masks are counted even where a forward pass gets by without them: some bytes for each pair of
    tokens.

    Args:
        language_model: its weights may be outlines.
        length: tokens in the sequence.
    """
    layers = [one for one in find_linears(language_model.model) if one.block == 0]
    # Text decides which experts run.
    if not any("expert" in layer.name for layer in layers):
        # Whatever a block does that tensors without numbers cannot.
        with suppress(Exception):
            return _traced(language_model, layers, length)
    width = sum(sum(layer.weight.shape) for layer in layers)
    size = round(USUAL_SHARE * length * width * language_model.dtype.itemsize)
    return BlockTrace(size, tuple((layer.name,) for layer in layers))


def _traced(language_model: LanguageModel, layers: Sequence[Linear], length: int) -> BlockTrace:
    model = language_model.model
    block = find_blocks(model)[0]
    readers: dict[int, list[str]] = {}
    inputs: list[Tensor] = []
    with asking_anew(model), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        saved: dict[int, Any] = {}
        ids = torch.zeros((1, length), dtype=torch.long)
        state, (rest, named) = first_block_call(model.base_model, block, ids)
        learning = {id(layer.module.weight) for layer in layers}
        # Of full size also where the model's are outlines, and known again among what is saved.
        weights = {
            name: torch.empty(one.shape, dtype=one.dtype).requires_grad_(id(one) in learning)
            for name, one in block.named_parameters()
        }

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            # Held, so that no other storage gets its place.
            saved[id(storage)] = storage
            return tensor

        handles = [
            layer.module.register_forward_pre_hook(_noting(layer.name, readers, inputs))
            for layer in layers
        ]
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.enable_grad(), hooks, removing(handles):
            given = (state.detach().requires_grad_(True), *rest)
            torch.func.functional_call(block, weights, given, named)
        own = {id(weight.untyped_storage()) for weight in weights.values()}
        size = sum(storage.nbytes() for key, storage in saved.items() if key not in own)
    return BlockTrace(size, tuple(map(tuple, readers.values())))


def _noting(
    name: str, readers: dict[int, list[str]], inputs: list[Tensor]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])
        readers.setdefault(id(args[0]), []).append(name)

    return hook
