"""Does an operator keep its promises? For authors of operators, to be called from a test.

    from prunezero.testing.operators import broken_promises
    assert broken_promises(MY_OPERATOR) == []

Its package need not be installed. Formulas are simplified, computed in pieces and turned into
kernels by what a row says of itself, so a row that says too much makes wrong scores.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from prunezero.errors import reason
from prunezero.formula.features import FEATURES
from prunezero.formula.functions import Elementwise, MatrixFunction
from prunezero.formula.operators import Operator
from prunezero.testing.operator_trial import (
    Trial,
    by_kernel,
    drawn,
    edges,
    expressions,
    for_values,
    numbers_at,
    trial_of,
)

_SHAPES = {"element": "as many values as it gets", "row": "one value for each row"}
_SHAPES |= {"column": "one value for each column", "scalar": "one value for the layer"}
# A matrix of each, [rows, columns].
_SIZES = ((5, 7), (1, 7), (5, 1), (1, 1))
_LARGEST = torch.finfo(torch.float32).max
# Logarithms and exponentials of two backends differ in their last bits, and powers magnify that.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-6


def broken_promises(operator: Operator) -> list[str]:
    """What an operator does that it must not, one sentence each; none for a good one.

    Looked at are its torch text, and its Triton text where Triton is installed, on random matrices
    of several shapes, on zeros, and on huge and tiny values. On a machine without a GPU the Triton
    text runs in the interpreter, which Triton has to be told before it is imported.
    """
    broken: dict[str, None] = {}
    for values in expressions(operator):
        try:
            trial = trial_of(operator, values)
        except Exception as error:
            return [f"it cannot be built: {type(error).__name__}: {reason(error)}"]
        broken |= dict.fromkeys(_faults(trial))
    return list(broken)


def _faults(trial: Trial) -> Iterator[str]:
    """The promises that are broken; those that build on a broken one are not looked at."""
    basic = list(_of_its_kind(trial))
    if basic:
        yield from basic[:1]
        return
    yield from _of_its_sign(trial)
    yield from _of_its_size(trial)
    yield from _of_its_reach(trial)
    yield from _of_its_meaning(trial)
    yield from _of_its_kernel(trial)


def _of_its_kind(trial: Trial) -> Iterator[str]:
    """Float32 of the right shape, the same each time, and its values left as they were."""
    shape = trial.shape
    for rows, columns in _SIZES:
        values = drawn(rows, columns)
        kept = {name: value.clone() for name, value in values.items()}
        try:
            found = trial.compute(values)
        except Exception as error:
            why = f"{type(error).__name__}: {reason(error)}"
            yield f"its torch text fails on [{rows}, {columns}]: {why}"
            return
        if not all(torch.equal(values[name], kept[name]) for name in values):
            yield "it changes the values that it is given"
        if not isinstance(found, Tensor) or found.dtype != torch.float32:
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            yield f"it gives {kind}, not torch.float32"
            return
        wanted = (
            rows if shape in ("element", "row") else 1,
            (columns if shape in ("element", "column") else 1),
        )
        if tuple(found.shape) != wanted:
            yield (
                f"it claims {_SHAPES[shape]}, but gives {list(found.shape)} for [{rows}, {columns}]"
            )
        elif not torch.allclose(trial.compute(kept), found, rtol=0, atol=0, equal_nan=True):
            yield "asked again, it gives another value"


def _of_its_sign(trial: Trial) -> Iterator[str]:
    claim = trial.operator.sign
    if claim == "any":
        return
    told = "nonnegative" if claim == "nonnegative" else "nonnegative where its argument is"
    for values in (*(drawn(*size) for size in _SIZES), *edges()):
        if claim == "as argument":
            values = {name: value.abs() for name, value in values.items()}
        found = trial.compute(values)
        if (found < 0).any():
            place = tuple(torch.nonzero(found < 0)[0].tolist())
            of = for_values(trial, values, place)
            yield f"it claims to be {told}, but is {found[place]:g}{of}"
            return


def _of_its_size(trial: Trial) -> Iterator[str]:
    """Finite wherever the result has a place in float32; a new word of another package always."""
    for values in (*(drawn(*size) for size in _SIZES), *edges()):
        found = trial.compute(values)
        lost = ~torch.isfinite(found)
        if not trial.is_new_word:
            exact = trial.compute({name: value.double() for name, value in values.items()})
            lost &= ~(exact.abs() > _LARGEST) | exact.isnan()
        if lost.any():
            place = tuple(torch.nonzero(lost)[0].tolist())
            yield f"it is not finite, but {found[place]:g}{for_values(trial, values, place)}"
            return


def _of_its_reach(trial: Trial) -> Iterator[str]:
    """What a value depends on: itself, its row, its column, or the layer; never its place."""
    reductions = [node for node in trial.nodes() if isinstance(node, MatrixFunction)]
    reach = {type(node).__name__.partition("_")[0] for node in reductions}
    values = drawn(5, 7)
    whole = trial.compute(values).expand(5, 7)
    if reach <= {"row"}:
        alone = [trial.compute({**values, "W": values["W"][[row]]}) for row in range(5)]
        if not _is_close(torch.cat([one.expand(1, 7) for one in alone]), whole):
            yield f"it claims to see {_seen(reach)}, but one row changes with others"
            return
    if reach <= {"col"}:
        parts = [{name: value[:, [at]] for name, value in values.items()} for at in range(7)]
        alone = [trial.compute(part).expand(5, 1) for part in parts]
        if not _is_close(torch.cat(alone, dim=1), whole):
            yield f"it claims to see {_seen(reach)}, but one column changes with others"
            return
    order, across = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([5, 2, 0, 6, 1, 4, 3])
    moved = {"W": values["W"][order][:, across], "X_mean": values["X_mean"][:, across]}
    found = trial.compute(moved).expand(5, 7)
    if not _is_close(found, whole[order][:, across]):
        yield "it gives values that do not move when rows and columns change places"
        return
    other = drawn(5, 7, seed=1)
    stacked = {name: torch.stack([value, other[name]]) for name, value in values.items()}
    expected = torch.stack([whole, trial.compute(other).expand(5, 7)])
    if not _agrees(lambda: trial.compute(stacked).expand(2, 5, 7), expected):
        yield "on layers in a stack [layers, out, in] it gives other values than on each by itself"


def _seen(reach: set[str]) -> str:
    words = {"row": "each row by itself", "col": "each column by itself"}
    return words[min(reach)] if reach else "each element by itself"


def _of_its_meaning(trial: Trial) -> Iterator[str]:
    """The SymPy expression, where it has a value of its own."""
    if any(isinstance(node, MatrixFunction | Elementwise) for node in trial.nodes()):
        return
    values = drawn(3, 4)
    found = trial.compute(values)
    for row, column in np.ndindex(3, 4):
        numbers = numbers_at(trial, values, (row, column))
        known = {FEATURES[name].symbol: value for name, value in numbers.items()}
        meant = float(trial.expression.evalf(subs=known))
        if not math.isclose(found[row, column], meant, rel_tol=1e-4, abs_tol=1e-5):
            of = for_values(trial, values, (row, column))
            yield (
                f"its torch text gives {found[row, column]:g}{of}, but its SymPy meaning "
                f"{trial.expression} is {meant:g}"
            )
            return


def _of_its_kernel(trial: Trial) -> Iterator[str]:
    """The Triton text gives what the torch text gives."""
    if not trial.has_kernel or importlib.util.find_spec("triton") is None:
        return
    for values in (drawn(5, 7), *edges()):
        expected = trial.compute(values)
        try:
            found = by_kernel(trial.steps, values)
        except Exception as error:
            yield f"its Triton text fails: {type(error).__name__}: {str(error).splitlines()[-1]}"
            return
        differs = ~_close(found, expected)
        if differs.any():
            place = tuple(torch.nonzero(differs)[0].tolist())
            yield (
                f"its Triton text gives {found[place]:g}, its torch text {expected[place]:g}"
                f"{for_values(trial, values, place)}"
            )
            return


def _close(found: Tensor, expected: Tensor) -> Tensor:
    return torch.isclose(found, expected, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    return bool(_close(found, expected).all())


def _agrees(compute: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        return _is_close(compute(), expected)
    except (IndexError, RuntimeError):
        return False
