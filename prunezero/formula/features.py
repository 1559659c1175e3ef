"""What a formula may look at: one row per feature of a weight matrix, or of units that may go.

Notation: the weight is `W [out, in]`, `x` an input vector of its layer, `y = W x` the output, and
`g` the gradient of one calibration sequence's mean token cross-entropy with respect to `W`. On
units `W` is a member turned so that its rows are units, and `x` what the consumer reads of each. Of
parts of the depth (an attention, an MLP, a layer) `h` is the residual stream before one, and `f(h)`
what it adds.

A row holds all that is known of a feature. The engine, its kernels and exported pages run the torch
text of its value as it stands. What the text may read: `weight`; raw sums over calibration text, by
their names in `scoring/statistics.py`, which collects just those; how many `tokens` and `sequences`
they are of; of parts of the depth what one costs and its `noise`; and, alone, `upper`, the Cholesky
factor U of the inverse of the damped Gram matrix, H^-1 = U^T U.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import sympy

# What a feature costs, cheapest first: nothing, a forward pass, a backward pass, a matrix inverse,
# a forward pass for each unit.
SIGNALS = ("none", "activations", "gradients", "second order", "oracle")
# What formulas of single weights may look at.
WEIGHT_SIGNALS = SIGNALS[:-1]
# Names that the text of a feature reads and that are no sums.
_GIVEN = frozenset({"weight", "tokens", "sequences", "parameters", "flops", "noise"})
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
    # one number for each part of the depth
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
        if "upper" in self.inputs:
            return ("gram",)
        return tuple(sorted({*self.inputs} - _GIVEN))


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
    ),
    Feature(
        "G1",
        "element",
        "sum over sequences of |g|",
        r"\lVert g_{ij}\rVert_1",
        "L/w",
        "gradient_absolute_sum",
        "gradients",
    ),
    Feature(
        "F",
        "element",
        "root of the sum over tokens of (x_j dL/dy_i)^2: the Fisher diagonal, token by token",
        r"\lVert x_j\,\delta_i\rVert_2",
        "L/w",
        "token_gradient_square_sum.sqrt()",
        "gradients",
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
    # What a unit hands on is an input channel of its consumer: X, X_mean and X_var of that.
    Feature(
        "A",
        "row",
        "L2 norm of a unit's activation: root of (sum over tokens of x^2, per sequence)",
        r"\lVert A_u\rVert_2",
        "x",
        "(input_square_sum / sequences).sqrt()",
        "activations",
        domains=("unit",),
    ),
    Feature(
        "A_mean",
        "row",
        "mean of a unit's activation over tokens, signed",
        r"\overline{A_u}",
        "x",
        "(input_sum / tokens)",
        "activations",
        nonnegative=False,
        domains=("unit",),
    ),
    Feature(
        "A_var",
        "row",
        "variance of a unit's activation over tokens",
        r"\operatorname{var}(A_u)",
        "x^2",
        "(input_square_sum / tokens - (input_sum / tokens).square()).clamp(min=0.0)",
        "activations",
        domains=("unit",),
    ),
    # Rounding may take a cosine a little above one.
    Feature(
        "BI",
        "row",
        "block influence: 1 - mean over tokens of the cosine of the stream before and behind",
        r"1-\overline{\cos(h,h+f(h))}",
        "1",
        "(1.0 - cosine_sum / tokens).clamp(min=0.0)",
        "activations",
        domains=("block",),
    ),
    Feature(
        "ANG",
        "row",
        "angle between the stream before and behind at the last token, as a part of a half turn",
        r"\tfrac{1}{\pi}\overline{\arccos\cos(h_T,(h+f(h))_T)}",
        "1",
        "(last_angle_sum / sequences / torch.pi)",
        "activations",
        domains=("block",),
    ),
    Feature(
        "REL",
        "row",
        "mean over tokens of the size of what is added, relative to the stream before",
        r"\overline{\lVert f(h)\rVert/\lVert h\rVert}",
        "1",
        "(relative_sum / tokens)",
        "activations",
        domains=("block",),
    ),
    Feature(
        "NLL",
        "row",
        "nats per predicted token of the calibration text, without it",
        r"\mathcal{L}_{\setminus f}",
        "L",
        "(loss_without_sum / sequences)",
        "oracle",
        domains=("block",),
    ),
    Feature(
        "KL",
        "row",
        "nats per predicted token from the dense model's answers to those without it",
        r"\mathrm{KL}_{\setminus f}",
        "L",
        "(divergence_without_sum / sequences).clamp(min=0.0)",
        "oracle",
        domains=("block",),
    ),
    Feature(
        "PARAMS",
        "row",
        "how many parameters go with it, its norms among them",
        r"P",
        "1",
        "parameters",
        domains=("block",),
    ),
    Feature(
        "FLOPS",
        "row",
        "multiplications and additions by its weights, for each token",
        r"F",
        "1",
        "flops",
        domains=("block",),
    ),
    Feature(
        "RND",
        "row",
        "a number from 0 to 1 that its name and the seed decide, and nothing else",
        r"u",
        "1",
        "noise",
        domains=("block",),
    ),
)

FEATURES: dict[str, Feature] = {row.name: row for row in _ROWS}


def features_of_domain(name: str) -> tuple[str, ...]:
    """Names of the features that say something of a table, in the order of the vocabulary."""
    return tuple(row.name for row in _ROWS if name in row.domains)
