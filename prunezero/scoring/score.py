"""Criterion and layer in, scores or a mask out: the only door to the arithmetic.

The torch lines that `formula/code.py` writes for a criterion are compiled once and run as they
are; an exported pruner holds the same lines. On a CUDA device with Triton, score and selection run
as one fused kernel where that is possible (`scoring/fused.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prunezero.errors import ScoreError, StatisticsError
from prunezero.formula.code import torch_lines
from prunezero.formula.criterion import Criterion
from prunezero.scoring.feature_values import feature
from prunezero.scoring.fused import can_fuse, fused_mask, fused_score
from prunezero.scoring.selection import select
from prunezero.scoring.statistics import Statistics


def features_of(
    criterion: Criterion, weight: Tensor, statistics: Statistics | None, *, layer: str = ""
) -> dict[str, Tensor]:
    """The values that a criterion reads, by feature name; float32, broadcastable to `[out, in]`.

    Raises:
        StatisticsError: a sum that a feature needs was not collected, or nothing follows from it.
    """
    try:
        return {name: feature(name, weight, statistics) for name in criterion.features}
    except StatisticsError as error:
        raise type(error)(f"layer {layer}: {error}" if layer else str(error)) from error


def score(
    criterion: Criterion, weight: Tensor, statistics: Statistics | None = None, *, layer: str = ""
) -> Tensor:
    """How much each weight matters, float32 `[out, in]`: the lowest go first.

    Args:
        weight: `[out, in]`, of any floating dtype; the arithmetic is float32.
        layer: name of the layer, for error messages.

    Raises:
        ScoreError: a score is NaN or infinite, or all scores of the layer are equal.
        StatisticsError: a sum that a feature needs was not collected.
    """
    features = features_of(criterion, weight, statistics, layer=layer)
    scores = evaluate(criterion, features, weight.shape)
    refuse_unusable(scores, criterion, weight, layer)
    return scores


def evaluate(
    criterion: Criterion, features: Mapping[str, Tensor], shape: torch.Size | tuple[int, ...]
) -> Tensor:
    """The value of a criterion on given features, float32, expanded to `shape`; unchecked."""
    with torch.no_grad():
        return _compiled(criterion)(**features).expand(shape)


def refuse_unusable(scores: Tensor, criterion: Criterion, weight: Tensor, layer: str) -> None:
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
            f"criterion {criterion.text} gives {broken} of {scores.numel()} weights {where} a "
            "score that is NaN or infinite; such scores never become a mask"
        )
    if lowest == highest and scores.numel() > 1 and bool(weight.any()):
        raise ScoreError(
            f"criterion {criterion.text} gives every weight {where} the same score {lowest:g}; "
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
    layer: str = "",
) -> Tensor:
    """Which weights of one layer stay, bool `[out, in]`; see `score` and `selection.select`.

    Raises:
        ScoreError, StatisticsError: as `score`.
        SelectionError: no mask satisfies the sparsity, group or pattern.
    """
    if weight.is_cuda and can_fuse(compare, pattern, weight.shape[1]):
        features = features_of(criterion, weight, statistics, layer=layer)
        refuse_unusable(fused_score(criterion, weight, features), criterion, weight, layer)
        return fused_mask(criterion, weight, features, sparsity, compare=compare, pattern=pattern)
    scores = score(criterion, weight, statistics, layer=layer)
    return select(scores, sparsity, compare=compare, pattern=pattern)


@functools.lru_cache(maxsize=4096)
def _compiled(criterion: Criterion) -> Callable[..., Tensor]:
    """The criterion as a Python function of its features.

    The source comes from the validated expression and the vocabulary's templates alone.
    """
    body = "".join(f"    {line}\n" for line in torch_lines(criterion))
    source = f"def formula({', '.join(criterion.features)}):\n{body}    return score\n"
    namespace: dict[str, object] = {"torch": torch}
    exec(compile(source, f"<criterion {criterion.text}>", "exec"), namespace)
    return namespace["formula"]  # type: ignore[return-value]
