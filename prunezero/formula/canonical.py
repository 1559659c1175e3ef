"""One expression for each formula: what is printed, hashed and executed is the same tree.

SymPy rewrites as it builds (`W/W` becomes 1, `sqrt(W**2)` becomes `|W|`). We let it, and then keep
only the result: an expression is rebuilt from its leaves until it no longer changes. Numbers are
rationals, so that no rounding depends on the order of rewriting; a sub-formula without features is
folded in floats and never reaches SymPy, where `exp(exp(9**9))` would not come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy

from prunezero.errors import CriterionError, did_you_mean
from prunezero.formula.features import FEATURES
from prunezero.formula.functions import NAMED
from prunezero.formula.vocabulary import OPERATORS, Operator

MAX_CONSTANT = 1e6
MIN_CONSTANT = 1e-12
MAX_EXPONENT = 8
# A rational with larger parts than this is rounded to twelve significant digits.
_MAX_FRACTION_PART = 10**6
# The deepest rewriting seen in tests settles in two passes.
_MAX_PASSES = 6

_NUMERIC: dict[str, Callable[..., float]] = {
    "power": lambda x, e: math.pow(x if float(e).is_integer() else abs(x), e),
    "sqrt": lambda x: math.sqrt(abs(x)),
    "log": lambda x: math.log(max(abs(x), 1e-12)),
    "exp": lambda x: math.exp(min(x, 80.0)),
    "tanh": math.tanh,
}
# Operators that are exact on rationals, where their SymPy form may compute.
_EXACT = {"add", "sub", "mul", "div", "neg", "abs", "sqr", "skip"}


def number(value: int | float | sympy.Rational) -> sympy.Rational:
    """A constant of a formula, exact where it is short, else rounded to twelve digits.

    Raises:
        CriterionError: the value is not finite, or too large or too small to be useful.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise CriterionError(f"a constant became {value}; every constant must be finite")
    exact = sympy.Rational(repr(value)) if isinstance(value, float) else sympy.Rational(value)
    if exact != 0 and not MIN_CONSTANT <= abs(exact) < MAX_CONSTANT:
        size = "large" if abs(exact) > 1 else "small"
        raise CriterionError(
            f"a constant of this formula is too {size}; use {MIN_CONSTANT:g} to {MAX_CONSTANT:g}"
        )
    rounded = sympy.Rational(format(float(exact), ".12g"))
    is_short = max(abs(exact.p), exact.q) <= _MAX_FRACTION_PART
    return exact if is_short or exact == rounded else rounded


def combine(operator: Operator, *arguments: Any) -> Any:
    """The operator applied to expressions; folded when all of them are numbers.

    Raises:
        CriterionError: a constant is out of range, divides by zero, or is no valid exponent.
    """
    if operator.name == "power":
        _check_exponent(arguments[1])
    if operator.name == "div" and arguments[1] == 0:
        raise CriterionError("a formula divides by zero")
    if not all(isinstance(argument, sympy.Rational) for argument in arguments):
        return operator.build(*arguments)
    if operator.name in _EXACT:
        return number(operator.build(*arguments))
    compute = _NUMERIC.get(operator.name)
    if compute is None:
        raise CriterionError(f"{operator.name} of a constant means nothing; apply it to a feature")
    try:
        return number(compute(*(float(argument) for argument in arguments)))
    except (OverflowError, ValueError, ZeroDivisionError) as error:
        raise CriterionError(f"{operator.name} of these constants is not finite") from error


def _check_exponent(exponent: Any) -> None:
    if not isinstance(exponent, sympy.Rational):
        raise CriterionError("an exponent must be a constant")
    if abs(exponent) > MAX_EXPONENT:
        raise CriterionError(
            f"an exponent is {float(exponent):g}; it must be within -{MAX_EXPONENT} and "
            f"{MAX_EXPONENT}"
        )


def canonical(expression: sympy.Basic) -> Any:
    """The expression that stands for every way of writing the same formula.

    Raises:
        CriterionError: it holds what the vocabulary does not, or never settles.
    """
    for _ in range(_MAX_PASSES):
        rebuilt = _rebuild(expression)
        if rebuilt == expression:
            return rebuilt
        expression = rebuilt
    raise CriterionError("the formula does not settle under simplification; write it more simply")


def _rebuild(node: sympy.Basic) -> Any:
    if isinstance(node, sympy.Symbol):
        return feature_symbol(node.name)
    if isinstance(node, sympy.Rational):
        return number(node)
    if isinstance(node, sympy.Float):
        return number(float(node))
    arguments = [_rebuild(argument) for argument in node.args]
    if isinstance(node, sympy.Add | sympy.Mul):
        operator = OPERATORS["add" if isinstance(node, sympy.Add) else "mul"]
        constants = [a for a in arguments if isinstance(a, sympy.Rational)]
        others = [a for a in arguments if not isinstance(a, sympy.Rational)]
        # All at once: taking terms two by two would distribute factors that SymPy keeps together.
        folded = [number(type(node)(*constants))] if constants else []
        if not others:
            return folded[0]
        if isinstance(node, sympy.Mul) and folded:
            folded, others = _distributed(folded[0], others)
        return operator.build(*folded, *others)
    return combine(_operator_of(node), *arguments)


def _distributed(factor: Any, others: list[Any]) -> tuple[list[Any], list[Any]]:
    """The factor multiplied into the first sum, as SymPy does for a factor and a sum alone."""
    for index, other in enumerate(others):
        if isinstance(other, sympy.Add):
            inside = sympy.Add(*(sympy.Mul(factor, term) for term in other.args))
            return [], [*others[:index], inside, *others[index + 1 :]]
    return [factor], others


def _operator_of(node: sympy.Basic) -> Operator:
    for kind, name in ((sympy.exp, "exp"), (sympy.Pow, "power"), (sympy.Abs, "abs")):
        if isinstance(node, kind):
            return OPERATORS[name]
    name = type(node).__name__
    if isinstance(node, NAMED) and name in OPERATORS:
        return OPERATORS[name]
    raise CriterionError(f"a formula may not hold '{name}'; see `prunezero list operators`")


def feature_symbol(name: str) -> sympy.Symbol:
    """The symbol of a feature.

    Raises:
        CriterionError: the vocabulary has no such feature.
    """
    if name in OPERATORS:
        raise CriterionError(f"'{name}' is an operator; write {OPERATORS[name].usage}")
    if name not in FEATURES:
        near = did_you_mean(name, [*FEATURES, *OPERATORS]) or "."
        raise CriterionError(
            f"'{name}' is not a known word{near} Known features: {', '.join(FEATURES)}."
        )
    return FEATURES[name].symbol
