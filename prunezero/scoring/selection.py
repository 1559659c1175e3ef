"""Which weights stay: scores in, a mask out, exact in its count and in its ties.

Every weight competes inside one comparison group (`GROUPS`), and every group loses the same
fraction, rounded down to whole weights. Equal scores go by position, the lower index first, as in a
stable sort. That rule decides real masks: ranked by magnitude, nine of ten rows of bfloat16 weights
hold a tie at their threshold. On the CPU numpy's partition finds the threshold in a small fraction
of a sort's time; on CUDA a stable sort is the reference for the fused kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from prunezero.errors import ScoreError, SelectionError
from prunezero.scoring.request import Pattern, check_request, group_columns, removed_count
from prunezero.scoring.tiles import row_tiles

# Wider groups are quicker to cut at a threshold than to rank by pairs.
WIDEST_PAIRWISE_PATTERN = 16


def select(
    scores: torch.Tensor, sparsity: float, *, compare: str = "row", pattern: str = "free"
) -> torch.Tensor:
    """The mask of one matrix, bool [out, in] on the scores' device: True = keep.

    Args:
        scores: [out, in], the lowest go; compared in float32.
        sparsity: fraction of each group to remove, at least 0 and below 1, rounded down.
        compare: which weights compete, a word of `GROUPS` other than model. With an N:M pattern it
            is checked but has no effect, because the pattern fixes the groups itself.
        pattern: free, or N:M to keep N of every M consecutive columns.

    Ties go to the lower index (in a group of many rows: row-major), -0.0 equals 0.0, and the last
    block of N columns may be narrower.

    Raises:
        SelectionError: the request cannot be satisfied, see `check_request`.
        ScoreError: a score is NaN or infinite.
    """
    parsed = check_request(scores.shape[1], sparsity, compare=compare, pattern=pattern)
    if compare == "model" and parsed is None:
        raise SelectionError("group model compares all matrices at once; use select_model")
    scores = scores.detach().float()
    refuse_non_finite(scores)
    if parsed is not None:
        return ~_lowest_of_pattern(scores, parsed)
    if compare == "row":
        return ~_lowest_of_rows(scores, removed_count(scores.shape[1], sparsity))
    blocks = torch.split(scores, group_columns(compare) or scores.shape[1], dim=1)
    return ~torch.cat([_lowest_of_block(block, sparsity) for block in blocks], dim=1)


def select_pattern(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """`select` for an N:M pattern that is known to fit, without its checks of the request.

    Raises:
        ScoreError: a score is NaN or infinite.
    """
    refuse_non_finite(scores)
    return ~_lowest_of_pattern(scores, pattern)


def select_model(scores: Sequence[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
    """The masks of all matrices whose weights compete together, each bool [out, in]: True = keep.

    Ties go to the earlier matrix, then to the lower row-major index. Matrices may lie on different
    devices; on the CPU one copy of all scores is made.

    Raises:
        SelectionError: `sparsity` is not at least 0 and below 1.
        ScoreError: a score is NaN or infinite.
    """
    floats = [matrix.detach().float() for matrix in scores]
    for matrix in floats:
        refuse_non_finite(matrix)
    count = removed_count(sum(matrix.numel() for matrix in floats), sparsity)
    if count == 0:
        return [torch.ones_like(matrix, dtype=torch.bool) for matrix in floats]
    threshold = _threshold_of_all(floats, count)
    missing = count - sum(int((matrix < threshold).sum()) for matrix in floats)
    masks = []
    for matrix in floats:
        equal = matrix == threshold
        if int(equal.sum()) > missing:
            equal &= (equal.flatten().cumsum(0) <= missing).view(equal.shape)
        missing -= int(equal.sum())
        masks.append(~((matrix < threshold) | equal))
    return masks


def lowest_first(scores: torch.Tensor, strata: int = 1) -> torch.Tensor:
    """Places of scores [units] in the order in which they go; ties go to the lower index.

    Args:
        strata: equal parts in which neighbours stand; each loses its lowest before any loses more.
    """
    # Adding zero makes -0.0 equal 0.0.
    parts = (scores + 0.0).reshape(strata, -1)
    firsts = torch.arange(strata, device=scores.device)[:, None] * parts.shape[1]
    return (torch.sort(parts, dim=1, stable=True).indices + firsts).T.reshape(-1)


def refuse_non_finite(scores: torch.Tensor) -> None:
    """Raise ScoreError, with counts, when a score is NaN or infinite; no mask may come of those."""
    if scores.numel() == 0:
        raise ScoreError(f"scores of shape {tuple(scores.shape)} hold no weight to choose from")
    # A sum is quicker than a look at every score; one of large scores may be infinite by itself.
    if math.isfinite(float(scores.sum())) or bool(torch.isfinite(scores).all()):
        return
    nan, infinite = int(torch.isnan(scores).sum()), int(torch.isinf(scores).sum())
    raise ScoreError(
        f"{nan} of {scores.numel()} scores are NaN and {infinite} are infinite; no mask is made "
        "from such scores, so change the criterion or mend what it reads"
    )


def _lowest_of_block(block: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True for the lowest scores of a whole block [out, N], ties in row-major order."""
    flat = block.reshape(1, -1)
    return _lowest_of_rows(flat, removed_count(flat.shape[1], sparsity)).view(block.shape)


def _lowest_of_rows(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True for the `count` lowest scores of every row [rows, columns]."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    if scores.device.type == "cpu":
        return _by_tiles(scores, lambda rows: _lowest_by_partition(rows, count))
    return _lowest_by_stable_sort(scores, count)


def _by_tiles(
    scores: torch.Tensor, lowest: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
) -> torch.Tensor:
    """What `lowest` says of the scores [rows, columns], bool of their shape."""
    values, removed = scores.numpy(), np.empty(tuple(scores.shape), dtype=bool)
    for tile in row_tiles(*values.shape):
        removed[tile] = lowest(values[tile])
    return torch.from_numpy(removed)


def _lowest_by_stable_sort(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The rule by its definition: the first `count` of a stable ascending sort of each row."""
    # Adding zero makes -0.0 equal 0.0 for radix sorts, which order by the bits.
    order = torch.sort(scores + 0.0, dim=1, stable=True).indices[:, :count]
    removed = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return removed.scatter_(1, order, True)


def _lowest_by_partition(values: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """The same without a sort: a threshold by partition, then the tie rule where a row has ties."""
    threshold = np.partition(values, count - 1, axis=1)[:, count - 1 : count]
    removed: np.ndarray[Any, Any] = np.ascontiguousarray(values <= threshold)
    tied = np.flatnonzero(np.count_nonzero(removed, axis=1) > count)
    if tied.size:
        rows, level = values[tied], threshold[tied]
        below, equal = rows < level, rows == level
        missing = count - np.count_nonzero(below, axis=1, keepdims=True)
        removed[tied] = below | (equal & (np.cumsum(equal, axis=1, dtype=np.int64) <= missing))
    return removed


def _lowest_of_pattern(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """True for the lowest M - N scores of every M consecutive columns."""
    count = pattern.of - pattern.keep
    if pattern.of > WIDEST_PAIRWISE_PATTERN:
        return _lowest_of_rows(scores.reshape(-1, pattern.of), count).view(scores.shape)
    if scores.device.type == "cpu":
        return _by_tiles(scores, lambda rows: _lowest_by_pairs(rows, pattern.of, count))
    places = scores.reshape(-1, pattern.of).T.contiguous()
    ranks = torch.zeros(places.shape, dtype=torch.uint8, device=scores.device)
    for later in range(1, pattern.of):
        earlier_first = places[:later] <= places[later]
        ranks[later] = earlier_first.sum(0, dtype=torch.uint8)
        ranks[:later] += ~earlier_first
    return (ranks < count).T.reshape(scores.shape)


def _lowest_by_pairs(rows: np.ndarray[Any, Any], of: int, count: int) -> np.ndarray[Any, Any]:
    """True for the `count` lowest of every `of` consecutive scores of a row; ties by place."""
    places = np.ascontiguousarray(rows.reshape(-1, of).T)
    ranks = np.zeros(places.shape, dtype=np.uint8)
    for later in range(1, of):
        # On a tie the earlier place ranks lower, so it is the one to go.
        earlier_first = places[:later] <= places[later]
        ranks[later] = earlier_first.sum(axis=0, dtype=np.uint8)
        ranks[:later] += ~earlier_first
    lowest: np.ndarray[Any, Any] = (ranks < count).T.reshape(rows.shape)
    return lowest


def _threshold_of_all(matrices: Sequence[torch.Tensor], count: int) -> float:
    """A value with at most `count` scores below it and at least `count` not above it."""
    if all(matrix.device.type == "cpu" for matrix in matrices):
        flat = torch.cat([matrix.flatten() for matrix in matrices]).numpy()
        flat.partition(count - 1)
        return float(flat[count - 1])
    return _threshold_by_bisection(matrices, count)


def _threshold_by_bisection(matrices: Sequence[torch.Tensor], count: int) -> float:
    """The same in at most 32 counting passes, without a copy, on any mixture of devices."""
    low = _key(min(float(matrix.min()) for matrix in matrices))
    high = _key(max(float(matrix.max()) for matrix in matrices))
    while low < high:
        middle = (low + high) // 2
        counted = sum(int((matrix <= _value(middle)).sum()) for matrix in matrices)
        if counted == count:
            return _value(middle)
        if counted > count:
            high = middle
        else:
            low = middle + 1
    return _value(low)


def _key(value: float) -> int:
    """An integer that orders float32 values as the values do; -0.0 and 0.0 share one."""
    magnitude = int(np.float32(abs(value)).view(np.int32))
    return magnitude if value >= 0 else -magnitude


def _value(key: int) -> float:
    """The float32 value of a key of `_key`."""
    return math.copysign(float(np.int32(abs(key)).view(np.float32)), key)
