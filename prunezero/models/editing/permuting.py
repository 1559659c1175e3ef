"""Which layers' input channels may be put into another order, and how is that done for good?

The order of channels is free where only the rows that make them and the columns that read them see
it: move both, and the block computes the same. Which rows make a channel shows in gradients, taken
in a copy of the block with random weights; that a reordering changes nothing is proved by doing it,
on the copy and then in the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from prunezero.errors import ModelError
from prunezero.models.anatomy.block_probe import (
    BlockProbe,
    Trace,
    calls_of_blocks,
    logits_of,
    probe_block,
    probe_ids,
    probe_of,
    relative_change,
)
from prunezero.models.anatomy.linears import Linear
from prunezero.models.loading.language_model import LanguageModel

# Largest change, relative to the norm, that is rounding: sums in another order.
ROUNDING = 1e-4
# Coarser dtypes, where every later block rounds again; only the logits are compared in them.
ROUNDING_OF_LOGITS = {torch.float16: 2e-2, torch.bfloat16: 1e-1}

STREAM = (
    "no rows of its block make its channels one by one: they come from the residual stream, whose "
    "order all blocks share"
)
UNREACHED = "the probe did not reach its channels"
UNEVEN = "the rows that make its channels are laid out in a way that no order can follow"
CHANGED = "no other order of its channels was found to leave what the model computes as it is"


class Heads(NamedTuple):
    """How a consumer's channels stand in attention heads: [groups, queries, size]."""

    groups: int
    """key-value heads"""
    queries: int
    """query heads that read each of them"""
    size: int
    """channels of one head"""


@dataclass(frozen=True)
class PermutableChannels:
    """A layer whose input channels may be put into another order, and the layers that make them."""

    consumer: Linear
    """its columns read the channels"""
    producers: tuple[tuple[Linear, int], ...]
    """each with the row at which the channels start in it; a fused layer may stand here twice"""
    heads: Heads | None
    """None: any order of all channels; else any order within a head, the same for all query heads
    of one key-value head"""
    mixes_tokens: bool = False
    """whether a channel of one token depends on what the producers make of another"""

    @property
    def channels(self) -> int:
        """How many channels the consumer reads."""
        return self.consumer.weight.shape[1]

    @property
    def produced(self) -> int:
        """How many rows of a producer make them: fewer where query heads share."""
        return self.channels // (self.heads.queries if self.heads else 1)


def permute_channels(permutable: PermutableChannels, order: Tensor) -> None:
    """Put the channels into another order, in place: no number changes, and undoing is exact.

    Args:
        permutable: its consumer's columns and its producers' rows and biases are moved.
        order: int64 [in of the consumer], the old index of each new channel.

    Raises:
        ModelError: see `producer_order`.
    """
    rows = producer_order(permutable, order)
    weight = permutable.consumer.weight
    weight.copy_(weight.index_select(1, order.to(weight.device)))
    for layer, start in permutable.producers:
        for part in filter(torch.is_tensor, (layer.weight, layer.bias)):
            made = part[start : start + permutable.produced]
            made.copy_(made.index_select(0, rows.to(made.device)))


def producer_order(permutable: PermutableChannels, order: Tensor) -> Tensor:
    """The order of the rows that make the channels, int64 [produced], from the channels' order.

    Raises:
        ModelError: it is no order of the channels, or one that the heads do not allow.
    """
    name, count = permutable.consumer.name, permutable.channels
    if not torch.equal(order.sort().values, torch.arange(count, device=order.device)):
        raise ModelError(
            f"the order of the inputs of '{name}' must hold each of 0 to {count - 1} once"
        )
    if permutable.heads is None:
        return order
    groups, _, size = permutable.heads
    within = order.view(permutable.heads)[:, 0] % size
    rows = (within + size * torch.arange(groups, device=order.device)[:, None]).flatten()
    if not torch.equal(consumer_order(permutable, rows), order):
        raise ModelError(
            f"the order of the inputs of '{name}' must stay within heads of {size} channels, and "
            "be the same for all query heads of one key-value head"
        )
    return rows


def consumer_order(permutable: PermutableChannels, rows: Tensor) -> Tensor:
    """The order of the channels, int64 [in], from that of the rows that make them."""
    if permutable.heads is None:
        return rows
    groups, queries, size = permutable.heads
    within = (rows % size).view(groups, 1, size).expand(permutable.heads)
    heads = torch.arange(groups * queries, device=rows.device).view(groups, queries, 1)
    return (within + size * heads).flatten()


def find_permutables(
    language_model: LanguageModel, layers: Sequence[Linear]
) -> list[PermutableChannels]:
    """The permutable channels whose consumer is one of the layers, proved by a probe.

    The model runs once for the block and once for each of them, on a few tokens; its weights are
    the same afterwards.

    Args:
        layers: of one block; producers are found among all layers of it.

    Raises:
        ModelError: the blocks do not hand on hidden states.
    """
    return [
        found
        for found in _examined(language_model, layers)
        if isinstance(found, PermutableChannels)
    ]


def refusals(language_model: LanguageModel, layers: Sequence[Linear]) -> dict[str, str]:
    """Why the input channels of the others among the layers must stay, by layer name."""
    found = zip(layers, _examined(language_model, layers), strict=True)
    return {layer.name: reason for layer, reason in found if isinstance(reason, str)}


def find_all_permutables(
    language_model: LanguageModel, blocks: Mapping[int, Sequence[Linear]]
) -> dict[int, list[PermutableChannels]]:
    """`find_permutables` for several blocks, of which all are moved together to prove them.

    Args:
        blocks: layers by the index of their block.

    Raises:
        ModelError: as `find_permutables`.
    """
    generator = torch.Generator().manual_seed(0)
    ids = probe_ids(language_model, generator)
    calls, logits = calls_of_blocks(language_model, ids, list(blocks))
    found: dict[int, list[PermutableChannels]] = {}
    for index, layers in blocks.items():
        probe = probe_of(language_model, index, calls[index])
        seen = [_permutable_of_copy(probe, layer.name, generator) for layer in layers]
        found[index] = [
            _with_layers(one, probe.originals)
            for one in seen
            if isinstance(one, PermutableChannels)
        ]
    with ExitStack() as moves:
        for permutable in itertools.chain(*found.values()):
            moves.enter_context(_moved(permutable, _random_order(permutable, generator)))
        moved = logits_of(language_model, ids)
    if relative_change(moved, logits) <= _rounding(language_model):
        return found
    # One of them is none; each by itself says which.
    return {index: find_permutables(language_model, layers) for index, layers in blocks.items()}


def _rounding(language_model: LanguageModel) -> float:
    return ROUNDING_OF_LOGITS.get(language_model.dtype, ROUNDING)


def _examined(
    language_model: LanguageModel, layers: Sequence[Linear]
) -> list[PermutableChannels | str]:
    """For each layer its permutable channels, or why there are none."""
    if not layers:
        return []
    generator = torch.Generator().manual_seed(0)
    ids = probe_ids(language_model, generator)
    probe, logits = probe_block(language_model, layers[0].block, ids)
    examined: list[PermutableChannels | str] = []
    for layer in layers:
        found = _permutable_of_copy(probe, layer.name, generator)
        if isinstance(found, PermutableChannels):
            found = _with_layers(found, probe.originals)
            with _moved(found, _random_order(found, generator)):
                moved = logits_of(language_model, ids)
            found = (
                found if relative_change(moved, logits) <= _rounding(language_model) else CHANGED
            )
        examined.append(found)
    return examined


def _permutable_of_copy(
    probe: BlockProbe, name: str, generator: torch.Generator
) -> PermutableChannels | str:
    """Those of the copied block whose consumer has this name, or why there are none."""
    # Anew for each consumer: gradients outlive no move of weights.
    trace = probe.run()
    if name not in trace.inputs:
        return UNREACHED
    channels = trace.inputs[name].shape[-1]
    # What a channel that is zero for every token comes from does not show in gradients.
    alive = trace.inputs[name].detach().reshape(-1, channels).any(0).nonzero()[:2].flatten()
    if len(alive) < 2:
        return UNREACHED
    starts = _starts(trace, name, *alive.tolist())
    if not starts:
        return STREAM
    produced = _shared_height(starts, probe.layers, channels)
    if produced is None:
        return UNEVEN
    producers = tuple((probe.layers[other], start) for other, start in starts)
    for heads in _layouts(channels, produced):
        permutable = PermutableChannels(probe.layers[name], producers, heads)
        if _is_free(permutable, probe, trace, generator):
            # Anew, since weights were moved.
            return replace(permutable, mixes_tokens=_mixes_tokens(permutable, probe.run()))
    return CHANGED


def _mixes_tokens(permutable: PermutableChannels, trace: Trace) -> bool:
    """Whether late tokens of the consumer's inputs depend on early tokens of its producers."""
    inputs = trace.inputs[permutable.consumer.name]
    outputs = [trace.outputs[layer.name] for layer, _ in permutable.producers]
    half = inputs.shape[-2] // 2
    gradients = torch.autograd.grad(
        inputs[..., half:, :].sum(), outputs, allow_unused=True, materialize_grads=True
    )
    return any(bool(gradient[..., :half, :].any()) for gradient in gradients)


def _starts(trace: Trace, name: str, first: int, second: int) -> list[tuple[str, int]]:
    """Where the rows that make the channels begin: (layer, row), in the order of the block.

    A row that makes one channel alone reaches the first of two and not the second; queries and
    keys reach both, as does whatever lies before a norm.
    """
    outputs = {other: value for other, value in trace.outputs.items() if other != name}
    one, other = (_reaching(trace.inputs[name], channel, outputs) for channel in (first, second))
    rows = {layer: (one[layer] & ~other[layer]).nonzero().flatten() for layer in outputs}
    return [(layer, row - first) for layer, found in rows.items() for row in found.tolist()]


def _reaching(inputs: Tensor, channel: int, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which rows of each layer an input channel depends on, bool [rows] by layer name."""
    gradients = torch.autograd.grad(
        inputs[..., channel].sum(),
        list(outputs.values()),
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    found = zip(outputs, gradients, strict=True)
    return {name: value.reshape(-1, value.shape[-1]).any(0) for name, value in found}


def _shared_height(
    starts: list[tuple[str, int]], layers: dict[str, Linear], channels: int
) -> int | None:
    """How many rows make the channels in every producer; None where that differs or cannot be."""
    heights = set()
    for name in dict(starts):
        edges = sorted(row for other, row in starts if other == name)
        edges.append(layers[name].weight.shape[0])
        heights |= {min(after - before, channels) for before, after in pairwise(edges)}
    height = heights.pop()
    is_possible = not heights and min(row for _, row in starts) >= 0 and channels % height == 0
    return height if is_possible else None


def _layouts(channels: int, produced: int) -> Iterator[Heads | None]:
    """Ways in which the channels may stand in heads, the freest first."""
    if channels == produced:
        yield None
    for groups in range(1, produced // 2 + 1):
        if produced % groups == 0 and (groups > 1 or channels > produced):
            yield Heads(groups, channels // produced, produced // groups)


def _is_free(
    permutable: PermutableChannels, probe: BlockProbe, trace: Trace, generator: torch.Generator
) -> bool:
    """Whether a random order of the channels changes nothing behind them in the copied block."""
    with _moved(permutable, _random_order(permutable, generator)):
        moved = probe.run()
    makers = {layer.name for layer, _ in permutable.producers}
    pairs = [
        (moved.outputs[other], value)
        for other, value in trace.outputs.items()
        if other not in makers
    ]
    pairs += zip(moved.returned, trace.returned, strict=True)
    return all(relative_change(now, before) <= ROUNDING for now, before in pairs)


@contextmanager
def _moved(permutable: PermutableChannels, order: Tensor) -> Iterator[None]:
    """Permute, and undo it at the end."""
    permute_channels(permutable, order)
    try:
        yield
    finally:
        permute_channels(permutable, order.argsort())


def _random_order(permutable: PermutableChannels, generator: torch.Generator) -> Tensor:
    groups = permutable.heads.groups if permutable.heads else 1
    size = permutable.produced // groups
    rows = [torch.randperm(size, generator=generator) + size * group for group in range(groups)]
    return consumer_order(permutable, torch.cat(rows))


def _with_layers(permutable: PermutableChannels, layers: dict[str, Linear]) -> PermutableChannels:
    """The same permutable channels of other layers, found by name."""
    producers = tuple((layers[layer.name], start) for layer, start in permutable.producers)
    return replace(permutable, consumer=layers[permutable.consumer.name], producers=producers)
