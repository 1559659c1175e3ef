"""Criterion and layer in, scores or a mask out: the only door to the arithmetic.

The torch lines that `formula/code.py` writes for a criterion are compiled once and run as they
are; an exported pruner holds the same lines. On the CPU they run over a large matrix some rows at a
time, behind what has to see all of it. On a CUDA device with Triton, score and selection run as one
fused kernel where that is possible (`scoring/fused.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import ScoreError, StatisticsError
from prunezero.formula.code import lines_of, plain_line, split_steps, torch_lines
from prunezero.formula.criterion import Criterion
from prunezero.scoring.feature_values import depth_feature, feature
from prunezero.scoring.fused import can_fuse, fused_score, has_kernels, selected
from prunezero.scoring.request import checked_request
from prunezero.scoring.second_order import DAMPING
from prunezero.scoring.selection import select
from prunezero.scoring.statistics import Statistics
from prunezero.scoring.tiles import needs_tiles, row_tiles
from prunezero.scoring.torch_text import function_of


def features_of(
    criterion: Criterion,
    weight: Tensor,
    statistics: Statistics | None,
    *,
    damping: float = DAMPING,
    layer: str = "",
    leave_out: str = "",
) -> dict[str, Tensor]:
    """The values that a criterion reads, by feature name; float32, broadcastable to `[out, in]`.

    Args:
        damping: of the features that look at an inverse.
        layer: its name, for error messages.
        leave_out: a feature that is not asked for.

    Raises:
        StatisticsError: a sum that a feature needs was not collected, or nothing follows from it.
    """
    try:
        names = [name for name in criterion.features if name != leave_out]
        return {name: feature(name, weight, statistics, damping=damping) for name in names}
    except StatisticsError as error:
        raise type(error)(f"layer {layer}: {error}" if layer else str(error)) from error


def score(
    criterion: Criterion,
    weight: Tensor,
    statistics: Statistics | None = None,
    *,
    damping: float = DAMPING,
    layer: str = "",
) -> Tensor:
    """How much each weight matters, float32 `[out, in]`: the lowest go first.

    Args:
        weight: `[out, in]`, of any floating dtype; the arithmetic is float32.
        damping: of the features that look at an inverse.
        layer: name of the layer, for error messages.

    Raises:
        ScoreError: a score is NaN or infinite, or all scores of the layer are equal.
        StatisticsError: a sum that a feature needs was not collected.
    """
    features = features_of(criterion, weight, statistics, damping=damping, layer=layer)
    scores = evaluate(criterion, features, weight.shape)
    refuse_unusable(scores, criterion, weight, layer)
    return scores


def score_units(
    criterion: Criterion,
    part: Tensor,
    features: Mapping[str, Tensor],
    *,
    group: str = "",
    kind: str = "unit",
) -> Tensor:
    """How much each unit matters by its part of one matrix, float32 `[units]`: the lowest go first.

    Args:
        criterion: of one value for each row.
        part: `[units, rest]`, of any floating dtype.
        features: what the criterion reads, by name; broadcastable to the part.
        group: its name, for error messages.
        kind: what a unit is called there.

    Raises:
        ScoreError: a score is NaN or infinite, or all scores are equal.
    """
    scores = evaluate(criterion, features, part.shape)[:, :1]
    refuse_unusable(scores, criterion, part, group, kind=kind)
    return scores[:, 0]


def score_depth(
    criterion: Criterion,
    statistics: Statistics | None,
    given: Mapping[str, float],
    *,
    group: str = "",
    kind: str = "unit",
) -> Tensor:
    """How much one part of the depth matters, float32 `[1]`.

    Args:
        criterion: of one value for each row.
        statistics: of what it does to the stream, or of the loss without it.
        given: numbers that are no sums, by the names that features read.
        group: its name, for error messages.
        kind: what it is called there.

    Raises:
        ScoreError: the score is NaN or infinite.
        StatisticsError: a sum that a feature needs was not collected.
    """
    try:
        features = {name: depth_feature(name, statistics, given) for name in criterion.features}
    except StatisticsError as error:
        raise type(error)(f"{group}: {error}" if group else str(error)) from error
    scores = evaluate(criterion, features, (1, 1))
    refuse_unusable(scores, criterion, scores, group, kind=kind)
    return scores[0]


def evaluate(criterion: Criterion, features: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The value of a criterion on given features, float32, expanded to `shape`; unchecked.

    Args:
        shape: [out, in], or [layers, out, in] for a stack of layers.
    """
    with torch.no_grad():
        parts = _in_parts(criterion) if needs_tiles(features.values(), shape) else None
        if parts is None:
            return _compiled(criterion)(**features).expand(*shape)
        before, inside = parts
        values = before(**features)
        scores = torch.empty(*shape, dtype=torch.float32, device="cpu")
        for tile in row_tiles(shape[0], math.prod(shape[1:])):
            pieces = [value[tile] if value.shape[0] > 1 else value for value in values]
            scores[tile] = inside(*pieces)
        return scores


def refuse_unusable(
    scores: Tensor, criterion: Criterion, weight: Tensor, layer: str, *, kind: str = "weight"
) -> None:
    """Refuse scores that must not become a mask, by the names of formula and layer.

    Equal scores pass where the weights themselves are all zero: then any mask is right.

    Raises:
        ScoreError: a score is NaN or infinite, or all scores are equal.
    """
    lowest, highest = (float(bound) for bound in torch.aminmax(scores))
    where = f"of {layer}" if layer else "of a layer"
    if not (lowest > float("-inf") and highest < float("inf")):
        broken = int((~torch.isfinite(scores)).sum())
        raise ScoreError(
            f"criterion {criterion.text} gives {broken} of {scores.numel()} {kind}s {where} a "
            "score that is NaN or infinite; such scores never become a mask"
        )
    if lowest == highest and scores.numel() > 1 and bool(weight.any()):
        raise ScoreError(
            f"criterion {criterion.text} gives every {kind} {where} the same score {lowest:g}; "
            "it ranks nothing there"
        )


def keep_mask(
    criterion: Criterion,
    weight: Tensor,
    statistics: Statistics | None,
    sparsity: float,
    *,
    compare: str = "row",
    pattern: str = "free",
    damping: float = DAMPING,
    layer: str = "",
) -> Tensor:
    """Which weights of one layer stay, bool `[out, in]`; see `score` and `selection.select`.

    Raises:
        ScoreError, StatisticsError: as `score`.
        SelectionError: no mask satisfies the sparsity, group or pattern.
    """
    # Kernels read the weight as it is, of any dtype.
    leave_out = "W" if _has_kernels_for(weight, compare, pattern) else ""
    features = features_of(
        criterion, weight, statistics, damping=damping, layer=layer, leave_out=leave_out
    )
    return mask_from(
        criterion, weight, features, sparsity, compare=compare, pattern=pattern, layer=layer
    )


def mask_from(
    criterion: Criterion,
    weight: Tensor,
    features: Mapping[str, Tensor],
    sparsity: float,
    *,
    compare: str = "row",
    pattern: str = "free",
    layer: str = "",
) -> Tensor:
    """`keep_mask` on features that are known, by name as `features_of` gives them.

    Raises:
        ScoreError, SelectionError: as `keep_mask`.
    """
    if _has_kernels_for(weight, compare, pattern):
        request = checked_request(weight.shape[1], sparsity, compare=compare, pattern=pattern)
        chosen = selected(criterion, weight, features, request)
        if chosen.has_faults or chosen.ranks_nothing:
            refuse_unusable(fused_score(criterion, weight, features), criterion, weight, layer)
        return chosen.kept
    scores = evaluate(criterion, features, weight.shape)
    refuse_unusable(scores, criterion, weight, layer)
    return select(scores, sparsity, compare=compare, pattern=pattern)


def _has_kernels_for(weight: Tensor, compare: str, pattern: str) -> bool:
    return has_kernels(weight) and can_fuse(compare, pattern) and weight.numel() > 0


@functools.lru_cache(maxsize=4096)
def _compiled(criterion: Criterion) -> Callable[..., Tensor]:
    """The criterion as a Python function of its features."""
    return function_of(criterion.features, [*torch_lines(criterion), "return score"])


@functools.lru_cache(maxsize=4096)
def _in_parts(criterion: Criterion) -> tuple[Callable[..., Any], Callable[..., Tensor]] | None:
    """What is computed of whole matrices, and of its results what can be computed row by row.

    None where nothing is left for the second.
    """
    split = split_steps(criterion)
    if not split.inside:
        return None
    known = {*criterion.features, *(step.name for step in split.before)}
    read = dict.fromkeys(argument for step in split.inside for argument in step.arguments)
    inputs = [name for name in read if name in known]
    before = [*map(plain_line, split.before), f"return [{', '.join(inputs)}]"]
    inside = [*lines_of(split.inside), "return score"]
    return function_of(criterion.features, before), function_of(inputs, inside)
