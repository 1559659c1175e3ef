"""Which values of a layer do the features of the vocabulary stand for?

All follow from the weight and the raw sums of `statistics.py`, by the torch text of their rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from prunezero.errors import StatisticsError, did_you_mean
from prunezero.formula.feature_row import Feature
from prunezero.formula.features import FEATURES
from prunezero.scoring.second_order import DAMPING, OF_FACTOR, factor_feature
from prunezero.scoring.statistics import Statistics, sum_of
from prunezero.scoring.torch_text import feature_function


def feature(
    name: str, weight: Tensor, statistics: Statistics | None = None, *, damping: float = DAMPING
) -> Tensor:
    """The value of a vocabulary feature for one layer: float32, broadcastable to [out, in].

    Args:
        name: a key of `FEATURES`.
        weight: [out, in], any floating dtype.
        statistics: of the same layer; may be missing for features of the weight alone.
        damping: share of the mean Gram diagonal that is added before an inversion, at least.

    Raises:
        StatisticsError: unknown feature, or its sums were not collected, are empty or of another
            shape.
    """
    if name not in FEATURES:
        raise StatisticsError(
            f"'{name}' is not a known feature{did_you_mean(name, FEATURES)}; "
            f"known features: {', '.join(FEATURES)}"
        )
    if name in OF_FACTOR:
        value = factor_feature(name, statistics, damping)
    else:
        of_training = {} if statistics is None else statistics.of_training
        if FEATURES[name].of_training and not of_training:
            raise StatisticsError(
                f"feature {name} looks at low-rank factors while they train, and none do here; use "
                "schedule: while_training"
            )
        given = {"weight": weight.detach(), **of_training}
        value = feature_function(name)(**_inputs(FEATURES[name], given, statistics))
    fits = all(have in (1, want) for have, want in zip(value.shape, weight.shape, strict=True))
    if not fits:
        raise StatisticsError(
            f"feature {name} has shape {list(value.shape)}, which does not fit a weight of shape "
            f"{list(weight.shape)}; the statistics belong to another layer or model"
        )
    return value.to(device=weight.device)


def depth_feature(name: str, statistics: Statistics | None, given: Mapping[str, float]) -> Tensor:
    """The value of a feature of one part of the depth, float32 [1, 1].

    Args:
        given: numbers that are no sums, by the name that its row reads.

    Raises:
        StatisticsError: its sums were not collected, or are empty.
    """
    numbers = {key: torch.tensor([value], dtype=torch.float64) for key, value in given.items()}
    value: Tensor = feature_function(name)(**_inputs(FEATURES[name], numbers, statistics))
    return value.cpu()


def _inputs(
    row: Feature, given: Mapping[str, Tensor], statistics: Statistics | None
) -> dict[str, Tensor | int]:
    """What the torch text of a feature reads, by name."""
    values: dict[str, Tensor | int] = {name: sum_of(statistics, name) for name in row.sums}
    if statistics is not None:
        if "tokens" in row.inputs and statistics.tokens < 1:
            raise StatisticsError(
                f"the sum '{row.sums[0]}' is empty: the layer saw no calibration token"
            )
        values |= {"tokens": statistics.tokens, "sequences": statistics.sequences}
    values |= given
    return {name: values[name] for name in row.inputs}


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
