"""The SymPy functions that SymPy itself lacks: of a whole matrix, and those that others add.

They carry what SymPy needs to simplify around them (they are real, some never negative) and one
identity of their own: reducing a value along an axis on which it does not vary changes nothing.

A weight is `[out, in]`: one row per output neuron, one column per input channel. A value is stored
with as few entries as it has, and broadcasts to the weight:

    element [out, in]     row [out, 1]     column [1, in]     scalar [1, 1]
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy

from prunezero.formula.features import FEATURES

# Each shape as (varies from row to row, varies from column to column).
AXES: dict[str, tuple[bool, bool]] = {
    "element": (True, True),
    "row": (True, False),
    "column": (False, True),
    "scalar": (False, False),
}
SHAPES = {axes: shape for shape, axes in AXES.items()}
# What a reduction leaves: one number per row, per column, or per matrix.
LEAVES = {"row": AXES["row"], "col": AXES["column"], "matrix": AXES["scalar"]}
KINDS = ("sum", "mean", "max", "norm")


class _RealFunction(sympy.Function):  # type: ignore[misc, unused-ignore]
    """A function of one expression that bears the name of its operator, and has a real value."""

    nargs = 1
    is_real = True
    never_negative = False
    # whether it is never negative where its argument is not
    keeps_sign = False

    def _eval_is_nonnegative(self) -> bool | None:
        if self.never_negative or (self.keeps_sign and self.args[0].is_nonnegative):
            return True
        return None

    def _sympystr(self, printer: Any) -> str:
        # SymPy would take a function called `set` or `int` for such a thing.
        return f"{type(self).__name__}({printer._print(self.args[0])})"


class MatrixFunction(_RealFunction):
    """A function of a whole matrix; a reduction `leaves` a shape, a scaling keeps the shape."""

    leaves: tuple[bool, bool] | None = None


class Elementwise(_RealFunction):
    """A function of each value by itself that another package adds; only its sign is known."""


# Functions whose nodes bear the name of their operator.
NAMED = (MatrixFunction, Elementwise, sympy.log, sympy.tanh)


def _function(kind: type[Any], name: str, **fields: object) -> type[Any]:
    return type(name, (kind,), {"__module__": __name__, "nargs": 1, **fields})


def elementwise_function(name: str, sign: str) -> type[Elementwise]:
    """The function of that name; `sign` is what an `Operator` says of it."""
    return _function(
        Elementwise,
        name,
        never_negative=sign == "nonnegative",
        keeps_sign=sign == "as argument",
    )


REDUCTIONS: dict[str, type[MatrixFunction]] = {
    f"{left}_{kind}": _function(
        MatrixFunction,
        f"{left}_{kind}",
        leaves=leaves,
        never_negative=kind == "norm",
        keeps_sign=True,
    )
    for left, leaves in LEAVES.items()
    for kind in KINDS
}
# To 0..1 by the smallest and largest entry; 0 everywhere if those are equal.
MINMAX = _function(MatrixFunction, "minmax", never_negative=True)
# To mean 0 and standard deviation 1; 0 everywhere if the matrix is constant.
ZSCORE = _function(MatrixFunction, "zscore")


def stand_in(expression: sympy.Basic, place: int, *, nonnegative: bool) -> sympy.Symbol:
    """A symbol of the shape and sign of an expression, to build with what may be large."""
    sign = {"nonnegative": True} if nonnegative else {"real": True}
    return sympy.Symbol(f"{shape_of(expression)} {place}", **sign)


def reduces_nothing(function: type[MatrixFunction], argument: sympy.Basic) -> bool:
    """Whether a value does not vary along the axes that a reduction takes away."""
    shape = shape_of(argument)
    return function.leaves is not None and _reduced(shape, function.leaves) == shape


@lru_cache(maxsize=4096)
def shape_of(expression: sympy.Basic) -> str:
    """The shape of a formula, from the shapes of its features."""
    if isinstance(expression, sympy.Symbol):
        name = expression.name
        return FEATURES[name].shape if name in FEATURES else name.split()[0]
    shapes = [AXES[shape_of(argument)] for argument in expression.args]
    shape = SHAPES[any(row for row, _ in shapes), any(column for _, column in shapes)]
    if isinstance(expression, MatrixFunction) and expression.leaves is not None:
        return _reduced(shape, expression.leaves)
    return shape


def _reduced(shape: str, leaves: tuple[bool, bool]) -> str:
    row, column = AXES[shape]
    return SHAPES[row and leaves[0], column and leaves[1]]
