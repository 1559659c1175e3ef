"""Many formulas on many layers of one shape: what a search asks most often.

Layers of one shape are stacked, so that one operation, or one kernel, serves all of them. On a CPU
the formulas go one after the other; on a CUDA device with Triton a machine takes many at once
(`kernels/machine.py`), and kernels select from their scores. A formula's masks are the same in
whatever company they are made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from prunezero.formula.criterion import Criterion
from prunezero.scoring.fused import can_fuse, fused_score, has_kernels, selected, stored
from prunezero.scoring.kernels.machine import can_run, program, scores_of
from prunezero.scoring.request import checked_request, group_columns, parse_pattern
from prunezero.scoring.score import evaluate
from prunezero.scoring.selection import refuse_non_finite, select

# Values that one run of the machine may hold: half a gigabyte.
_SCORES = 1 << 27
# What a grid of programs can count.
_MOST_FORMULAS = 65535
_WIDEST = 1 << 31


def stacked_scores(
    criteria: Sequence[Criterion], features: Mapping[str, Tensor], shape: Sequence[int]
) -> Iterator[Tensor]:
    """The scores of each formula in turn, float32 [layers, out, in]; unchecked.

    Args:
        features: by name, float32, broadcastable to `shape`, [layers, 1 or out, 1 or in].
        shape: [layers, out, in].
    """
    if not has_kernels(next(iter(features.values()))):
        for criterion in criteria:
            read = {name: features[name] for name in criterion.features}
            yield evaluate(criterion, read, shape)
        return
    size = math.prod(shape)
    for some in _portions(criteria, size):
        fit = [one for one in some if can_run(one) and size < _WIDEST]
        scores = dict(zip(fit, scores_of(fit, features, shape), strict=True)) if fit else {}
        for criterion in some:
            found = scores.get(criterion)
            yield _layer_by_layer(criterion, features, shape) if found is None else found
        del scores, found


def _portions(criteria: Sequence[Criterion], size: int) -> Iterator[list[Criterion]]:
    """The formulas in portions whose scores, and what is computed before them, fit `_SCORES`."""
    portion: list[Criterion] = []
    held = 0
    for criterion in criteria:
        whole = sum(step.shape == "element" for step in program(criterion).before)
        if portion and (held + (1 + whole) * size > _SCORES or len(portion) == _MOST_FORMULAS):
            yield portion
            portion, held = [], 0
        portion.append(criterion)
        held += (1 + whole) * size
    if portion:
        yield portion


def _layer_by_layer(
    criterion: Criterion, features: Mapping[str, Tensor], shape: Sequence[int]
) -> Tensor:
    """The scores by a kernel of the formula's own."""
    layers = []
    for place in range(shape[0]):
        values = {name: features[name][place] for name in criterion.features}
        weight = values.get("W", next(iter(values.values()))).expand(*shape[1:])
        layers.append(fused_score(criterion, weight, values))
    return torch.stack(layers)


def select_stacked(
    scores: Tensor, sparsity: float, *, compare: str, pattern: str, is_finite: bool = False
) -> Tensor:
    """The masks of a stack of layers, bool [layers, out, in]: True = keep.

    Every layer is by itself; which weights compete in it is said as in `selection.select`. The
    group model, which compares layers, is `selection.select_model`'s.

    Args:
        is_finite: the caller has seen that all scores are; a GPU need not be waited for then.

    Raises:
        SelectionError: the request cannot be satisfied.
        ScoreError: a score is NaN or infinite.
    """
    parsed = parse_pattern(pattern)
    columns = group_columns(compare)
    if parsed is None and columns is not None:
        blocks = torch.split(scores, columns, dim=2)
        kept = [
            _select_rows(block.flatten(1), sparsity, pattern, is_finite).view(block.shape)
            for block in blocks
        ]
        return torch.cat(kept, dim=2)
    whole = parsed is None and compare == "layer"
    rows = scores.flatten(1) if whole else scores.flatten(0, 1)
    return _select_rows(rows, sparsity, pattern, is_finite).view(scores.shape)


def _select_rows(rows: Tensor, sparsity: float, pattern: str, is_finite: bool) -> Tensor:
    if not (has_kernels(rows) and can_fuse("row", pattern)):
        return select(rows, sparsity, pattern=pattern)
    request = checked_request(rows.shape[1], sparsity, pattern=pattern)
    chosen = selected(stored(), rows, {}, request)
    if not is_finite and chosen.has_faults:
        refuse_non_finite(rows)
    return chosen.kept
