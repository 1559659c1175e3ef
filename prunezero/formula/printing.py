"""Expressions as text that reads back to the same expression, and as LaTeX."""

from __future__ import annotations

from typing import Any

import sympy

from prunezero.formula.algebra import negated, power
from prunezero.formula.features import FEATURES

# How tightly text binds, so that only the brackets that are needed are written.
_SUM, _PRODUCT, _POWER, _ATOM = range(4)
_FEATURE_ORDER = ["W", "G", "G1", *FEATURES]
_HALF = sympy.Rational(1, 2)
# Denominators up to this one are typeset as fractions.
_LONGEST_FRACTION = 9


def text_of(expression: Any) -> str:
    """The formula as `Criterion.parse` reads it."""
    return _text(expression, _SUM)


def latex_of(expression: Any) -> str:
    """The formula in LaTeX, features in the letters of the papers, long constants rounded."""
    return _latex(expression, _SUM)


def split_quotient(product: Any) -> tuple[list[Any], list[Any]]:
    """A product as factors above and below the line; what stands below has no negative power.

    Both are in reading order, which is also the order of evaluation.
    """
    above, below = [], []
    for factor in sorted(sympy.Mul.make_args(product), key=_reading_order):
        if isinstance(factor, sympy.Pow) and not isinstance(factor, sympy.exp):
            base, exponent = factor.args
            if exponent.is_negative:
                below.append(power(base, -exponent))
                continue
        above.append(factor)
    return above, below


def split_sum(total: Any) -> tuple[list[Any], list[Any]]:
    """A sum as the terms that are added and those that are taken away, both in reading order."""
    added, taken = [], []
    for term in sorted(total.args, key=_reading_order):
        if is_negated(term):
            taken.append(negated(term))
        else:
            added.append(term)
    return added, taken


def is_negated(node: Any) -> bool:
    """Whether an expression is a negative number, or a product that begins with one."""
    first = sympy.Mul.make_args(node)[0]
    return isinstance(first, sympy.Rational) and bool(first < 0)


def _reading_order(node: Any) -> tuple[bool, int, str]:
    names = [symbol.name for symbol in node.free_symbols]
    first = min((_FEATURE_ORDER.index(name) for name in names), default=-1)
    return not node.is_number, first, str(node)


def _text(node: Any, around: int) -> str:
    text, binds = _bare(node)
    return text if binds >= around else f"({text})"


def _bare(node: Any) -> tuple[str, int]:
    if isinstance(node, sympy.Symbol):
        return node.name, _ATOM
    if isinstance(node, sympy.Rational):
        return _number(node)
    if isinstance(node, sympy.Add):
        return _sum(node), _SUM
    if isinstance(node, sympy.exp):
        return f"exp({_text(node.args[0], _SUM)})", _ATOM
    if isinstance(node, sympy.Pow) and not node.args[1].is_negative:
        base, exponent = node.args
        if exponent == _HALF:
            return f"sqrt({_text(base, _SUM)})", _ATOM
        return f"{_text(base, _ATOM)}**{_text(exponent, _ATOM)}", _POWER
    if isinstance(node, sympy.Mul | sympy.Pow):
        return _product(node)
    return f"{type(node).__name__.lower()}({_text(node.args[0], _SUM)})", _ATOM


def _number(value: Any) -> tuple[str, int]:
    short = format(float(value), ".12g")
    if sympy.Rational(short) == value:
        return short, _ATOM if value >= 0 else _SUM
    return f"{value.p}/{value.q}", _SUM


def _sum(node: Any) -> str:
    added, taken = split_sum(node)
    text = " + ".join(_text(term, _PRODUCT) for term in added)
    return text + "".join(
        f" - {_text(term, _PRODUCT)}" if text or index else f"-{_text(term, _PRODUCT)}"
        for index, term in enumerate(taken)
    )


def _product(node: Any) -> tuple[str, int]:
    if is_negated(node):
        return f"-{_text(negated(node), _PRODUCT)}", _SUM
    above, below = split_quotient(node)
    text = "*".join(_text(factor, _POWER) for factor in above) or "1"
    for factor in below:
        text += f"/{_text(factor, _POWER)}"
    return text, _PRODUCT


def _latex(node: Any, around: int) -> str:
    text, binds = _bare_latex(node)
    return text if binds >= around else rf"\left({text}\right)"


def _bare_latex(node: Any) -> tuple[str, int]:
    """A node in LaTeX, and how tightly it binds. SymPy's printer would rewrite as it goes."""
    if isinstance(node, sympy.Symbol):
        return FEATURES[node.name].latex, _ATOM
    if isinstance(node, sympy.Rational):
        return _latex_number(node)
    if isinstance(node, sympy.Add):
        return _latex_sum(node), _SUM
    if isinstance(node, sympy.exp):
        return f"e^{{{_latex(node.args[0], _SUM)}}}", _POWER
    if isinstance(node, sympy.Abs):
        return rf"\left|{_latex(node.args[0], _SUM)}\right|", _ATOM
    if isinstance(node, sympy.Pow) and not node.args[1].is_negative:
        base, exponent = node.args
        if exponent == _HALF:
            return rf"\sqrt{{{_latex(base, _SUM)}}}", _ATOM
        return f"{_latex(base, _ATOM)}^{{{_latex(exponent, _SUM)}}}", _POWER
    if isinstance(node, sympy.Mul | sympy.Pow):
        return _latex_product(node)
    name = type(node).__name__.replace("_", r"\_")
    word = rf"\{name}" if isinstance(node, sympy.log | sympy.tanh) else rf"\operatorname{{{name}}}"
    return rf"{word}\left({_latex(node.args[0], _SUM)}\right)", _ATOM


def _latex_number(value: Any) -> tuple[str, int]:
    if 1 < value.q <= _LONGEST_FRACTION:
        sign = "-" if value < 0 else ""
        return rf"{sign}\frac{{{abs(value.p)}}}{{{value.q}}}", _ATOM if value > 0 else _SUM
    digits, _, exponent = format(float(value), ".4g").partition("e")
    power = rf" \cdot 10^{{{int(exponent)}}}" if exponent else ""
    return digits + power, _SUM if value < 0 else _PRODUCT if power else _ATOM


def _latex_sum(node: Any) -> str:
    added, taken = split_sum(node)
    text = " + ".join(_latex(term, _PRODUCT) for term in added)
    return text + "".join(f" - {_latex(term, _PRODUCT)}" for term in taken)


def _latex_product(node: Any) -> tuple[str, int]:
    if is_negated(node):
        return f"- {_latex(negated(node), _PRODUCT)}", _SUM
    above, below = split_quotient(node)
    text = _latex_factors(above) or "1"
    return (rf"\frac{{{text}}}{{{_latex_factors(below)}}}" if below else text), _PRODUCT


def _latex_factors(factors: list[Any]) -> str:
    # What stands alone above or below a line needs no brackets.
    return " ".join(_latex(one, _POWER if len(factors) > 1 else _SUM) for one in factors)
