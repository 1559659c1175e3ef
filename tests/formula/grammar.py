"""Random formulas as somebody types them: text over the whole vocabulary, not yet simplified."""

from __future__ import annotations

import random
from collections.abc import Sequence

from prunezero.formula import FEATURES, OPERATORS

CONSTANTS = (0.5, 2, 0.1, 3, 1.5, 100, 0.001, 7, 0.3)
EXPONENTS = (0.5, 2, 3, 0.25, -1, -0.5, 0.3, 1.5, 8, -2, 4, -8)
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def random_text(
    rng: random.Random,
    depth: int,
    *,
    operators: Sequence[str] = tuple(OPERATORS),
    features: Sequence[str] = tuple(FEATURES),
    exponents: Sequence[float] = EXPONENTS,
) -> str:
    """A formula of at most `depth` levels; some are refused, since their constants overflow."""

    def text(depth: int) -> str:
        if depth == 0 or rng.random() < 0.15:
            is_feature = rng.random() < 0.85
            return rng.choice(features) if is_feature else str(rng.choice(CONSTANTS))
        name = rng.choice(operators)
        first = text(depth - 1)
        if name == "power":
            return f"({first})**({rng.choice(exponents)})"
        if name in _INFIX:
            return f"({first} {_INFIX[name]} {text(depth - 1)})"
        if OPERATORS[name].arity == 2:
            return f"{name}({first}, {text(depth - 1)})"
        return f"{name}({first})"

    return text(depth)
