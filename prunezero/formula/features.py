"""What a formula may look at: one row per feature of a weight matrix.

Notation: the weight is `W [out, in]`, `x` an input vector of its layer, `y = W x` the output, and
`g` the gradient of one calibration sequence's mean token cross-entropy with respect to `W`. A
feature that needs calibration text names the raw sums it is made from; `scoring/statistics.py`
collects just those.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy

# What a feature costs, cheapest first: nothing, a forward pass, a backward pass, a matrix inverse.
SIGNALS = ("none", "activations", "gradients", "second order")


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
    # whether it is never negative
    nonnegative: bool = True
    # one of SIGNALS
    signal: str = "none"
    # raw sums over calibration text, by their names in `scoring/statistics.py`
    sums: tuple[str, ...] = ()

    @property
    def symbol(self) -> sympy.Symbol:
        """The SymPy symbol; equal for equal names."""
        return _symbol(self.name, nonnegative=self.nonnegative)


def _symbol(name: str, *, nonnegative: bool) -> sympy.Symbol:
    assumptions = {"nonnegative": True} if nonnegative else {"real": True}
    return sympy.Symbol(name, **assumptions)


_INPUT_SQUARES = ("input_square_sum",)


def _second_order(name: str, meaning: str, latex: str, unit: str) -> Feature:
    """A diagonal of the Gram matrix H of the layer's inputs, or of what follows from it."""
    return Feature(name, "column", meaning, latex, unit, signal="second order", sums=("gram",))


_ROWS = (
    Feature("W", "element", "the weight itself, signed", "W", "w", nonnegative=False),
    Feature("R1", "row", "sum of |W| over a row", r"\lVert W_{i:}\rVert_1", "w"),
    Feature("C1", "column", "sum of |W| over a column", r"\lVert W_{:j}\rVert_1", "w"),
    Feature("R2", "row", "L2 norm of a row of W", r"\lVert W_{i:}\rVert_2", "w"),
    Feature("C2", "column", "L2 norm of a column of W", r"\lVert W_{:j}\rVert_2", "w"),
    Feature(
        "X",
        "column",
        "L2 norm of an input channel: root of (sum over tokens of x^2, per sequence)",
        r"\lVert X_j\rVert_2",
        "x",
        signal="activations",
        sums=_INPUT_SQUARES,
    ),
    Feature(
        "X_ms",
        "column",
        "mean square of an input channel over tokens",
        r"\overline{x_j^2}",
        "x^2",
        signal="activations",
        sums=_INPUT_SQUARES,
    ),
    Feature(
        "X_rms",
        "column",
        "root of the mean square of an input channel over tokens",
        r"\operatorname{rms}(x_j)",
        "x",
        signal="activations",
        sums=_INPUT_SQUARES,
    ),
    Feature(
        "X_mean",
        "column",
        "mean of an input channel over tokens, signed",
        r"\overline{x_j}",
        "x",
        nonnegative=False,
        signal="activations",
        sums=("input_sum",),
    ),
    Feature(
        "X_var",
        "column",
        "variance of an input channel over tokens",
        r"\operatorname{var}(x_j)",
        "x^2",
        signal="activations",
        sums=("input_sum", "input_square_sum"),
    ),
    Feature(
        "Y",
        "row",
        "L2 norm of an output channel: root of (sum over tokens of y^2, per sequence)",
        r"\lVert Y_i\rVert_2",
        "y",
        signal="activations",
        sums=("output_square_sum",),
    ),
    Feature(
        "G",
        "element",
        "root of the sum over sequences of g^2",
        r"\lVert g_{ij}\rVert_2",
        "L/w",
        signal="gradients",
        sums=("gradient_square_sum",),
    ),
    Feature(
        "G1",
        "element",
        "sum over sequences of |g|",
        r"\lVert g_{ij}\rVert_1",
        "L/w",
        signal="gradients",
        sums=("gradient_absolute_sum",),
    ),
    Feature(
        "F",
        "element",
        "root of the sum over tokens of (x_j dL/dy_i)^2: the Fisher diagonal, token by token",
        r"\lVert x_j\,\delta_i\rVert_2",
        "L/w",
        signal="gradients",
        sums=("token_gradient_square_sum",),
    ),
    Feature(
        "D",
        "row",
        "root mean square over tokens of the loss gradient at the output",
        r"\operatorname{rms}(\delta_i)",
        "L/y",
        signal="gradients",
        sums=("output_gradient_square_sum",),
    ),
    _second_order("H", "diagonal of the Gram matrix, per sequence", "H_{jj}", "x^2"),
    _second_order("V", "diagonal of the inverse Gram matrix, damped", "[H^{-1}]_{jj}", "x^-2"),
    _second_order("U", "diagonal of the upper Cholesky factor of the inverse", "U_{jj}", "x^-1"),
)

FEATURES: dict[str, Feature] = {row.name: row for row in _ROWS}
