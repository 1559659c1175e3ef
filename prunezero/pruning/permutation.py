"""In which order of its input channels does a layer keep the most under an N:M pattern?

A pattern keeps N of every M neighbours, so it loses least where each group of M columns holds
strong and weak ones. The heuristic deals the columns out by importance; the assignment then gives
the columns of one place, in all groups at once, to the groups where they add the most. Both from
Zhang et al. 2024 (ICLR), "Plug-and-Play: An Efficient Post-training Pruning Method for LLMs".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prunezero.errors import SelectionError, did_you_mean
from prunezero.models.anatomy.linears import Linear
from prunezero.models.editing.permuting import (
    PermutableChannels,
    consumer_order,
    permute_channels,
    producer_order,
)
from prunezero.pruning.recipes.choices import Choice
from prunezero.pruning.recipes.words import WORDS
from prunezero.scoring.request import Pattern
from prunezero.scoring.selection import refuse_non_finite

# Rows whose scores are ranked at once, so that copies of a large matrix stay small.
ROWS_AT_ONCE = 512


class Orders(NamedTuple):
    """How a layer's channels were moved: the old index of each new channel, None as before."""

    inputs: Tensor | None
    outputs: Tensor | None


def retained_score(scores: Tensor, pattern: Pattern, order: Tensor | None = None) -> float:
    """The sum of the scores that an N:M mask keeps, in float64.

    Args:
        scores: [out, in]; the highest N of every M columns stay.
        order: int64 [in], the old index of each new column; None as they stand.

    Raises:
        SelectionError: M does not divide the columns.
    """
    _refuse_remainder(scores.shape[1], pattern)
    total = 0.0
    for rows in torch.split(scores, ROWS_AT_ONCE):
        placed = rows if order is None else rows[:, order.to(rows.device)]
        groups = placed.double().reshape(-1, pattern.of)
        total += float(groups.topk(pattern.keep, dim=1).values.sum())
    return total


def channel_order(
    scores: Tensor, pattern: Pattern, method: str, *, segment: int | None = None
) -> Tensor:
    """The order of the columns that keeps the most: int64 [in], the old index of each new one.

    The retained score is never below that of the columns as they stand; where nothing raises it,
    that is the order returned.

    Args:
        scores: [out, in], any finite numbers.
        pattern: its groups are M consecutive columns.
        method: a word of a recipe's `permute`.
        segment: columns stay within consecutive segments of this many; None: they move freely.

    Raises:
        SelectionError: M does not divide the segment, or the method is not known.
        ScoreError: a score is NaN or infinite.
    """
    width = segment or scores.shape[1]
    _refuse_remainder(width, pattern)
    known = WORDS["permute"]
    if method not in known:
        raise SelectionError(
            f"'{method}' is not a permutation{did_you_mean(method, known)}; "
            f"known: {', '.join(known)}"
        )
    refuse_non_finite(scores)
    parts = torch.split(scores, width, dim=1)
    order_of = known[method].function
    orders = [order_of(part, pattern) + width * at for at, part in enumerate(parts)]
    return torch.cat(orders)


def permute_block(
    permutables: Sequence[PermutableChannels],
    score_of: Callable[[Linear], Tensor],
    pattern: Pattern,
    choice: Choice,
) -> dict[str, Orders]:
    """Choose an order for the permutable channels of a block, and permute the model by it.

    Query heads that read one key-value head share its order: their scores count as more rows.

    Args:
        permutables: of one block; their layers are modified.
        score_of: the scores [out, in] of a consumer; all are taken before the first move.
        pattern: what the masks will be.
        choice: the recipe's, of `permute`.

    Returns:
        By layer name, for consumers and producers whose channels have moved.

    Raises:
        SelectionError: M does not divide the channels, or the head where they may not leave it.
        ScoreError: a score is NaN or infinite.
    """
    chosen = [
        _permutable_order(each, score_of(each.consumer), pattern, choice) for each in permutables
    ]
    moved: dict[str, Orders] = {}
    for permutable, order in zip(permutables, chosen, strict=True):
        if not torch.equal(order, order.sort().values):
            _note(moved, permutable, order)
            permute_channels(permutable, order)
    return moved


def _permutable_order(
    permutable: PermutableChannels, scores: Tensor, pattern: Pattern, choice: Choice
) -> Tensor:
    """The order of the channels, int64 [in]."""
    if permutable.heads is None:
        return channel_order(scores, pattern, choice.word)
    size = permutable.heads.size
    if size % pattern.of:
        raise SelectionError(
            f"'{permutable.consumer.name}' can be permuted within heads of {size} channels only, "
            f"which pattern {pattern} does not divide; name the other layers under permute"
        )
    stacked = scores.view(-1, *permutable.heads).transpose(1, 2).reshape(-1, permutable.produced)
    return consumer_order(permutable, channel_order(stacked, pattern, choice.word, segment=size))


def _note(moved: dict[str, Orders], permutable: PermutableChannels, order: Tensor) -> None:
    """Add the moves of some channels; a layer may make those of one group and read another's."""
    name = permutable.consumer.name
    moved[name] = moved.get(name, Orders(None, None))._replace(inputs=order)
    rows = producer_order(permutable, order)
    for layer, start in permutable.producers:
        known = moved.get(layer.name, Orders(None, None))
        outputs = known.outputs
        if outputs is None:
            outputs = torch.arange(layer.weight.shape[0], device=order.device)
        outputs[start : start + len(rows)] = rows + start
        moved[layer.name] = known._replace(outputs=outputs)


def stay(scores: Tensor, pattern: Pattern) -> Tensor:
    """The columns as they stand."""
    return torch.arange(scores.shape[1], device=scores.device)


def deal_out(scores: Tensor, pattern: Pattern) -> Tensor:
    """Sort columns by their sums, cut into M runs, and give every group one of each run.

    Every second run goes backwards, so that no group gets the weaker end of all runs.
    """
    places = scores.sum(0, dtype=torch.float64).argsort(stable=True).view(pattern.of, -1)
    places[1::2] = places[1::2].flip(1)
    return _better(scores, pattern, places.T.flatten(), stay(scores, pattern))


def assign(scores: Tensor, pattern: Pattern) -> Tensor:
    """Improve the dealt-out order place by place: the best assignment of columns to groups."""
    from scipy.optimize import linear_sum_assignment

    order = deal_out(scores, pattern)
    for place in range(pattern.of):
        gains = _gains(scores, pattern, order, place).cpu().numpy()
        # One column for each group, in the order of the groups.
        _, columns = linear_sum_assignment(gains.T, maximize=True)
        trial = order.clone()
        trial[place :: pattern.of] = order[place :: pattern.of][torch.from_numpy(columns)]
        order = _better(scores, pattern, trial, order)
    return order


def _gains(scores: Tensor, pattern: Pattern, order: Tensor, place: int) -> Tensor:
    """What each group gains by each column of one place: [groups of the columns, groups].

    Beside the other M - 1 scores of a row, a column of score c adds max(0, c - t), where t is the
    N-th highest of them: it replaces t or is removed. Summed over rows that is half of
    sum(c) - sum(t) + the L1 distance of c and t, so no [rows, groups, groups] is ever held.
    What the others keep by themselves is the same for every column, so it decides nothing.
    """
    columns, thresholds = [], []
    for rows in torch.split(scores, ROWS_AT_ONCE):
        groups = rows[:, order].double().view(len(rows), -1, pattern.of)
        others = torch.cat([groups[..., :place], groups[..., place + 1 :]], dim=-1)
        columns.append(groups[..., place])
        thresholds.append(others.topk(pattern.keep, dim=-1).values[..., -1])
    column, threshold = torch.cat(columns).T.contiguous(), torch.cat(thresholds).T.contiguous()
    sums = column.sum(1)[:, None] - threshold.sum(1)
    return (sums + torch.cdist(column, threshold, p=1)) / 2


def _better(scores: Tensor, pattern: Pattern, trial: Tensor, known: Tensor) -> Tensor:
    gained = retained_score(scores, pattern, trial) > retained_score(scores, pattern, known)
    return trial if gained else known


def _refuse_remainder(columns: int, pattern: Pattern) -> None:
    if columns % pattern.of:
        raise SelectionError(
            f"pattern {pattern} needs a multiple of {pattern.of} columns but got {columns}; "
            f"choose an M that divides {columns}"
        )
