"""Which numbers may a formula hold, and how exactly are they kept?"""

from __future__ import annotations

import math

import sympy

from prunezero.errors import CriterionError

MAX_CONSTANT = 1e6
MIN_CONSTANT = 1e-12
MAX_EXPONENT = 8
# A rational with a part as large as this is rounded to twelve digits: it could not be read back.
_FRACTION_PART = 10**6


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
    is_short = max(abs(exact.p), exact.q) < _FRACTION_PART
    return exact if is_short or exact == rounded else rounded


def checked_exponent(exponent: sympy.Rational) -> sympy.Rational:
    """The exponent.

    Raises:
        CriterionError: it is too large, or too small.
    """
    if abs(exponent) > MAX_EXPONENT:
        raise CriterionError(
            f"an exponent is {float(exponent):g}; it must be within -{MAX_EXPONENT} and "
            f"{MAX_EXPONENT}"
        )
    return exponent
