"""What may a formula be rewritten to? Every rule stands here; SymPy holds the tree and its numbers.

SymPy's own rewriting is not asked. It knows functions of complex numbers that are infinite at some
points, and takes minutes and gigabytes over the signs of some sums; ours are total, real, float32.
A rule here looks at one node and its arguments, so each costs as much as the node is large.

All but four rules keep the value of the formula as typed, whatever the weights are, but for the
rounding of float32 and what leaves its range. Those four keep it but at some points, and are
reported to `changes.py`:

- `x/x` is 1, also where x is 0 (as typed, 0/0 is 0);
- `exp(x)*exp(y)` is `exp(x + y)`, and `exp(x)**2` is `exp(2*x)`, also where exp sees at most 80;
- `exp(log(x))` is `|x|` and `exp(2*log(x))` is `|x|**2`, also where log sees at least 1e-12;
- `log(exp(x))` is x, also where exp or log sees less or more.

Powers are never made larger: `(W*X)**8` stays a power of a product, whose factors alone might leave
float32; a root, which makes numbers tamer, is taken of each factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cmp_to_key
from typing import Any

import sympy

from prunezero.errors import CriterionError
from prunezero.formula.changes import SHRUNK, has_shrunk, is_heard, report
from prunezero.formula.constants import MAX_EXPONENT, checked_exponent, number
from prunezero.formula.functions import AXES, SHAPES, MatrixFunction, reduces_nothing, shape_of
from prunezero.formula.signs import is_at_least_one, never_negative

_ZERO, _ONE = sympy.S.Zero, sympy.S.One
_order = cmp_to_key(sympy.Basic.compare)


def add(*terms: Any) -> Any:
    """The sum, like terms together."""
    parts: dict[Any, Any] = {}
    for term in _flat(sympy.Add, terms):
        factor, rest = coefficient(term)
        parts[rest] = parts.get(rest, _ZERO) + factor
    constant = parts.pop(_ONE, _ZERO)
    kept = [_times(factor, rest) for rest, factor in parts.items() if factor != 0]
    if len(kept) < len(parts):
        _watch_shape(parts, kept)
    if constant == 0 and len(kept) == 1:
        return kept[0]
    kept.sort(key=_order)
    return _node(sympy.Add, [constant, *kept] if constant != 0 else kept, empty=_ZERO)


def multiply(*factors: Any) -> Any:
    """The product: one number, equal bases and exponentials together."""
    constant, powers, exponents = _ONE, dict[Any, Any](), list[Any]()
    for factor in _flat(sympy.Mul, factors):
        if isinstance(factor, sympy.Rational):
            constant *= factor
        elif isinstance(factor, sympy.exp):
            exponents.append(factor.args[0])
        else:
            base, exponent = base_and_exponent(factor)
            powers[base] = powers.get(base, _ZERO) + exponent
    if constant == 0 or not all(powers.values()):
        seen = [base for base, exponent in powers.items() if exponent != 0] + exponents
        _watch_shape(factors, seen if constant != 0 else [])
    if constant == 0:
        return _ZERO
    kept = []
    for base, exponent in powers.items():
        if exponent != 0:
            kept.append(power(base, exponent))
        elif not is_at_least_one(base):
            report("where something that is divided by itself is 0")
    kept += _together(exponents)
    # What a power became may be a product, or have a base that stands among the others.
    if not all(isinstance(one, sympy.exp) or _is_settled(one, powers) for one in kept):
        return multiply(constant, *kept)
    if len(kept) == 1:
        return _scaled(constant, kept[0])
    kept.sort(key=_order)
    return _node(sympy.Mul, [constant, *kept] if constant != 1 else kept, empty=_ONE)


def power(base: Any, exponent: Any) -> Any:
    """The base to a rational exponent; with a fraction the base is |base|, so that it is real.

    Raises:
        CriterionError: an exponent or a constant becomes too large or too small.
    """
    if exponent == 1:
        return base
    if exponent == 0:
        _watch_shape([base], [])
        return _ONE
    if isinstance(base, sympy.Rational):
        return _power_of_number(base, exponent)
    if isinstance(base, sympy.exp):
        if exponent < 0 or _may_be_positive(base.args[0]):
            report("where exp sees more than 80")
        return exponential(multiply(exponent, base.args[0]))
    is_whole = exponent.is_integer
    if isinstance(base, sympy.Pow):
        inner, before = base.args
        return power(inner if is_whole else absolute(inner), checked_exponent(before * exponent))
    if not is_whole and absolute(base) != base:
        return power(absolute(base), exponent)
    if isinstance(base, sympy.Mul):
        return _power_of_product(base, exponent)
    if isinstance(base, sympy.Abs) and is_whole:
        if exponent % 2 == 0:
            return power(base.args[0], exponent)
        if exponent != -1:
            sign = sympy.sign(exponent)
            return multiply(power(base.args[0], exponent - sign), power(base, sign))
    return sympy.Pow(base, checked_exponent(exponent), evaluate=False)


def _power_of_number(base: Any, exponent: Any) -> Any:
    if base == 0 and exponent < 0:
        raise CriterionError("a formula divides by zero")
    if exponent.is_integer and abs(exponent) <= MAX_EXPONENT:
        return number(base**exponent)
    return number(abs(float(base)) ** float(exponent))


def _power_of_product(product: Any, exponent: Any) -> Any:
    if abs(exponent) <= 1:
        return multiply(*(power(factor, exponent) for factor in product.args))
    sign = _ONE
    if exponent.is_integer:
        if coefficient(product)[0] < 0:
            product, sign = negated(product), _ONE if exponent % 2 == 0 else -_ONE
        if exponent % 2 == 0:
            signed = _flat(sympy.Mul, [product])
            product = multiply(
                *(one.args[0] if isinstance(one, sympy.Abs) else one for one in signed)
            )
    if not isinstance(product, sympy.Mul):
        return multiply(sign, power(product, exponent))
    return _times(sign, sympy.Pow(product, checked_exponent(exponent), evaluate=False))


def absolute(x: Any) -> Any:
    """|x|, factor by factor, and of two sums that differ in sign always the same one."""
    if never_negative(x):
        return x
    if isinstance(x, sympy.Rational):
        return abs(x)
    if isinstance(x, sympy.Mul):
        return multiply(*map(absolute, x.args))
    if isinstance(x, sympy.Pow):
        return power(absolute(x.args[0]), x.args[1])
    if isinstance(x, sympy.Add) and _begins_negative(x):
        return absolute(negated(x))
    return sympy.Abs(x, evaluate=False)


def exponential(x: Any) -> Any:
    """exp(x), without the logarithms in x."""
    outside, inside = [], []
    for term in x.args if isinstance(x, sympy.Add) else [x]:
        factor, rest = coefficient(term)
        if isinstance(rest, sympy.log) and abs(factor) <= MAX_EXPONENT:
            report("where log sees less than 1e-12, or exp more than 80")
            outside.append(power(rest.args[0], factor))
        else:
            inside.append(term)
    if not outside:
        return sympy.exp(x, evaluate=False) if x != 0 else _ONE
    return multiply(*outside, exponential(add(*inside)))


def logarithm(x: Any) -> Any:
    """log(|x|)."""
    seen = absolute(x)
    if isinstance(seen, sympy.exp):
        report("where exp sees more than 80, or log less than 1e-12")
        return seen.args[0]
    return _ZERO if seen == 1 else sympy.log(seen, evaluate=False)


def hyperbolic_tangent(x: Any) -> Any:
    """tanh(x), of x and -x always the same one."""
    if x == 0:
        return _ZERO
    if _begins_negative(x):
        return negated(hyperbolic_tangent(negated(x)))
    return sympy.tanh(x, evaluate=False)


def applied(function: type[Any], x: Any) -> Any:
    """A function of `functions.py`, or the value itself where there is nothing to reduce."""
    if issubclass(function, MatrixFunction):
        if has_shrunk():
            report("in the count of what is summed, where what varied along it has gone")
        if reduces_nothing(function, x):
            return absolute(x) if function.never_negative else x
    return function(x, evaluate=False)


def negated(x: Any) -> Any:
    """-x."""
    return multiply(-_ONE, x)


def coefficient(term: Any) -> tuple[Any, Any]:
    """The number in front of a term, and the rest."""
    if isinstance(term, sympy.Rational):
        return term, _ONE
    if isinstance(term, sympy.Mul) and isinstance(term.args[0], sympy.Rational):
        return term.args[0], _node(sympy.Mul, list(term.args[1:]), empty=_ONE)
    return _ONE, term


def without_factor(expression: Any) -> tuple[Any, Any]:
    """A number and the rest, equal for all multiples: its sums have a coefficient of 1 or -1."""
    if isinstance(expression, sympy.Add):
        parts = [coefficient(term) for term in expression.args]
        first = abs(min(parts, key=lambda part: str(part[1]))[0])
        return first, add(*(_times(number / first, rest) for number, rest in parts))
    if isinstance(expression, sympy.Mul):
        numbers, rests = zip(*map(without_factor, expression.args), strict=True)
        return sympy.prod(numbers), multiply(*rests)
    if isinstance(expression, sympy.Rational):
        return abs(expression), sympy.sign(expression)
    return _ONE, expression


def base_and_exponent(factor: Any) -> tuple[Any, Any]:
    """A factor as base and exponent, 1 where it is no power."""
    return factor.args if isinstance(factor, sympy.Pow) else (factor, _ONE)


def _begins_negative(x: Any) -> bool:
    """Whether of x and -x the latter is to be written: it has fewer minus signs."""
    if not isinstance(x, sympy.Add):
        return bool(coefficient(x)[0] < 0)
    taken = sum(bool(coefficient(term)[0] < 0) for term in x.args)
    if 2 * taken != len(x.args):
        return 2 * taken > len(x.args)
    return bool(x.sort_key() < negated(x).sort_key())


def _flat(kind: type[Any], parts: Iterable[Any]) -> Iterator[Any]:
    for part in parts:
        yield from part.args if isinstance(part, kind) else (part,)


def _node(kind: type[Any], parts: list[Any], *, empty: Any) -> Any:
    if len(parts) > 1:
        return kind._from_args(parts, True)
    return parts[0] if parts else empty


def _times(factor: Any, rest: Any) -> Any:
    """A number times an expression that begins with none."""
    if factor == 1 or rest == 1:
        return rest if factor == 1 else factor
    return _node(sympy.Mul, [factor, *_flat(sympy.Mul, [rest])], empty=_ONE)


def _scaled(factor: Any, rest: Any) -> Any:
    """A number times one factor; into a sum it is multiplied."""
    if factor != 1 and isinstance(rest, sympy.Add):
        return add(*(multiply(factor, term) for term in rest.args))
    return _times(factor, rest)


def _is_settled(factor: Any, powers: dict[Any, Any]) -> bool:
    base, exponent = base_and_exponent(factor)
    is_factor = not isinstance(factor, sympy.Mul | sympy.Rational)
    return is_factor and powers.get(base) == exponent


def _together(exponents: list[Any]) -> list[Any]:
    if len(exponents) > 1 and any(map(_may_be_positive, exponents)):
        report("where exp sees more than 80")
    joint = exponential(add(*exponents)) if exponents else _ONE
    return [] if joint == 1 else [joint]


def _may_be_positive(x: Any) -> bool:
    return not never_negative(negated(x))


def _watch_shape(before: Iterable[Any], after: Iterable[Any]) -> None:
    if is_heard() and joint_shape(before) != joint_shape(after):
        report(SHRUNK)


def joint_shape(nodes: Iterable[Any]) -> str:
    """The shape of what is computed from several values."""
    axes = [AXES[shape_of(node)] for node in nodes]
    return SHAPES[any(row for row, _ in axes), any(column for _, column in axes)]
