"""Is a value never negative? By the signs of its parts alone, since SymPy may take minutes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy


@lru_cache(maxsize=4096)
def never_negative(x: Any) -> bool:
    """Whether surely no value of it is below 0, by the signs of its parts alone."""
    if isinstance(x, sympy.Rational):
        return bool(x >= 0)
    if isinstance(x, sympy.exp | sympy.Abs):
        return True
    if isinstance(x, sympy.Add | sympy.Mul):
        return all(map(never_negative, x.args))
    if isinstance(x, sympy.Pow):
        base, exponent = x.args
        return never_negative(base) or bool(exponent.is_integer and exponent % 2 == 0)
    if isinstance(x, sympy.tanh):
        return never_negative(x.args[0])
    if isinstance(x, sympy.log):
        return is_at_least_one(x.args[0])
    if x.args:
        return bool(x.never_negative or (x.keeps_sign and never_negative(x.args[0])))
    return bool(x.is_nonnegative)


def is_at_least_one(x: Any) -> bool:
    """Whether surely no value of it is below 1."""
    terms = x.args if isinstance(x, sympy.Add) else (x,)
    constants = [term for term in terms if isinstance(term, sympy.Rational)]
    return sum(constants) >= 1 and all(map(never_negative, terms))
