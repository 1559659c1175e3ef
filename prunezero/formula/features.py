"""What a formula may look at: one row per feature of a weight matrix, or of units that may go.

Notation: the weight is `W [out, in]`, `x` an input vector of its layer, `y = W x` the output, and
`g` the gradient of one calibration sequence's mean token cross-entropy with respect to `W`. On
units `W` is a member turned so that its rows are units, and `x` what the consumer reads of each.

A row holds all that is known of a feature. The engine, its kernels and exported pages run the torch
text of its value as it stands. What the text may read: `weight`; raw sums over calibration text, by
their names in `scoring/statistics.py`, which collects just those; how many `tokens` and `sequences`
they are of; and, alone, `upper`, the Cholesky factor U of the inverse of the damped Gram matrix,
H^-1 = U^T U.

Text of a feature of units reads the sums of the matrix that reads what units hand on, cut by units
(`scoring/unit_features.py`): [units, width] of a sum [in], where a unit has `width` channels, and
[units, width, width] of `gram`, `inverse` and `centred_inverse`; that matrix itself as `reader`
[units, width, out]; and what a unit costs, `parameters`, `flops` and `kv_bytes`, [units] each.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import sympy

# What a feature costs, cheapest first: nothing, a forward pass, a backward pass, a matrix inverse.
SIGNALS = ("none", "activations", "gradients", "second order")
# What a text may read that is no sum, and the sums that it is made from.
MADE_FROM: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("weight", "reader", "tokens", "sequences", "noise"), ()),
    **dict.fromkeys(("parameters", "flops", "kv_bytes"), ()),
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
    # of which tables: "matrix" is the weight of a linear map, "unit" a row for each unit
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


_ROWS = (
    Feature(
        "W",
        "element",
        "the weight itself, signed",
        "W",
        "w",
        "weight",
        nonnegative=False,
        domains=("matrix", "unit"),
    ),
    Feature(
        "R1",
        "row",
        "sum of |W| over a row",
        r"\lVert W_{i:}\rVert_1",
        "w",
        "weight.abs().sum(1, dtype=torch.float64)",
    ),
    Feature(
        "C1",
        "column",
        "sum of |W| over a column",
        r"\lVert W_{:j}\rVert_1",
        "w",
        "weight.abs().sum(0, dtype=torch.float64)",
    ),
    Feature(
        "R2",
        "row",
        "L2 norm of a row of W",
        r"\lVert W_{i:}\rVert_2",
        "w",
        "torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)",
    ),
    Feature(
        "C2",
        "column",
        "L2 norm of a column of W",
        r"\lVert W_{:j}\rVert_2",
        "w",
        "torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64)",
    ),
    # Wanda's norm, which grows with the sequence length.
    Feature(
        "X",
        "column",
        "L2 norm of an input channel: root of (sum over tokens of x^2, per sequence)",
        r"\lVert X_j\rVert_2",
        "x",
        "(input_square_sum / sequences).sqrt()",
        "activations",
    ),
    Feature(
        "X_ms",
        "column",
        "mean square of an input channel over tokens",
        r"\overline{x_j^2}",
        "x^2",
        "(input_square_sum / tokens)",
        "activations",
    ),
    Feature(
        "X_rms",
        "column",
        "root of the mean square of an input channel over tokens",
        r"\operatorname{rms}(x_j)",
        "x",
        "(input_square_sum / tokens).sqrt()",
        "activations",
    ),
    Feature(
        "X_mean",
        "column",
        "mean of an input channel over tokens, signed",
        r"\overline{x_j}",
        "x",
        "(input_sum / tokens)",
        "activations",
        nonnegative=False,
    ),
    # Rounding may leave a constant channel a little below zero.
    Feature(
        "X_var",
        "column",
        "variance of an input channel over tokens",
        r"\operatorname{var}(x_j)",
        "x^2",
        "(input_square_sum / tokens - (input_sum / tokens).square()).clamp(min=0.0)",
        "activations",
    ),
    Feature(
        "Y",
        "row",
        "L2 norm of an output channel: root of (sum over tokens of y^2, per sequence)",
        r"\lVert Y_i\rVert_2",
        "y",
        "(output_square_sum / sequences).sqrt()",
        "activations",
    ),
    Feature(
        "G",
        "element",
        "root of the sum over sequences of g^2",
        r"\lVert g_{ij}\rVert_2",
        "L/w",
        "gradient_square_sum.sqrt()",
        "gradients",
        domains=("matrix", "unit"),
    ),
    Feature(
        "G1",
        "element",
        "sum over sequences of |g|",
        r"\lVert g_{ij}\rVert_1",
        "L/w",
        "gradient_absolute_sum",
        "gradients",
        domains=("matrix", "unit"),
    ),
    Feature(
        "S",
        "element",
        "sum over sequences of g, signed",
        r"\textstyle\sum g_{ij}",
        "L/w",
        "gradient_sum",
        "gradients",
        nonnegative=False,
        domains=("matrix", "unit"),
    ),
    Feature(
        "F",
        "element",
        "root of the sum over tokens of (x_j dL/dy_i)^2: the Fisher diagonal, token by token",
        r"\lVert x_j\,\delta_i\rVert_2",
        "L/w",
        "token_gradient_square_sum.sqrt()",
        "gradients",
        domains=("matrix", "unit"),
    ),
    Feature(
        "D",
        "row",
        "root mean square over tokens of the loss gradient at the output",
        r"\operatorname{rms}(\delta_i)",
        "L/y",
        "(output_gradient_square_sum / tokens).sqrt()",
        "gradients",
    ),
    Feature(
        "H",
        "column",
        "diagonal of the Gram matrix, per sequence",
        "H_{jj}",
        "x^2",
        "(gram.diagonal() / sequences)",
        "second order",
    ),
    Feature(
        "V",
        "column",
        "diagonal of the inverse Gram matrix, damped",
        "[H^{-1}]_{jj}",
        "x^-2",
        "upper.square().sum(0)",
        "second order",
    ),
    Feature(
        "U",
        "column",
        "diagonal of the upper Cholesky factor of the inverse",
        "U_{jj}",
        "x^-1",
        "upper.diagonal()",
        "second order",
    ),
    # What a unit hands on are input channels of its reader: X, X_mean and X_var of those.
    Feature(
        "A",
        "row",
        "L2 norm of a unit's activation: root of (sum over tokens of x^2, per sequence)",
        r"\lVert A_u\rVert_2",
        "x",
        "(input_square_sum / sequences).sum(1).sqrt()",
        "activations",
        domains=("unit",),
    ),
    Feature(
        "A_mean",
        "row",
        "mean of a unit's activation over tokens, signed; of several channels the sum",
        r"\overline{A_u}",
        "x",
        "(input_sum / tokens).sum(1)",
        "activations",
        nonnegative=False,
        domains=("unit",),
    ),
    Feature(
        "A_var",
        "row",
        "variance of a unit's activation over tokens; of several channels the sum",
        r"\operatorname{var}(A_u)",
        "x^2",
        "(input_square_sum / tokens - (input_sum / tokens).square()).clamp(min=0.0).sum(1)",
        "activations",
        domains=("unit",),
    ),
    Feature(
        "A1",
        "row",
        "mean magnitude of a unit's activation over tokens; of several channels their L2 norm",
        r"\overline{|A_u|}",
        "x",
        "input_magnitudes.mean(0).square().sum(1).sqrt()",
        "activations",
        domains=("unit",),
    ),
    Feature(
        "A2",
        "row",
        "L2 norm over sequences of the mean magnitude of a unit's activation",
        r"\lVert\overline{|A_u|}\rVert_2",
        "x",
        "input_magnitudes.square().sum((0, 2)).sqrt()",
        "activations",
        domains=("unit",),
    ),
    # The mask gradient of a sequence is dLoss/dmask, of a factor on what the unit hands on.
    Feature(
        "M",
        "row",
        "sum over sequences of a unit's mask gradient, signed",
        r"\textstyle\sum m_u",
        "L",
        "mask_gradients.sum((0, 2))",
        "gradients",
        nonnegative=False,
        domains=("unit",),
    ),
    Feature(
        "M1",
        "row",
        "sum over sequences of |mask gradient|",
        r"\lVert m_u\rVert_1",
        "L",
        "mask_gradients.sum(2).abs().sum(0)",
        "gradients",
        domains=("unit",),
    ),
    Feature(
        "M2",
        "row",
        "sum over sequences of (mask gradient)^2: the Fisher diagonal of the mask",
        r"\lVert m_u\rVert_2^2",
        "L^2",
        "mask_gradients.sum(2).square().sum(0)",
        "gradients",
        domains=("unit",),
    ),
    # By how much the square of the reader's outputs changes, summed over tokens, per sequence.
    Feature(
        "L00",
        "row",
        "output lost with a unit, squared: nothing makes up for it",
        r"\mathcal{L}_u",
        "y^2",
        "((reader * (gram @ reader)).sum((1, 2)) / sequences)",
        "second order",
        domains=("unit",),
    ),
    Feature(
        "L0b",
        "row",
        "output lost with a unit, squared, once a bias holds its mean",
        r"\mathcal{L}_u^{b}",
        "y^2",
        "(((reader * (gram @ reader)).sum((1, 2))"
        " - (reader * input_sum[..., None]).sum(1).square().sum(1) / tokens)"
        ".clamp(min=0.0) / sequences)",
        "second order",
        domains=("unit",),
    ),
    Feature(
        "Lr0",
        "row",
        "output lost with a unit, squared, once the columns that stay are refitted",
        r"\mathcal{L}_u^{r}",
        "y^2",
        "(reader * torch.linalg.solve(inverse, reader)).sum((1, 2))",
        "second order",
        domains=("unit",),
    ),
    Feature(
        "Lrb",
        "row",
        "output lost with a unit, squared, once columns that stay and a bias are refitted",
        r"\mathcal{L}_u^{rb}",
        "y^2",
        "(reader * torch.linalg.solve(centred_inverse, reader)).sum((1, 2))",
        "second order",
        domains=("unit",),
    ),
    Feature(
        "PARAMS",
        "row",
        "parameters that go with a unit",
        r"n_u",
        "1",
        "parameters",
        domains=("unit",),
    ),
    Feature(
        "FLOPS",
        "row",
        "multiplications and additions for each token that go with a unit",
        r"f_u",
        "1",
        "flops",
        domains=("unit",),
    ),
    Feature(
        "KV_BYTES",
        "row",
        "bytes of keys and values for each token that go with a unit",
        r"b_u",
        "1",
        "kv_bytes",
        domains=("unit",),
    ),
    Feature(
        "RND",
        "row",
        "a random number between 0 and 1, the same in every run",
        r"\xi_u",
        "1",
        "noise",
        domains=("unit",),
    ),
)

FEATURES: dict[str, Feature] = {row.name: row for row in _ROWS}


def features_of_domain(name: str) -> tuple[str, ...]:
    """Names of the features that say something of a table, in the order of the vocabulary."""
    return tuple(row.name for row in _ROWS if name in row.domains)
