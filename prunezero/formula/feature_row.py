"""What is known of a feature that a formula may look at: all that stands in its row.

A row holds all that is known of a feature. The engine, its kernels and exported pages run the torch
text of its value as it stands. What the text may read: `weight`; raw sums over calibration text, by
their names in `scoring/statistics.py`, which collects just those; how many `tokens` and `sequences`
they are of; and, alone, `upper`, the Cholesky factor U of the inverse of the damped Gram matrix,
H^-1 = U^T U.

Text of a feature of units reads the sums of the matrix that reads what units hand on, cut by units
(`scoring/unit_features.py`): [units, width] of a sum [in], where a unit has `width` channels, and
[units, width, width] of `gram`, `inverse` and `centred_inverse`; that matrix itself as `reader`
[units, width, out]; and what a unit costs, `parameters`, `flops`, `kv_bytes` and `milliseconds`,
the `slope` of its place, and its `noise`, [units] each. Of a part of the depth sums, costs and
noise are of one unit, [1] each.

Text of a feature of experts reads sums of what a router and its experts do to tokens, [experts]
first, and a channel for each beside mask gradients; their weights `up` [experts, 2 * intermediate,
hidden], `down` [experts, hidden, intermediate] and `router` [experts, hidden]; and `parameters` and
`noise`, [experts] each.

While low-rank factors train, beside `weight` stand `factor_a` [rank, in] and `factor_b`
[out, rank], the gradients of a step's mean loss `gradient_a` and `gradient_b`, the `change` of the
weight [out, in] that the factors make, and `eta`, a number of the schedule. Where units go in
periods of a training, of a group are known the `UNIT_TERMS` [units], see `recovery/saliency.py`.

Text of a feature of an attention reads what one layer saw of a text so far, `OF_ATTENTION`; shapes
and meanings stand in `models/attending/observing.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import sympy

# What a feature costs, cheapest first: nothing, a forward pass, a backward pass, a matrix inverse,
# attention between all pairs of tokens, a forward pass for each unit or of tokens yet to come.
SIGNALS = ("none", "activations", "gradients", "second order", "full map", "oracle")
# What formulas of single weights may look at.
WEIGHT_SIGNALS = SIGNALS[:4]
# What saves no work where it is looked at: such a choice is a simulation.
SIMULATED_SIGNALS = SIGNALS[4:]
# What a text may read that is known only while low-rank factors train.
OF_FACTORS = ("factor_a", "factor_b", "gradient_a", "gradient_b", "change", "eta")
# What one of units may read that is known only where they go in periods of a training.
UNIT_TERMS = ("unit_norm", "unit_mean", "unit_cosine", "unit_first", "unit_second")
# By the word of a recipe's `schedule` under which it is known.
OF_TRAINING = {"while_training": OF_FACTORS, "periods": UNIT_TERMS}
# What a text may read of an attention while the model runs.
OF_ATTENTION = (
    *("keys", "values", "output_norms", "ages", "positions", "column_noise"),
    *("window_attention", "last_attention", "attention_sum", "attention_max", "next_attention"),
    *("reread_attention", "streaming_error"),
    *("query_mean", "query_covariance", "key_lag", "value_lag"),
    *("logits", "attention", "distances", "page_bounds", "block_products"),
)
# What a text may read that is no sum, and the sums that it is made from.
MADE_FROM: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("weight", "reader", "tokens", "sequences", "noise"), ()),
    **dict.fromkeys(("parameters", "flops", "kv_bytes", "milliseconds"), ()),
    **dict.fromkeys(OF_FACTORS + UNIT_TERMS, ()),
    **dict.fromkeys(("up", "down", "router"), ()),
    **dict.fromkeys(OF_ATTENTION, ()),
    # what the distance is measured by: M2 and a refit
    "slope": ("gram", "input_sum", "mask_gradients"),
    "upper": ("gram",),
    "inverse": ("gram",),
    "centred_inverse": ("gram", "input_sum"),
}
# How a value of each shape is laid along the matrix [out, in].
_PLACED = {"element": "", "row": "[:, None]", "column": "[None]"}


def costliest(signals: Iterable[str]) -> str:
    """The one of them that costs most."""
    return max(signals, key=SIGNALS.index, default=SIGNALS[0])


@dataclass(frozen=True)
class Feature:
    """One word that a formula may use for a property of the weights."""

    name: str
    # "element" [out, in], "row" [out, 1], "column" [1, in] (see functions.py)
    shape: str
    # what it measures, in one line
    meaning: str
    latex: str
    # physical unit: powers of weight (w), activation (x), output (y) and loss (L)
    unit: str
    # the value in torch, of any float dtype: [out, in], [out] or [in]
    torch: str
    # what has to be looked at, one of SIGNALS
    cost: str = "none"
    # whether it is never negative
    nonnegative: bool = True
    # of which tables: "matrix" is the weight of a linear map, "unit" a row for each unit, "block"
    # one number for each part of the depth, "expert" one for each expert of a mixture,
    # "kv_column" and "link" queries and keys of an attention
    domains: tuple[str, ...] = ("matrix",)
    # words of a recipe's `unit` that alone have it; empty: all whose matrices are of these domains
    kinds: tuple[str, ...] = ()

    @property
    def symbol(self) -> sympy.Symbol:
        """The SymPy symbol; equal for equal names."""
        return _symbol(self.name, nonnegative=self.nonnegative)

    @property
    def line(self) -> str:
        """The torch text of what formulas see: float32, broadcastable to [out, in]."""
        return f"{self.torch}{_PLACED[self.shape]}.float()"

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The names that the torch text reads."""
        return names_in(self.torch)

    @property
    def schedule(self) -> str:
        """The word of a recipe's `schedule` that it needs; nothing where any will do."""
        needed = (word for word, names in OF_TRAINING.items() if set(names) & set(self.inputs))
        return next(needed, "")

    @property
    def of_training(self) -> bool:
        """Whether it is known only in a training in which units go."""
        return bool(self.schedule)

    @property
    def of_attention(self) -> bool:
        """Whether it is known only of an attention, while the model runs."""
        return not set(self.inputs).isdisjoint(OF_ATTENTION)

    @property
    def sums(self) -> tuple[str, ...]:
        """The raw sums over calibration text that it is made from."""
        return tuple(sorted({sum for name in self.inputs for sum in MADE_FROM.get(name, (name,))}))


def names_in(text: str) -> tuple[str, ...]:
    """The names that torch text reads, torch itself aside, in the order of the alphabet."""
    nodes = ast.walk(ast.parse(text, mode="eval"))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return tuple(sorted(names - {"torch"}))


def _symbol(name: str, *, nonnegative: bool) -> sympy.Symbol:
    assumptions = {"nonnegative": True} if nonnegative else {"real": True}
    return sympy.Symbol(name, **assumptions)
