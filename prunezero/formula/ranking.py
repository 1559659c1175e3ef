"""What of a formula can a mask see? Only the order of scores inside a comparison group.

Inside a group, a rising function around the whole formula, an added constant and a factor that is
not negative change no order. `ranking_form` takes them away, so that of all formulas which rank
alike for one of these reasons a search builds a single one.
"""

from __future__ import annotations

from typing import Any

import sympy

from prunezero.errors import CriterionError
from prunezero.formula.algebra import (
    absolute,
    add,
    base_and_exponent,
    coefficient,
    multiply,
    power,
)
from prunezero.formula.canonical import canonical
from prunezero.formula.constants import MAX_EXPONENT, number
from prunezero.formula.functions import MINMAX, ZSCORE, shape_of
from prunezero.formula.signs import never_negative

# In place of who competes, where values count and not their order alone: nothing is taken away.
AS_IT_IS = "as it is"
# Shapes of a value that is the same for all weights that compete in a row or in the model; each
# layer has scalars of its own, so that among all layers only numbers are.
_CONSTANT_SHAPES = {
    "row": frozenset({"row", "scalar"}),
    "model": frozenset[str](),
    AS_IT_IS: frozenset[str](),
}
# Denominators up to this one are written as they are, as in 2/3.
_LARGEST = 12
# All other groups hold several rows of one layer.
_CONSTANT_IN_LAYER = frozenset({"scalar"})


def ranking_form(expression: Any, compare: str) -> Any:
    """The simplest canonical expression that ranks the weights of every group as this one does.

    Equal ranks are meant in exact arithmetic and where no group's factor is zero: what is taken
    away may have rounded, clamped or divided by zero, and so have tied weights that now differ.

    Args:
        expression: canonical, over the symbols of `FEATURES`.
        compare: which weights compete, as recipes say it; "row" for N:M.

    Raises:
        CriterionError: nothing is left, so the formula ranks nothing in such a group.
    """
    if _is_constant(expression, compare):
        raise CriterionError("the formula is the same for all weights that compete; it ranks none")
    if compare == AS_IT_IS:
        return expression
    seen: set[Any] = set()
    while expression not in seen:
        seen.add(expression)
        try:
            expression = canonical(_simpler(expression, compare))
        except CriterionError:
            break  # the simpler form holds a number that no formula may hold
    return expression


def _simpler(node: Any, compare: str) -> Any:
    """One step towards the ranking form; the node itself where there is none."""
    if isinstance(node, sympy.exp | sympy.tanh):
        return node.args[0]
    if isinstance(node, sympy.log) and never_negative(node.args[0]):
        return node.args[0]
    # Their scale is the layer's own.
    if isinstance(node, MINMAX | ZSCORE) and compare != "model":
        return node.args[0]
    if isinstance(node, sympy.Add):
        return _sum(node, compare)
    if isinstance(node, sympy.Mul):
        node = _product(node, compare)
    return _scaled_exponents(node)


def _sum(node: Any, compare: str) -> Any:
    terms = [term for term in node.args if not _is_constant(term, compare)]
    if len(terms) < len(node.args):
        return add(*terms)
    if common := _common_factors(node):
        inside = add(*(_divided(term, common) for term in node.args))
        seen = [one for one in (*common, inside) if not _is_unseen(one, compare)]
        if len(seen) <= len(common):
            return multiply(*seen)
    # One coefficient is 1: a mask sees only ratios of them.
    first = abs(coefficient(min(node.args, key=_without_coefficient))[0])
    if first == 1:
        return node
    parts = [coefficient(term) for term in node.args]
    return add(*(multiply(_short(number / first), rest) for number, rest in parts))


def _common_factors(total: Any) -> list[Any]:
    """The powers that every term of a sum has, each with the exponent nearest to 0."""
    terms = [_powers(term) for term in total.args]
    common = []
    for base in terms[0]:
        exponents = [powers.get(base, 0) for powers in terms]
        if len({sympy.sign(one) for one in exponents}) == 1:
            common.append(power(base, min(exponents, key=abs)))
    return common


def _powers(term: Any) -> dict[Any, Any]:
    _, rest = coefficient(term)
    return dict(map(base_and_exponent, sympy.Mul.make_args(rest))) if rest != 1 else {}


def _divided(term: Any, factors: list[Any]) -> Any:
    return multiply(term, *(power(one, sympy.Integer(-1)) for one in factors))


def _without_coefficient(term: Any) -> str:
    return str(coefficient(term)[1])


def _product(node: Any, compare: str) -> Any:
    """The factors that are not the same for the whole group, and the sign of the number."""
    kept = []
    for factor in node.args:
        if isinstance(factor, sympy.Rational):
            kept.append(sympy.sign(factor))
        elif not _is_unseen(factor, compare):
            kept.append(factor)
    return multiply(*kept)


def _is_unseen(factor: Any, compare: str) -> bool:
    return _is_constant(factor, compare) and never_negative(factor)


def _scaled_exponents(node: Any) -> Any:
    """A product of powers that are never negative, raised so that one exponent is 1 or -1."""
    powers = []
    for factor in sympy.Mul.make_args(node):
        base, exponent = base_and_exponent(factor)
        if isinstance(factor, sympy.exp) or not isinstance(exponent, sympy.Rational):
            return node
        if not never_negative(factor):
            return node
        powers.append((absolute(base), exponent))
    # The weight's own exponent where there is one, as papers write it.
    _, chosen = min(
        powers, key=lambda power: ("W" not in map(str, power[0].free_symbols), str(power))
    )
    scale = 1 / abs(sympy.Rational(chosen))
    if scale == 1 or any(abs(exponent * scale) > MAX_EXPONENT for _, exponent in powers):
        return node
    return multiply(*(power(base, _short(exponent * scale)) for base, exponent in powers))


def _short(value: Any) -> Any:
    """The number, to six digits where it has more: fractions of tuned numbers would be endless."""
    exact = number(value)
    return exact if exact.q <= _LARGEST else number(float(f"{float(value):.6g}"))


def _is_constant(node: Any, compare: str) -> bool:
    shapes = _CONSTANT_SHAPES.get(compare, _CONSTANT_IN_LAYER)
    return not node.free_symbols or shape_of(node) in shapes
