"""One expression for each formula: what is printed, hashed and executed is the same tree.

`algebra.py` rewrites as it builds (`W/W` becomes 1, `sqrt(W**2)` becomes `|W|`), and only the
result is kept: an expression is rebuilt from its leaves until it no longer changes. Numbers are
rationals, so that no rounding depends on the order of rewriting; a sub-formula without features is
folded in floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy

from prunezero.errors import CriterionError, did_you_mean
from prunezero.formula import algebra
from prunezero.formula.constants import checked_exponent, number
from prunezero.formula.features import FEATURES
from prunezero.formula.functions import NAMED, stand_in
from prunezero.formula.signs import never_negative
from prunezero.formula.vocabulary import OPERATORS, Operator

# The deepest rewriting seen in tests settles in two passes.
_MAX_PASSES = 6
# No formula that can be read has as many nodes, nor is as deep.
_MOST_NODES, _MOST_DEPTH = 1024, 64

_NUMERIC: dict[str, Callable[..., float]] = {
    "power": lambda x, e: math.pow(x if float(e).is_integer() else abs(x), e),
    "sqrt": lambda x: math.sqrt(abs(x)),
    "log": lambda x: math.log(max(abs(x), 1e-12)),
    "exp": lambda x: math.exp(min(x, 80.0)),
    "tanh": math.tanh,
}
# Operators that are exact on rationals.
_EXACT = {"add", "sub", "mul", "div", "neg", "abs", "sqr", "skip"}


def combine(operator: Operator, *arguments: Any) -> Any:
    """The operator applied to expressions; folded when all of them are numbers.

    Raises:
        CriterionError: a constant is out of range, divides by zero, or is no valid exponent.
    """
    if operator.name == "power":
        if not isinstance(arguments[1], sympy.Rational):
            raise CriterionError("an exponent must be a constant")
        checked_exponent(arguments[1])
    if operator.name == "div" and arguments[1] == 0:
        raise CriterionError("a formula divides by zero")
    if not all(isinstance(argument, sympy.Rational) for argument in arguments):
        is_foreign = operator.torch is None and operator.name not in OPERATORS.own
        return _written_out(operator, arguments) if is_foreign else operator.build(*arguments)
    if operator.name in _EXACT:
        return number(operator.build(*arguments))
    compute = _NUMERIC.get(operator.name)
    if compute is None:
        raise CriterionError(f"{operator.name} of a constant means nothing; apply it to a feature")
    try:
        return number(compute(*(float(argument) for argument in arguments)))
    except (OverflowError, ValueError, ZeroDivisionError) as error:
        raise CriterionError(f"{operator.name} of these constants is not finite") from error


def _written_out(operator: Operator, arguments: tuple[Any, ...]) -> Any:
    """What another package's operator builds; it sees small stand-ins for what may be large."""
    values = {
        stand_in(argument, place, nonnegative=never_negative(argument)): argument
        for place, argument in enumerate(arguments)
    }
    return _rebuild(operator.build(*values), dict(values))


def canonical(expression: sympy.Basic) -> Any:
    """The expression that stands for every way of writing the same formula.

    Raises:
        CriterionError: it holds what the vocabulary does not, or never settles.
    """
    _check_size(expression)
    for _ in range(_MAX_PASSES):
        rebuilt = _rebuild(expression, {})
        if rebuilt == expression:
            return rebuilt
        expression = rebuilt
    raise CriterionError("the formula does not settle under simplification; write it more simply")


def _check_size(expression: sympy.Basic) -> None:
    """Refuse what no text could have built, before anything walks through it."""
    level, count = [expression], 0
    for _ in range(_MOST_DEPTH):
        level = [argument for node in level for argument in node.args]
        count += len(level)
        if not level or count > _MOST_NODES:
            break
    if level:
        raise CriterionError("a formula is too large or too deep; write a smaller one")


def _rebuild(node: sympy.Basic, known: dict[Any, Any]) -> Any:
    """The node from its leaves; `known` holds what is rebuilt already."""
    if node not in known:
        known[node] = _rebuilt(node, known)
    return known[node]


def _rebuilt(node: sympy.Basic, known: dict[Any, Any]) -> Any:
    if isinstance(node, sympy.Symbol):
        return feature_symbol(node.name)
    if isinstance(node, sympy.Rational):
        return number(node)
    if isinstance(node, sympy.Float):
        return number(float(node))
    arguments = [_rebuild(argument, known) for argument in node.args]
    return with_arguments(node, arguments)


def with_arguments(node: sympy.Basic, arguments: list[Any]) -> Any:
    """The node's operator applied to other arguments.

    Raises:
        CriterionError: it is none of the vocabulary, or a constant is out of range.
    """
    if isinstance(node, sympy.Add | sympy.Mul):
        operator = OPERATORS["add" if isinstance(node, sympy.Add) else "mul"]
        constants = [a for a in arguments if isinstance(a, sympy.Rational)]
        others = [a for a in arguments if not isinstance(a, sympy.Rational)]
        # All at once: taking terms two by two would distribute factors that we keep together.
        folded = [number(operator.build(*constants))] if constants else []
        if not others:
            return folded[0]
        if isinstance(node, sympy.Mul) and folded:
            folded, others = _distributed(folded[0], others)
        return operator.build(*folded, *others)
    return combine(_operator_of(node), *arguments)


def _distributed(factor: Any, others: list[Any]) -> tuple[list[Any], list[Any]]:
    """The factor multiplied into the first sum, as `multiply` does for a factor and a sum alone."""
    for index, other in enumerate(others):
        if isinstance(other, sympy.Add):
            inside = algebra.add(*(algebra.multiply(factor, term) for term in other.args))
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
