"""What does a router do with each of its experts, and what do they make of tokens?

All follows from the weights of one mixture and from raw sums over calibration text, by the torch
text of features of the domain "expert".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunezero.errors import StatisticsError
from prunezero.formula.features import FEATURES
from prunezero.scoring.statistics import ROUTING_SUMS, Statistics, sum_of
from prunezero.scoring.torch_text import feature_function
from prunezero.scoring.unit_features import noise


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer, as far as features look at them."""

    weights: Mapping[str, Tensor]
    """`up` [experts, 2 * intermediate, hidden], `down` [experts, hidden, intermediate] and
    `router` [experts, hidden]"""
    statistics: Statistics | None
    """of what router and experts did"""
    cost: Mapping[str, float] = field(default_factory=dict)
    """of one expert, by measure"""
    name: str = ""
    """of the layer"""
    seed: int = 0
    """of the noise"""

    @property
    def experts(self) -> int:
        """How many there are."""
        return len(self.weights["router"])


def expert_feature(name: str, mixture: Mixture) -> Tensor:
    """The value of a feature of experts, float32 [experts, 1].

    Args:
        name: a key of `FEATURES`, of the domain "expert".

    Raises:
        StatisticsError: a sum was not collected, is empty, or of another layer.
    """
    values = {read: _input(read, mixture) for read in FEATURES[name].inputs}
    value = feature_function(name)(**values)
    if value.shape != (mixture.experts, 1):
        raise StatisticsError(
            f"feature {name} has shape {list(value.shape)}, which does not fit {mixture.experts} "
            f"experts of {mixture.name}; the statistics belong to another layer or model"
        )
    return value.to(mixture.weights["router"].device)


def _input(name: str, mixture: Mixture) -> Tensor | int:
    """What the torch text of a feature reads."""
    known, count = mixture.statistics, mixture.experts
    if name in mixture.weights:
        return mixture.weights[name].detach()
    if name == "noise":
        return noise(mixture.name, count, mixture.seed)
    if name == "parameters":
        return torch.full((count,), mixture.cost.get(name, 0.0), dtype=torch.float64)
    if name in ("tokens", "sequences"):
        seen: int = getattr(known, name, 0)
        if seen < 1:
            raise StatisticsError(f"{mixture.name} saw no calibration {name[:-1]}")
        return seen
    value = sum_of(known, name)
    # Mask gradients of units have a channel behind the unit.
    return value if name in ROUTING_SUMS else value[..., None]
