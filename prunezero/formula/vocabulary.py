"""What a formula may do: one row per operator, and the features beside them.

A row says how a word is built in SymPy, how its value is computed in torch and in Triton, and how
it is typeset. The parser, the evaluator, the exported pruner, the kernels, `prunezero list` and the
tests all read these rows; nothing else knows an operator. Other packages add theirs (`plugins.py`).

Values are real and float32. Where mathematics would refuse, a score must still be finite:

- `x / 0` is 0: a dead input channel or an empty row gets the score 0, and is removed first;
- `sqrt`, `log` and powers with a fraction see `|x|`; `log` sees at least 1e-12;
- `exp` sees at most 80, the last whole number whose exponential float32 holds with room to spare;
- sums, means and norms accumulate in float64, so that their order does not matter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import sympy

from prunezero.formula import algebra
from prunezero.formula.feature_row import SIGNALS, Feature
from prunezero.formula.features import FEATURES
from prunezero.formula.functions import MINMAX, REDUCTIONS, ZSCORE
from prunezero.formula.operators import Operator, elementwise
from prunezero.formula.plugins import Vocabulary

__all__ = ["FEATURES", "OPERATORS", "SIGNALS", "Feature", "Operator", "elementwise"]


def _square(x: Any) -> Any:
    return algebra.power(x, sympy.Integer(2))


def _square_root(x: Any) -> Any:
    return algebra.power(x, sympy.Rational(1, 2))


def _divide(x: Any, y: Any) -> Any:
    return algebra.multiply(x, algebra.power(y, sympy.Integer(-1)))


def _divide_by_norm(x: Any, y: Any) -> Any:
    return _divide(x, algebra.applied(REDUCTIONS["matrix_norm"], y))


def _identity(x: Any) -> Any:
    return x


def _subtract(x: Any, y: Any) -> Any:
    return algebra.add(x, algebra.negated(y))


_ARITHMETIC = (
    Operator("add", 2, "x + y", "sum", algebra.add, "{0} + {1}", "{0} + {1}"),
    Operator("sub", 2, "x - y", "difference", _subtract, "{0} - {1}", "{0} - {1}"),
    Operator("mul", 2, "x * y", "product", algebra.multiply, "{0} * {1}", "{0} * {1}"),
    Operator(
        "div",
        2,
        "x / y",
        "quotient, elementwise; 0 where y is 0",
        _divide,
        # By infinity instead of by 0; where y is one row or column, that is quick to write.
        "{0} / torch.where({1} == 0, torch.inf, {1})",
        'tl.div_rn({0}, tl.where({1} == 0, float("inf"), {1}))',
    ),
    Operator(
        "power",
        2,
        "x ** 0.5",
        "power with a constant; |x| where the exponent is no whole number",
        algebra.power,
        "torch.pow({0}, {1})",
        "tl.exp({1} * tl.log({0}))",
        sign="nonnegative",
    ),
)

# The series near 0, where the quotient would cancel; both are good to one part in a million.
_TANH = (
    "tl.where(tl.abs({0}) < 0.1, "
    "{0} * (1.0 - {0} * {0} * (0.33333334 - {0} * {0} * (0.13333333 - {0} * {0} * 0.053968254))), "
    "2.0 / (1.0 + tl.exp(tl.maximum(-2.0 * {0}, -80.0))) - 1.0)"
)

_ELEMENTWISE = (
    Operator("neg", 1, "-x", "negative", algebra.negated, "-{0}", "-{0}"),
    Operator(
        "abs",
        1,
        "abs(x)",
        "absolute value",
        algebra.absolute,
        "torch.abs({0})",
        "tl.abs({0})",
        sign="nonnegative",
    ),
    Operator(
        "sqr",
        1,
        "sqr(x)",
        "square",
        _square,
        "torch.square({0})",
        "{0} * {0}",
        sign="nonnegative",
    ),
    Operator(
        "sqrt",
        1,
        "sqrt(x)",
        "square root of |x|",
        _square_root,
        "torch.sqrt({0})",
        "tl.sqrt_rn({0})",
        sign="nonnegative",
    ),
    Operator(
        "log",
        1,
        "log(x)",
        "natural logarithm of |x|, of at least 1e-12",
        algebra.logarithm,
        "torch.log(torch.clamp({0}, min=1e-12))",
        "tl.log(tl.maximum({0}, 1e-12))",
    ),
    Operator(
        "exp",
        1,
        "exp(x)",
        "exponential of at most 80",
        algebra.exponential,
        "torch.exp(torch.clamp({0}, max=80.0))",
        "tl.exp(tl.minimum({0}, 80.0))",
        sign="nonnegative",
    ),
    Operator(
        "tanh",
        1,
        "tanh(x)",
        "hyperbolic tangent",
        algebra.hyperbolic_tangent,
        "torch.tanh({0})",
        _TANH,
        sign="as argument",
    ),
    Operator("skip", 1, "skip(x)", "the value itself", _identity, sign="as argument"),
)

_SUMMED = {
    "sum": "{0}.sum({dims}, keepdim=True, dtype=torch.float64).float()",
    "mean": "{0}.mean({dims}, keepdim=True, dtype=torch.float64).float()",
    "max": "{0}.amax({dims}, keepdim=True)",
    "norm": "torch.linalg.vector_norm({0}, dim={dims}, keepdim=True, dtype=torch.float64).float()",
}
# From the end, so that layers of one shape may be stacked.
_DIMS = {"row": "(-1,)", "col": "(-2,)", "matrix": "(-2, -1)"}
_LEFT = {"row": "every row", "col": "every column", "matrix": "the whole matrix"}


def _reduction(name: str) -> Operator:
    left, kind = name.split("_")
    return Operator(
        name,
        1,
        f"{name}(x)",
        f"{'L2 norm' if kind == 'norm' else kind} of {_LEFT[left]}",
        partial(algebra.applied, REDUCTIONS[name]),
        _SUMMED[kind].replace("{dims}", _DIMS[left]),
        sign="nonnegative" if kind == "norm" else "as argument",
    )


_WHOLE_MATRIX = (
    *(_reduction(name) for name in REDUCTIONS),
    Operator(
        "minmax",
        1,
        "minmax(x)",
        "scaled to 0..1 by the layer's smallest and largest value",
        partial(algebra.applied, MINMAX),
        "({0} - {0}.amin((-2, -1), keepdim=True)) / torch.where("
        "{0}.amax((-2, -1), keepdim=True) == {0}.amin((-2, -1), keepdim=True), torch.inf, "
        "{0}.amax((-2, -1), keepdim=True) - {0}.amin((-2, -1), keepdim=True))",
        sign="nonnegative",
    ),
    Operator(
        "zscore",
        1,
        "zscore(x)",
        "scaled to mean 0 and standard deviation 1 over the layer",
        partial(algebra.applied, ZSCORE),
        "({0} - {0}.mean((-2, -1), keepdim=True, dtype=torch.float64).float()) / torch.where("
        "{0}.amax((-2, -1), keepdim=True) == {0}.amin((-2, -1), keepdim=True), torch.inf, "
        "{0}.double().std((-2, -1), correction=0, keepdim=True).float())",
    ),
    Operator(
        "divide_by_norm",
        2,
        "divide_by_norm(x, y)",
        "x divided by the L2 norm of the whole of y: what Pruner-Zero's code calls div",
        _divide_by_norm,
    ),
)

OPERATORS = Vocabulary({row.name: row for row in (*_ARITHMETIC, *_ELEMENTWISE, *_WHOLE_MATRIX)})

# Words of formulas that were saved before: a layer, in this field, is a block.
_OLDER = {f"layer_{kind}": f"matrix_{kind}" for kind in _SUMMED}


def current_word(word: str) -> str:
    """The word that an operator has now; other words stay as they are."""
    return _OLDER.get(word, word)
