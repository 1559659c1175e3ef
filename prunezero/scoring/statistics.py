"""What does a layer see while sample text runs through it?

Only raw sums are stored; every feature of the vocabulary is derived from them when it is asked
for (`feature_values.py`). So one pass over the text serves every criterion, and sums of several
passes may be added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import StatisticsError, did_you_mean
from prunezero.formula.feature_row import names_in
from prunezero.scoring.torch_text import function_of

# What the values of a source are called in the torch text of a sum.
LETTERS = {
    "inputs": "x",
    "outputs": "y",
    "gradient": "g",
    "output gradients": "d",
    "input gradients": "e",
}
# Of a part of the depth: the stream behind it, and nats per predicted token where it adds nothing.
LETTERS |= {"stream": "y", "losses": "n", "divergences": "k"}


@dataclass(frozen=True)
class Sum:
    """How one raw sum is stored and what it is made from."""

    source: str
    """what is added up: one of `LETTERS`"""
    shape: tuple[str, ...]
    """its axes, each "in" or "out"; behind "sequence" stands what each sequence adds, one by one"""
    dtype: torch.dtype
    """of the running sum"""
    torch: str
    """what float values add, in the engine and in exported pages: x, y, d and e are [tokens,
    channels] and g is [out, in]; beside d and e it may read x of the same tokens, and x is the
    stream before y"""

    @cached_property
    def letters(self) -> tuple[str, ...]:
        """The values that the torch text reads."""
        return names_in(self.torch)

    @property
    def with_inputs(self) -> bool:
        """Whether it also reads the layer's inputs for the same tokens."""
        return self.letters != (LETTERS[self.source],)

    @property
    def by_sequence(self) -> bool:
        """Whether it keeps what each sequence adds: then it is no sum, but a row for each."""
        return self.shape[0] == "sequence"

    @cached_property
    def of(self) -> Callable[..., Tensor]:
        """What values add, by letter."""
        return function_of(self.letters, [f"return {self.torch}"])


SUMS: dict[str, Sum] = {
    "input_sum": Sum("inputs", ("in",), torch.float64, "x.sum(0, dtype=torch.float64)"),
    "input_square_sum": Sum("inputs", ("in",), torch.float64, "x.double().square().sum(0)"),
    "gram": Sum("inputs", ("in", "in"), torch.float32, "x.float().T @ x.float()"),
    "output_square_sum": Sum("outputs", ("out",), torch.float64, "y.double().square().sum(0)"),
    "input_magnitudes": Sum(
        "inputs", ("sequence", "in"), torch.float64, "x.abs().mean(0, dtype=torch.float64)"
    ),
    "gradient_sum": Sum("gradient", ("out", "in"), torch.float32, "g.float()"),
    "gradient_square_sum": Sum("gradient", ("out", "in"), torch.float32, "g.float().square()"),
    "gradient_absolute_sum": Sum("gradient", ("out", "in"), torch.float32, "g.float().abs()"),
    # A token's gradient of a weight is a product of two numbers, so their squares need no loop.
    "token_gradient_square_sum": Sum(
        "output gradients",
        ("out", "in"),
        torch.float32,
        "d.float().square().T @ x.float().square()",
    ),
    "output_gradient_square_sum": Sum(
        "output gradients", ("out",), torch.float64, "d.double().square().sum(0)"
    ),
    # How the loss changes with a factor on a channel, at 1: of a unit of several, their sum.
    "mask_gradients": Sum(
        "input gradients", ("sequence", "in"), torch.float64, "(x.double() * e.double()).sum(0)"
    ),
}

# What a part of the depth does to one sequence after another; "out" is one number.
BLOCK_SUMS: dict[str, Sum] = {
    "cosine_sum": Sum(
        "stream",
        ("out",),
        torch.float64,
        "torch.cosine_similarity(x.double(), y.double()).sum()[None]",
    ),
    "last_angle_sum": Sum(
        "stream",
        ("out",),
        torch.float64,
        "torch.cosine_similarity(x[-1:].double(), y[-1:].double()).clamp(-1, 1).arccos()",
    ),
    "relative_sum": Sum(
        "stream",
        ("out",),
        torch.float64,
        "((y.double() - x.double()).norm(dim=1) / x.double().norm(dim=1)).sum()[None]",
    ),
    "loss_without_sum": Sum("losses", ("out",), torch.float64, "n.double().mean(0)"),
    "divergence_without_sum": Sum("divergences", ("out",), torch.float64, "k.double().mean(0)"),
}
# What a router and its experts do to one sequence after another; "in" are the experts, "out" the
# channels of their outputs. The tables [tokens, experts] hold zeros where an expert is not chosen:
# r is 1 where it is, g the router's weight of it, n the norm of what it makes of the token; s is
# the softmax of the router's logits over all experts. t [tokens] is 1 - cosine of the stream with
# and without routed experts, f [experts, channels] the sum of their outputs, a [experts] their
# largest activation, w [experts] the norm by which the layer's output changes without each, and
# e the gradient of a factor on what each hands on, [tokens, experts].
ROUTING_SUMS: dict[str, Sum] = {
    name: Sum("routing", shape, torch.float64, text)
    for name, shape, text in (
        ("routed_count", ("in",), "r.sum(0)"),
        ("gate_sum", ("in",), "g.sum(0)"),
        ("gate_square_sum", ("in",), "g.square().sum(0)"),
        ("soft_sum", ("in",), "s.sum(0)"),
        ("norm_sum", ("in",), "n.sum(0)"),
        ("norm_square_sum", ("in",), "n.square().sum(0)"),
        ("gated_norm_sum", ("in",), "(g * n).sum(0)"),
        ("gated_norm_square_sum", ("in",), "(g * n).square().sum(0)"),
        ("turned_gated_norm_sum", ("in",), "(t[:, None] * g * n).sum(0)"),
        ("expert_output_sum", ("in", "out"), "f"),
        ("largest_activations", ("sequence", "in"), "a"),
        ("together_count", ("in", "in"), "r.T @ r"),
        ("loss_without_expert", ("in",), "w"),
    )
}
_EVERY = {**SUMS, **BLOCK_SUMS, **ROUTING_SUMS}


@dataclass(frozen=True)
class Contribution:
    """What some values of one source add to the sums; layers that read the same tensor share it."""

    source: str
    """one of `LETTERS`"""
    tokens: int
    """tokens in the values"""
    sequences: int
    """sequences in the values"""
    values: dict[str, Tensor]
    """by name of the sum"""


def contribution(
    source: str,
    values: Tensor,
    names: Iterable[str],
    *,
    inputs: Tensor | None = None,
    layer: str = "a layer",
) -> Contribution:
    """What `values` add to those of the named sums that are made from `source`.

    Args:
        source: one of `LETTERS`.
        values: [sequences, tokens, channels], or [tokens, channels] for one sequence; a gradient
            is [out, in].
        names: keys of `SUMS` or `BLOCK_SUMS`; sums of other sources are left out.
        inputs: of the layer for the same tokens, for sums that are also made from them.
        layer: named in the error.

    Raises:
        StatisticsError: a value is NaN or infinite, or inputs are missing.
    """
    sequences = values.shape[0] if values.dim() == 3 else 1
    rows = _rows(values)
    wanted = [name for name in names if _EVERY[name].source == source]
    if inputs is None and any(_EVERY[name].with_inputs for name in wanted):
        raise StatisticsError(f"sums of the {source} of {layer} also need its inputs")
    read = (
        {LETTERS[source]: rows} if inputs is None else {"x": _rows(inputs), LETTERS[source]: rows}
    )
    added = {}
    for name in wanted:
        row = _EVERY[name]
        parts = [read[letter] for letter in row.letters]
        if row.by_sequence:
            cut = zip(*(part.chunk(sequences) for part in parts), strict=True)
            added[name] = torch.stack([row.of(*one) for one in cut])
        else:
            added[name] = row.of(*parts)
    _refuse_non_finite(added, source, layer)
    tokens = 0 if source == "gradient" else rows.shape[0]
    return Contribution(source, tokens, sequences, added)


def routing_contribution(
    tables: Mapping[str, Tensor], names: Iterable[str], tokens: int, *, layer: str
) -> Contribution:
    """What one sequence adds to sums of a router and its experts.

    Args:
        tables: float64, by letter, see `ROUTING_SUMS`; those that the sums read.
        names: keys of `ROUTING_SUMS`, or mask_gradients.
        tokens: of the sequence.
        layer: named in the error.

    Raises:
        StatisticsError: a value is NaN or infinite.
    """
    added = {}
    for name in names:
        row = ROUTING_SUMS.get(name)
        value = tables["e"].sum(0) if row is None else row.of(*(tables[k] for k in row.letters))
        added[name] = value[None] if _EVERY[name].by_sequence else value
    _refuse_non_finite(added, "routing", layer)
    return Contribution("routing", tokens, 1, added)


def _refuse_non_finite(added: Mapping[str, Tensor], source: str, layer: str) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in added.values()):
        raise StatisticsError(
            f"the {source} of {layer} hold NaN or infinite numbers; "
            "try --dtype float32, or check that the model itself is sound"
        )


def _rows(values: Tensor) -> Tensor:
    """All tokens of all sequences, [tokens, channels]."""
    return values.detach().reshape(-1, values.shape[-1])


@dataclass
class Statistics:
    """Running sums of one layer over sample text."""

    tokens: int
    """tokens that went through the layer"""
    sequences: int
    """sequences that those tokens came in"""
    sums: dict[str, Tensor]
    """by name, see `SUMS`, `BLOCK_SUMS` and `ROUTING_SUMS`"""
    of_training: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """what features read of low-rank factors that train, see `formula/feature_row.py`; no sums"""
    is_filled: bool = False
    """whether it saw too little text, and was filled up with that of others"""
    memo: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False, repr=False)
    """what was derived from the sums and is dear to derive again; emptied when they change"""
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict, init=False, repr=False)
    _is_shared: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        sources = {_EVERY[name].source for name in self.sums}
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
            StatisticsError: a name is no sum.
        """
        sums = {}
        for name in sorted(names):
            size = {"in": in_features, "out": out_features, "sequence": 0}
            shape = [size[axis] for axis in _known_sum(name).shape]
            sums[name] = torch.zeros(shape, dtype=_EVERY[name].dtype, device=device)
        return cls(tokens=0, sequences=0, sums=sums)

    def add(self, added: Contribution) -> None:
        """Add what `contribution` returned; counts follow the source that has seen most."""
        if self._is_shared:
            # What is shared must not change under the other layer.
            self.sums = {name: value.clone() for name, value in self.sums.items()}
            self._is_shared = False
        self.memo = {}
        for name, value in added.values.items():
            value = value.to(self.sums[name].device)
            if _EVERY[name].by_sequence:
                self.sums[name] = torch.cat([self.sums[name], value])
            else:
                self.sums[name] += value
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

    def add_output_gradients(
        self, gradients: Tensor, *, inputs: Tensor | None = None, layer: str = "a layer"
    ) -> None:
        """Add dLoss/dOutput: [sequences, tokens, out], or [tokens, out] for one sequence.

        Args:
            inputs: of the same tokens, [..., in]; for sums that are also made from them.
        """
        added = contribution("output gradients", gradients, self.sums, inputs=inputs, layer=layer)
        self.add(added)

    def add_input_gradients(
        self, gradients: Tensor, *, inputs: Tensor, layer: str = "a layer"
    ) -> None:
        """Add dLoss/dInput, as far as it comes through this layer: as inputs are added.

        Args:
            inputs: of the same tokens, [..., in].
        """
        added = contribution("input gradients", gradients, self.sums, inputs=inputs, layer=layer)
        self.add(added)

    def share(self, other: Statistics, name: str) -> None:
        """Hold another layer's equal sum, and what is derived from it, in the same memory."""
        self.sums[name] = other.sums[name]
        self.memo = other.memo
        self._is_shared = other._is_shared = True

    def to(self, device: torch.device | str) -> Statistics:
        """The same sums on another device."""
        moved = {name: value.to(device) for name, value in self.sums.items()}
        return Statistics(self.tokens, self.sequences, moved)

    def permuted(
        self, *, inputs: Tensor | None = None, outputs: Tensor | None = None
    ) -> Statistics:
        """The sums that a layer with its channels in this order would have seen.

        Args:
            inputs: int64 [in], the old index of each new input channel; None keeps their order.
            outputs: int64 [out], likewise for output channels.
        """
        given = {"in": inputs, "out": outputs}
        orders = {axis: order for axis, order in given.items() if order is not None}
        return Statistics(self.tokens, self.sequences, _reordered(self.sums, orders))


def _reordered(sums: dict[str, Tensor], orders: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in sums.items():
        for place, axis in enumerate(_EVERY[name].shape):
            if axis in orders:
                value = value.index_select(place, orders[axis].to(value.device))
        found[name] = value
    return found


def _known_sum(name: str) -> Sum:
    if name not in _EVERY:
        raise StatisticsError(
            f"'{name}' is not a sum that can be collected{did_you_mean(name, _EVERY)}; "
            f"known sums: {', '.join(_EVERY)}"
        )
    return _EVERY[name]


def sums_bytes(names: Iterable[str], shape: Sequence[int], sequences: int) -> int:
    """Memory of the named sums of a layer, in bytes.

    Args:
        shape: of its weight, out and in.
        sequences: of the text, each of which adds a row to sums that are kept by sequence.

    Raises:
        StatisticsError: a name is no sum.
    """
    size = {"in": shape[1], "out": shape[0], "sequence": sequences}
    rows = map(_known_sum, names)
    return sum(prod(size[axis] for axis in row.shape) * row.dtype.itemsize for row in rows)


def sum_of(statistics: Statistics | None, name: str) -> Tensor:
    """The named sum.

    Raises:
        StatisticsError: it was not collected, or holds nothing yet.
    """
    if statistics is None or name not in statistics.sums:
        raise StatisticsError(
            f"the sum '{name}' was not collected; collect the sums that needed_sums() names"
        )
    if statistics.sequences < 1:
        raise StatisticsError(f"the sum '{name}' is empty: the layer saw no calibration sequence")
    return statistics.sums[name]
