"""What does a layer see while sample text runs through it, and which feature values follow?

Only raw sums are stored; every feature of the vocabulary is derived from them when it is asked
for. So one pass over the text serves every criterion, and sums of several passes may be added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from prunezero.errors import StatisticsError, did_you_mean
from prunezero.formula.vocabulary import FEATURES


@dataclass(frozen=True)
class Sum:
    """How one raw sum is stored and what it is made from."""

    source: str
    """what is added up: "inputs", "outputs", "gradient" or "output gradients" """
    shape: tuple[str, ...]
    """its axes, each "in" or "out" """
    dtype: torch.dtype
    """of the running sum"""
    of: Callable[[Tensor], Tensor]
    """the contribution of float values: [tokens, channels], for a gradient [out, in]"""


def _gram(inputs: Tensor) -> Tensor:
    inputs = inputs.to(torch.float32)
    return inputs.T @ inputs


SUMS: dict[str, Sum] = {
    "input_sum": Sum("inputs", ("in",), torch.float64, lambda x: x.sum(0, dtype=torch.float64)),
    "input_square_sum": Sum(
        "inputs", ("in",), torch.float64, lambda x: x.to(torch.float64).square().sum(0)
    ),
    "gram": Sum("inputs", ("in", "in"), torch.float32, _gram),
    "output_square_sum": Sum(
        "outputs", ("out",), torch.float64, lambda y: y.to(torch.float64).square().sum(0)
    ),
    "gradient_square_sum": Sum(
        "gradient", ("out", "in"), torch.float32, lambda g: g.to(torch.float32).square()
    ),
    "gradient_absolute_sum": Sum(
        "gradient", ("out", "in"), torch.float32, lambda g: g.to(torch.float32).abs()
    ),
    "output_gradient_square_sum": Sum(
        "output gradients", ("out",), torch.float64, lambda d: d.to(torch.float64).square().sum(0)
    ),
}


@dataclass(frozen=True)
class Contribution:
    """What some values of one source add to the sums; layers that read the same tensor share it."""

    source: str
    """one of the sources of `SUMS`"""
    tokens: int
    """tokens in the values"""
    sequences: int
    """sequences in the values"""
    values: dict[str, Tensor]
    """by name of the sum"""


def contribution(
    source: str, values: Tensor, names: Iterable[str], *, layer: str = "a layer"
) -> Contribution:
    """What `values` add to those of the named sums that are made from `source`.

    Args:
        source: one of the sources of `SUMS`.
        values: [sequences, tokens, channels], or [tokens, channels] for one sequence; a gradient
            is [out, in].
        names: keys of `SUMS`; sums of other sources are left out.
        layer: named in the error.

    Raises:
        StatisticsError: a value is NaN or infinite.
    """
    sequences = values.shape[0] if values.dim() == 3 else 1
    rows = values.detach().reshape(-1, values.shape[-1])
    added = {name: SUMS[name].of(rows) for name in names if SUMS[name].source == source}
    if not all(bool(torch.isfinite(value).all()) for value in added.values()):
        raise StatisticsError(
            f"the {source} of {layer} hold NaN or infinite numbers; "
            "try --dtype float32, or check that the model itself is sound"
        )
    tokens = 0 if source == "gradient" else rows.shape[0]
    return Contribution(source, tokens, sequences, added)


@dataclass
class Statistics:
    """Running sums of one layer over sample text."""

    tokens: int
    """tokens that went through the layer"""
    sequences: int
    """sequences that those tokens came in"""
    sums: dict[str, Tensor]
    """by name, see `SUMS`"""
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        sources = {SUMS[name].source for name in self.sums}
        self._seen = {source: (self.tokens, self.sequences) for source in sources}

    @classmethod
    def empty(
        cls,
        names: Iterable[str],
        out_features: int,
        in_features: int,
        device: torch.device | str = "cpu",
    ) -> Statistics:
        """Sums of nothing yet, for a layer with weight [out_features, in_features].

        Raises:
            StatisticsError: a name is not in `SUMS`.
        """
        sums = {}
        for name in sorted(names):
            size = {"in": in_features, "out": out_features}
            shape = [size[axis] for axis in _known_sum(name).shape]
            sums[name] = torch.zeros(shape, dtype=SUMS[name].dtype, device=device)
        return cls(tokens=0, sequences=0, sums=sums)

    def add(self, added: Contribution) -> None:
        """Add what `contribution` returned; counts follow the source that has seen most."""
        for name, value in added.values.items():
            self.sums[name] += value.to(self.sums[name].device)
        tokens, sequences = self._seen.get(added.source, (0, 0))
        self._seen[added.source] = (tokens + added.tokens, sequences + added.sequences)
        self.tokens = max(seen[0] for seen in self._seen.values())
        self.sequences = max(seen[1] for seen in self._seen.values())

    def add_inputs(self, inputs: Tensor, *, layer: str = "a layer") -> None:
        """Add the layer's inputs: [sequences, tokens, in], or [tokens, in] for one sequence."""
        self.add(contribution("inputs", inputs, self.sums, layer=layer))

    def add_outputs(self, outputs: Tensor, *, layer: str = "a layer") -> None:
        """Add the layer's outputs: [sequences, tokens, out], or [tokens, out] for one sequence."""
        self.add(contribution("outputs", outputs, self.sums, layer=layer))

    def add_gradient(self, gradient: Tensor, *, layer: str = "a layer") -> None:
        """Add the gradient [out, in] of ONE sequence; counts a sequence, but no tokens."""
        self.add(contribution("gradient", gradient, self.sums, layer=layer))

    def add_output_gradients(self, gradients: Tensor, *, layer: str = "a layer") -> None:
        """Add dLoss/dOutput: [sequences, tokens, out], or [tokens, out] for one sequence."""
        self.add(contribution("output gradients", gradients, self.sums, layer=layer))

    def to(self, device: torch.device | str) -> Statistics:
        """The same sums on another device."""
        moved = {name: value.to(device) for name, value in self.sums.items()}
        return Statistics(self.tokens, self.sequences, moved)


def _known_sum(name: str) -> Sum:
    if name not in SUMS:
        raise StatisticsError(
            f"'{name}' is not a sum that can be collected{did_you_mean(name, SUMS)}; "
            f"known sums: {', '.join(SUMS)}"
        )
    return SUMS[name]


def _sum_of(statistics: Statistics | None, name: str) -> Tensor:
    """The named sum, refused in words when it was not collected."""
    if statistics is None or name not in statistics.sums:
        raise StatisticsError(
            f"the sum '{name}' was not collected; collect the sums that needed_sums() names"
        )
    if statistics.sequences < 1:
        raise StatisticsError(f"the sum '{name}' is empty: the layer saw no calibration sequence")
    return statistics.sums[name]


def _per_token(statistics: Statistics | None, name: str) -> Tensor:
    total = _sum_of(statistics, name)
    assert statistics is not None  # _sum_of refused it; for the type checker
    if statistics.tokens < 1:
        raise StatisticsError(f"the sum '{name}' is empty: the layer saw no calibration token")
    return total / statistics.tokens


def _norm_per_sequence(statistics: Statistics | None, name: str) -> Tensor:
    """Wanda's norm: sqrt(sum over tokens / sequences), so it grows with the sequence length."""
    total = _sum_of(statistics, name)
    assert statistics is not None  # _sum_of refused it; for the type checker
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
    "G": lambda weight, statistics: _sum_of(statistics, "gradient_square_sum").sqrt(),
    "G1": lambda weight, statistics: _sum_of(statistics, "gradient_absolute_sum"),
    "D": lambda weight, statistics: _per_token(statistics, "output_gradient_square_sum").sqrt()[
        :, None
    ],
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
