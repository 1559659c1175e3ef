"""What does an operator compute by itself, in torch and in Triton, whether it is installed or not?

`contract.py` holds what is seen here against what the operator's row says.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunezero.formula.canonical import combine
from prunezero.formula.code import Step, lines_of, steps
from prunezero.formula.constants import number
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import FEATURES
from prunezero.formula.functions import Elementwise, shape_of
from prunezero.formula.operators import Operator
from prunezero.scoring.kernels.files import import_kernels, kernel_folder

# The values of an operator: both may be negative, and the second is one row.
_NAMES = ("W", "X_mean")
# A power takes a constant.
_EXPONENTS = (0.3, 1.5, -0.5)
_EDGES = (0.0, -0.0, 1e-45, 1e-30, -1e-30, 100.0, -100.0, 1e4, -1e4, 1e30, -1e30)
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """An operator on named values, as a formula computes it."""

    operator: Operator
    expression: Any
    """what it builds, in SymPy"""
    steps: list[Step]
    names: tuple[str, ...]
    """of the values that it sees"""
    compute: Callable[[Values], Tensor]
    """its torch text"""

    @property
    def shape(self) -> str:
        """What it says that it gives: "element", "row", "column" or "scalar"."""
        return shape_of(self.expression)

    @property
    def is_new_word(self) -> bool:
        """Whether it is a function of its own, of one value, of another package."""
        return isinstance(self.expression, Elementwise)

    @property
    def has_kernel(self) -> bool:
        """Whether all that it is made of has a Triton text."""
        return bool(self.steps) and all(step.operator.triton is not None for step in self.steps)

    def nodes(self) -> Iterator[Any]:
        """The SymPy expression and all that stands inside."""
        waiting = [self.expression]
        while waiting:
            yield waiting[-1]
            waiting += waiting.pop().args


def trial_of(operator: Operator, values: tuple[Any, ...]) -> Trial:
    """The operator on expressions such as `expressions` gives."""
    expression = combine(operator, *values)
    if isinstance(expression, Elementwise) and type(expression).__name__ == operator.name:
        # The vocabulary has this word only where its package is installed.
        taken = [Step("t1", operator, _NAMES[:1], "element")]
        return Trial(operator, expression, taken, _NAMES[:1], _computing(lines_of(taken)))
    criterion = Criterion.from_sympy(expression)
    taken = [
        replace(step, operator=operator) if step.operator.name == operator.name else step
        for step in steps(criterion)
    ]
    lines = lines_of(taken) if taken else [f"score = {criterion.text}"]
    return Trial(operator, expression, taken, criterion.features, _computing(lines))


def _computing(lines: list[str]) -> Callable[[Values], Tensor]:
    program = compile("\n".join(lines), "<operator>", "exec")

    def compute(values: Values) -> Tensor:
        scope: dict[str, Any] = dict(values)
        with torch.no_grad():
            exec(program, {"torch": torch}, scope)
        return scope["score"]

    return compute


def expressions(operator: Operator) -> list[tuple[Any, ...]]:
    """What it is tried on: its values in SymPy, once or more."""
    first, second = (FEATURES[name].symbol for name in _NAMES)
    if operator.name == "power":
        return [(first, number(exponent)) for exponent in _EXPONENTS]
    return [(first, second)[: operator.arity]]


def drawn(rows: int, columns: int, seed: int = 0) -> Values:
    """Values of either sign, of common size, none of them close to 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(height: int) -> Tensor:
        size = 0.2 + 2 * torch.rand(height, columns, generator=generator)
        return torch.where(torch.rand(size.shape, generator=generator) < 0.5, size, -size)

    return {"W": draw(rows), "X_mean": draw(1)}


def edges() -> Iterator[Values]:
    """Every pair of zeros, huge and tiny values, and matrices that hold one value alone."""
    sizes = torch.tensor(_EDGES)
    yield {"W": sizes[:, None].repeat(1, len(sizes)), "X_mean": sizes[None]}
    yield {"W": torch.zeros(3, 4), "X_mean": torch.zeros(1, 4)}
    yield {"W": torch.full((3, 4), -2.5), "X_mean": torch.full((1, 4), 2.5)}


_KERNEL = """import triton
import triton.language as tl


@triton.jit
def kernel(result, W_at, X_mean_at, count, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    W = tl.load(W_at + place, mask=place < count, other=1.0)
    X_mean = tl.load(X_mean_at + place, mask=place < count, other=1.0)
    $LINES
    tl.store(result + place, $RESULT, mask=place < count)
"""


def by_kernel(taken: list[Step], values: Values) -> Tensor:
    """The last of some steps by their Triton texts, float32 [rows, columns] on the CPU.

    Without a GPU it runs in Triton's interpreter, which this process then stays with.

    Raises:
        RuntimeError: there is no GPU, and Triton was imported for one.
    """
    if not torch.cuda.is_available():
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("without a GPU, set TRITON_INTERPRET=1 before Triton is imported")
        os.environ["TRITON_INTERPRET"] = "1"
    lines = [f"{one.name} = {(one.operator.triton or '').format(*one.arguments)}" for one in taken]
    source = _KERNEL.replace("$LINES", "\n    ".join(lines)).replace("$RESULT", taken[-1].name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = values["W"].shape
    given = [value.expand(shape).contiguous().to(device) for value in values.values()]
    result = torch.empty(shape, device=device)
    count = result.numel()
    block = 1 << (count - 1).bit_length()
    # The interpreter computes with numpy, which warns of what the torch text avoids otherwise.
    with np.errstate(all="ignore"):
        kernels = import_kernels(source, kernel_folder())
        kernels.kernel[(1,)](result, *given, count, BLOCK=block, enable_fp_fusion=False)
    return result.cpu()


def numbers_at(trial: Trial, values: Values, place: tuple[int, ...]) -> dict[str, Any]:
    """The values of one element, by name."""
    shape = values["W"].shape
    return {name: values[name].expand(shape)[place].item() for name in trial.names}


def for_values(trial: Trial, values: Values, place: tuple[int, ...]) -> str:
    """The values that led to one result, in words."""
    if trial.shape != "element":
        return ""
    return " for " + ", ".join(f"{one:g}" for one in numbers_at(trial, values, place).values())
