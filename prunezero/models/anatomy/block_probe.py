"""What does one block compute, whatever its weights are?

A copy of the block shows it, whose layers have random weights and whose hidden states are random:
in a trained or pruned block a dead channel or a strong bias may hide what depends on what. Float32,
so that a change stands out from rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.expert_linears import linear_at
from prunezero.models.anatomy.linears import Linear, block_prefix, find_blocks, find_linears
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.expert_calls import calling_experts
from prunezero.models.observing.hooks import removing
from prunezero.models.observing.walk import hidden_of, split_call

# Tokens of the text that models are probed with.
PROBE_TOKENS = 12


@dataclass(frozen=True)
class Trace:
    """What went through the layers of a block, by layer name, and what the block returned.

    A layer that did not run is missing.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    returned: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class BlockProbe:
    """A float32 copy of one block with random layers, and arguments to call it with."""

    block: nn.Module
    """the copy"""
    layers: dict[str, Linear]
    """those of the copy, under their names in the model"""
    originals: dict[str, Linear]
    """those of the model"""
    state: Tensor
    """random hidden states in front of the block"""
    rest: tuple[Any, ...]
    """other arguments"""
    named: dict[str, Any]
    """arguments by keyword"""

    def run(self) -> Trace:
        """Call the copy; the trace holds the graph of its gradients."""
        trace = Trace()
        handles = [
            layer.module.register_forward_hook(_noting(trace, name))
            for name, layer in self.layers.items()
        ]
        with torch.enable_grad(), removing(handles), calling_experts(self.layers.values()):
            # A fresh leaf that asks for gradients, since weights do not.
            state = self.state.clone().requires_grad_()
            trace.returned.append(hidden_of(self.block(state, *self.rest, **self.named)))
        return trace


# Arguments of a block: hidden states, others by position, others by keyword.
Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]


def probe_block(
    language_model: LanguageModel, index: int, ids: Tensor
) -> tuple[BlockProbe, Tensor]:
    """The probe of block `index`, and the logits of the whole model as it is.

    Args:
        ids: token ids [1, length].

    Raises:
        ModelError: the model does not hand hidden states to its blocks.
    """
    calls, logits = calls_of_blocks(language_model, ids, [index])
    return probe_of(language_model, index, calls[index]), logits


def calls_of_blocks(
    language_model: LanguageModel, ids: Tensor, indices: Sequence[int]
) -> tuple[dict[int, Call], Tensor]:
    """How the model first calls some of its blocks, in float32, and its logits.

    Args:
        ids: token ids [1, length].

    Raises:
        ModelError: the model does not run a block, or hands no hidden states to it.
    """
    blocks = find_blocks(language_model.model)
    calls: dict[int, Call] = {}

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index not in calls:
                calls[index] = _in_float32(split_call(args, kwargs))

        return hook

    handles = [
        blocks[index].register_forward_pre_hook(before(index), with_kwargs=True)
        for index in indices
    ]
    with removing(handles):
        logits = logits_of(language_model, ids)
    for index in indices:
        if index not in calls:
            raise ModelError(
                f"the model did not run its block {index}; this layout is not supported"
            )
    return calls, logits


def probe_of(language_model: LanguageModel, index: int, call: Call) -> BlockProbe:
    """The probe of block `index`, from how the model calls it."""
    block = find_blocks(language_model.model)[index]
    state, rest, named = call
    generator = torch.Generator(state.device).manual_seed(0)
    twin = copy.deepcopy(block).float()
    prefix = f"{block_prefix(language_model.model)}.{index}."
    originals = {
        layer.name: layer for layer in find_linears(language_model.model) if layer.block == index
    }
    layers = {
        name: replace(layer, module=linear_at(twin, name.removeprefix(prefix)))
        for name, layer in originals.items()
    }
    for layer in layers.values():
        _randomize(layer, generator)
    return BlockProbe(twin, layers, originals, state.normal_(generator=generator), rest, named)


def probe_ids(language_model: LanguageModel, generator: torch.Generator) -> Tensor:
    """Random token ids [1, PROBE_TOKENS]."""
    vocabulary = language_model.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator)
    return ids.to(language_model.device)


def relative_change(now: Tensor, before: Tensor) -> float:
    """The norm of the difference relative to the norm before; zero where nothing changed."""
    difference = float(torch.linalg.vector_norm((now - before).detach(), dtype=torch.float64))
    scale = float(torch.linalg.vector_norm(before.detach(), dtype=torch.float64))
    if scale == 0:
        return math.inf if difference else 0.0
    return difference / scale


def _randomize(layer: Linear, generator: torch.Generator) -> None:
    """Weights and biases that keep the size of their inputs."""
    layer.weight.normal_(std=layer.weight.shape[1] ** -0.5, generator=generator)
    if layer.bias is not None:
        layer.bias.normal_(std=0.5, generator=generator)


def logits_of(language_model: LanguageModel, ids: Tensor) -> Tensor:
    """The logits [1, length, vocabulary] of token ids [1, length]."""
    with torch.no_grad():
        logits = language_model.model(ids, use_cache=False).logits
    assert isinstance(logits, Tensor)  # for the type checker
    return logits


def _in_float32(value: Any) -> Any:
    """Captured arguments, with copies of the floating tensors in them."""
    if isinstance(value, Tensor):
        return value.detach().to(torch.float32, copy=True) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        parts = [_in_float32(part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        return {key: _in_float32(part) for key, part in value.items()}
    return value


def _noting(trace: Trace, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        trace.inputs[name], trace.outputs[name] = args[0], output

    return hook
