"""Which values of a layer do the features of the vocabulary stand for?

All follow from the weight and the raw sums of `statistics.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from prunezero.errors import StatisticsError, did_you_mean
from prunezero.formula.features import FEATURES
from prunezero.scoring.second_order import gram_diagonal, inverse_diagonals
from prunezero.scoring.statistics import Statistics, sum_of


def _per_token(statistics: Statistics | None, name: str) -> Tensor:
    total = sum_of(statistics, name)
    assert statistics is not None  # sum_of refused it; for the type checker
    if statistics.tokens < 1:
        raise StatisticsError(f"the sum '{name}' is empty: the layer saw no calibration token")
    return total / statistics.tokens


def _norm_per_sequence(statistics: Statistics | None, name: str) -> Tensor:
    """Wanda's norm: sqrt(sum over tokens / sequences), so it grows with the sequence length."""
    total = sum_of(statistics, name)
    assert statistics is not None  # sum_of refused it; for the type checker
    return (total / statistics.sequences).sqrt()


def _row_sum(weight: Tensor, dim: int) -> Tensor:
    return weight.abs().sum(dim, keepdim=True, dtype=torch.float64)


def _norm(weight: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=dim, keepdim=True, dtype=torch.float64)


def _input_variance(statistics: Statistics | None) -> Tensor:
    mean = _per_token(statistics, "input_sum")
    # Rounding may leave a constant channel a little below zero.
    return (_per_token(statistics, "input_square_sum") - mean.square()).clamp(min=0.0)


# Each takes the weight [out, in] and the statistics of its layer.
FEATURE_VALUES: dict[str, Callable[[Tensor, Statistics | None], Tensor]] = {
    "W": lambda weight, statistics: weight,
    "R1": lambda weight, statistics: _row_sum(weight, 1),
    "C1": lambda weight, statistics: _row_sum(weight, 0),
    "R2": lambda weight, statistics: _norm(weight, 1),
    "C2": lambda weight, statistics: _norm(weight, 0),
    "X": lambda weight, statistics: _norm_per_sequence(statistics, "input_square_sum")[None],
    "X_ms": lambda weight, statistics: _per_token(statistics, "input_square_sum")[None],
    "X_rms": lambda weight, statistics: _per_token(statistics, "input_square_sum").sqrt()[None],
    "X_mean": lambda weight, statistics: _per_token(statistics, "input_sum")[None],
    "X_var": lambda weight, statistics: _input_variance(statistics)[None],
    "Y": lambda weight, statistics: _norm_per_sequence(statistics, "output_square_sum")[:, None],
    "G": lambda weight, statistics: sum_of(statistics, "gradient_square_sum").sqrt(),
    "G1": lambda weight, statistics: sum_of(statistics, "gradient_absolute_sum"),
    "F": lambda weight, statistics: sum_of(statistics, "token_gradient_square_sum").sqrt(),
    "D": lambda weight, statistics: _per_token(statistics, "output_gradient_square_sum").sqrt()[
        :, None
    ],
    "H": lambda weight, statistics: gram_diagonal(statistics)[None],
    "V": lambda weight, statistics: inverse_diagonals(statistics)[0][None],
    "U": lambda weight, statistics: inverse_diagonals(statistics)[1][None],
}


def feature(name: str, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
    """The value of a vocabulary feature for one layer: float32, broadcastable to [out, in].

    Args:
        name: a key of `FEATURE_VALUES`.
        weight: [out, in], any floating dtype.
        statistics: of the same layer; may be missing for features of the weight alone.

    Raises:
        StatisticsError: unknown feature, or its sums were not collected, are empty or of another
            shape.
    """
    if name not in FEATURE_VALUES:
        raise StatisticsError(
            f"'{name}' is not a feature with values{did_you_mean(name, FEATURE_VALUES)}; "
            f"known features: {', '.join(FEATURE_VALUES)}"
        )
    value = FEATURE_VALUES[name](weight.detach(), statistics)
    fits = all(have in (1, want) for have, want in zip(value.shape, weight.shape, strict=True))
    if not fits:
        raise StatisticsError(
            f"feature {name} has shape {list(value.shape)}, which does not fit a weight of shape "
            f"{list(weight.shape)}; the statistics belong to another layer or model"
        )
    return value.to(device=weight.device, dtype=torch.float32)


class HasFeatures(Protocol):
    """A criterion, as far as this file needs to know it."""

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features in the formula."""
        ...


def needed_sums(items: Iterable[HasFeatures | str]) -> frozenset[str]:
    """Names of the sums to collect so that every criterion or feature named can be scored.

    Raises:
        StatisticsError: a feature is not in the vocabulary.
    """
    names: set[str] = set()
    for item in items:
        for name in (item,) if isinstance(item, str) else item.features:
            if name not in FEATURES:
                raise StatisticsError(
                    f"'{name}' is not a known feature{did_you_mean(name, FEATURES)}"
                )
            names.update(FEATURES[name].sums)
    return frozenset(names)
