"""How is a model pruned when the papers are written down in torch as they stand?

One block after the other: hooks collect what each of its linear layers sees, each layer is pruned
by itself, and a second forward pass gives the next block its inputs. This is the way, and the
amount of work, of the code that came with Wanda (arXiv:2306.11695), RIA (Zhang et al., ICLR 2024)
and SparseGPT (arXiv:2301.00774): sums for every layer even where layers share their inputs, a
stable sort of all scores, a loop over the groups of an N:M pattern, and for SparseGPT a loop over
columns. For models whose blocks are called with the same keyword arguments, as Llama's are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sparsegpt import one_column_at_a_time
from torch import Tensor, nn

from prunezero.models.anatomy.linears import find_blocks

# N and M of a pattern that keeps N of every M columns; None where the sparsity alone counts.
Pattern = tuple[int, int] | None


def prune_block_by_block(
    model: Any, windows: Tensor, method: str, sparsity: float, pattern: Pattern
) -> None:
    """Prune every linear layer inside the blocks of a Llama-like model, in place.

    Args:
        windows: calibration token ids `[count, length]`.
        method: a key of `METHODS`.
        sparsity: fraction of each row (SparseGPT: of 128 columns) that goes; a pattern fixes it.
    """
    collector, mend = METHODS[method]
    with torch.no_grad():
        states, named = first_inputs(model, windows)
        outputs = torch.zeros_like(states)
        for block in find_blocks(model):
            linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
            collected = {linear: collector(linear) for linear in linears}
            handles = [
                linear.register_forward_hook(partial(_collect, collected[linear]))
                for linear in linears
            ]
            _run(block, states, outputs, named)
            for handle in handles:
                handle.remove()
            for linear in linears:
                mend(linear, collected[linear].mean, sparsity, pattern)
            _run(block, states, outputs, named)
            states, outputs = outputs, states


class _FirstBlockError(Exception):
    """Raised on purpose when the first block is reached."""


def first_inputs(model: Any, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Hidden states `[count, length, hidden]` in front of the first block, and its other arguments.

    The arguments are those of the last window: they say nothing about its text.
    """
    states: list[Tensor] = []
    named: dict[str, Any] = {}

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0])
        named.update(kwargs)
        raise _FirstBlockError

    handle = find_blocks(model)[0].register_forward_pre_hook(before, with_kwargs=True)
    for ids in windows:
        try:
            model(ids[None], use_cache=False)
        except _FirstBlockError:
            continue
    handle.remove()
    return torch.cat(states), named


def _run(block: nn.Module, states: Tensor, outputs: Tensor, named: dict[str, Any]) -> None:
    for place in range(len(states)):
        output = block(states[place : place + 1], **named)
        outputs[place] = (output[0] if isinstance(output, tuple) else output)[0]


def _collect(
    collected: Squares | Gram, module: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    collected.add(args[0].reshape(-1, args[0].shape[-1]).T)


class Squares:
    """The sum of squares of every input channel, as a running mean over sequences: float32."""

    def __init__(self, linear: nn.Linear) -> None:
        self.mean = torch.zeros(linear.in_features)
        self.sequences = 0

    def add(self, inputs: Tensor) -> None:
        """Add one sequence, `[in, tokens]`."""
        self.mean *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        self.mean += torch.norm(inputs.float(), p=2, dim=1) ** 2 / self.sequences


class Gram:
    """Twice the inputs' products with each other, as a running mean over sequences: float32."""

    def __init__(self, linear: nn.Linear) -> None:
        self.mean = torch.zeros(linear.in_features, linear.in_features)
        self.sequences = 0

    def add(self, inputs: Tensor) -> None:
        """Add one sequence, `[in, tokens]`."""
        self.mean *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        scaled = (2 / self.sequences) ** 0.5 * inputs.float()
        self.mean += scaled @ scaled.T


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """Magnitude times the norm of the input channel."""
    return weight.abs() * squares.reshape(1, -1).sqrt()


def ria_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """Shares of column and row in magnitude, times the root of the norm of the input channel."""
    magnitude = weight.abs()
    shares = magnitude / magnitude.sum(dim=0) + magnitude / magnitude.sum(dim=1).reshape(-1, 1)
    return shares * squares.sqrt().reshape(1, -1) ** 0.5


def removed(scores: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Which weights go: the lowest of every row, or of every group of M columns."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if pattern is None:
        order = torch.sort(scores, dim=-1, stable=True).indices
        return mask.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], True)
    keep, of = pattern
    for start in range(0, scores.shape[1], of):
        group = scores[:, start : start + of]
        lowest = torch.topk(group, of - keep, dim=1, largest=False).indices
        mask.scatter_(1, start + lowest, True)
    return mask


# Told a layer, what was collected of its inputs, the sparsity and the pattern: prunes it in place.
Mend = Callable[[nn.Linear, Tensor, float, Pattern], None]


def _zero_lowest(scores_of: Callable[[Tensor, Tensor], Tensor]) -> Mend:
    def mend(linear: nn.Linear, squares: Tensor, sparsity: float, pattern: Pattern) -> None:
        scores = scores_of(linear.weight.float(), squares)
        linear.weight[removed(scores, sparsity, pattern)] = 0.0

    return mend


def _column_by_column(linear: nn.Linear, gram: Tensor, sparsity: float, pattern: Pattern) -> None:
    weight = one_column_at_a_time(linear.weight.float(), gram, pattern, sparsity)
    linear.weight.copy_(weight)


# What is collected of a layer's inputs, and how the layer is pruned with it.
METHODS: dict[str, tuple[Callable[[nn.Linear], Squares | Gram], Mend]] = {
    "wanda": (Squares, _zero_lowest(wanda_scores)),
    "ria": (Squares, _zero_lowest(ria_scores)),
    "sparsegpt": (Gram, _column_by_column),
}
