"""What is an operator? A row that says how one word combines values, ours or another package's.

The rows of prunezero itself stand in `vocabulary.py`. A package of your own makes a row in one of
two ways, and names it under the entry point group `prunezero.operators` (see `plugins.py`):

    from prunezero.formula.vocabulary import OPERATORS, Operator, elementwise

    # a function that prunezero lacks, by its torch text
    SIGMOID = elementwise("sigmoid", "torch.sigmoid({0})", meaning="logistic function")

    # a word for what our words can say; it is written out wherever it stands in a formula
    exp = OPERATORS["exp"].build
    SWISH = Operator("swish", 1, "swish(x)", "x times its sigmoid", lambda x: x / (1 + exp(-x)))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prunezero.formula.functions import elementwise_function

# The sign of a result: any, never negative, or never negative where the argument is not.
SIGNS = ("any", "nonnegative", "as argument")


@dataclass(frozen=True)
class Operator:
    """One word that combines values."""

    name: str
    # 1 or 2
    arity: int
    # how it is written in a formula
    usage: str
    meaning: str
    # SymPy expressions in, SymPy expression out; may simplify
    build: Callable[..., Any]
    # the value, from values named {0}, {1}; None where `build` writes the word in terms of others
    torch: str | None = None
    # the same inside a kernel; None where a value needs more than one element (reductions)
    triton: str | None = None
    # the sign of the result, one of SIGNS
    sign: str = "any"


def elementwise(
    name: str,
    torch: str,
    *,
    meaning: str,
    triton: str | None = None,
    sign: str = "any",
) -> Operator:
    """The row of a function that sees one value at a time, such as a sigmoid.

    Args:
        torch: the value from a value named {0}; names torch alone, since exported pruners hold it.
            It must see each element by itself, and give a finite float32 for every float32.
        triton: the same inside a kernel, naming `tl` alone; None computes it in torch beforehand.
        sign: what a formula may be simplified by, one of SIGNS. Claim no more than is true.
    """
    build = elementwise_function(name, sign)
    return Operator(name, 1, f"{name}(x)", meaning, build, torch, triton, sign=sign)
