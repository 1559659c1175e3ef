"""What does a formula's text say? Computed from docs/formulas.md in numpy, not by our own code.

`python -m tests.formula.as_typed --formulas 20000` compares random formulas on seven kinds of
layers with what prunezero computes of them.

Each value is a float64 with a bound of what float32 would round off it. Of each entry it says
whether docs/formulas.md lets a simplified formula differ there: it left the range of float32 on the
way; or, where a warning told so, a function was clamped or something divided by zero.
"""

from __future__ import annotations

import argparse
import ast
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prunezero.errors import CriterionError, FormulaWarning
from prunezero.formula import FEATURES, OPERATORS, Criterion
from prunezero.formula.functions import AXES
from prunezero.scoring.score import evaluate
from tests.formula.grammar import random_text

Array = np.ndarray[Any, Any]
OUT, IN = 6, 9
LARGEST, SMALLEST = 3.4e38, 1.2e-38
# Two units in the last place: what one operation may round off.
UNIT = 2.0**-22
PLAIN = (
    "mul",
    "div",
    "exp",
    "log",
    "mul",
    "div",
    "exp",
    "log",
    "add",
    "sub",
    "sqrt",
    "power",
    "abs",
)
KINDS = ("ordinary", "zeros", "dead channels", "huge", "tiny", "negative", "constant")


@dataclass(frozen=True)
class Value:
    """Numbers of one shape, each with what is known of it."""

    number: Array
    # what rounding to float32 may have moved it by
    error: Array
    # it left the range of float32 somewhere
    is_out: Array
    # a function that it is made of was clamped, or something was divided by zero
    is_special: Array
    # rounding decides about it: a difference of what is nearly equal was divided by, or scaled
    is_rough: Array


def value(
    number: Any, error: Any, *inside: Value, special: Any = False, rough: Any = False
) -> Value:
    number = np.asarray(number, dtype=np.float64)
    flags = [np.zeros(number.shape, bool) for _ in range(3)]
    for one in inside:
        flags = [
            a | b for a, b in zip(flags, (one.is_out, one.is_special, one.is_rough), strict=True)
        ]
    size = np.abs(number)
    left = ~np.isfinite(number) | (size > LARGEST) | ((size > 0) & (size < SMALLEST))
    error = np.asarray(error, dtype=np.float64) + UNIT * size
    return Value(number, error, flags[0] | left, flags[1] | special, flags[2] | rough)


def computed(text: str, features: dict[str, Array]) -> Value:
    """The value of a formula as it is typed."""
    with np.errstate(all="ignore"):
        return _computed(ast.parse(text, mode="eval").body, features)


def _computed(node: ast.expr, features: dict[str, Array]) -> Value:
    match node:
        case ast.Name(id=name):
            return value(features[name], 0.0)
        case ast.Constant(value=int() | float() as number):
            return value(np.full((1, 1), float(number)), 0.0)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            x = _computed(inner, features)
            return value(-x.number, x.error, x)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return power(_computed(left, features), _computed(right, {}).number.item())
        case ast.BinOp(left=left, op=op, right=right):
            return BINARY[type(op)](_computed(left, features), _computed(right, features))
        case ast.Call(func=ast.Name(id="divide_by_norm"), args=[left, right]):
            x, y = (_computed(argument, features) for argument in (left, right))
            return divide(x, reduce(y, "matrix", "norm"))
        case ast.Call(func=ast.Name(id=name), args=[inner]):
            return call(name, _computed(inner, features))
    raise ValueError(ast.unparse(node))


def add(x: Value, y: Value) -> Value:
    return value(x.number + y.number, x.error + y.error, x, y)


def subtract(x: Value, y: Value) -> Value:
    return value(x.number - y.number, x.error + y.error, x, y)


def multiply(x: Value, y: Value) -> Value:
    error = np.abs(x.number) * y.error + np.abs(y.number) * x.error + x.error * y.error
    return value(x.number * y.number, error, x, y)


def divide(x: Value, y: Value) -> Value:
    size, is_zero = np.abs(y.number), y.number == 0
    quotient = np.where(is_zero, 0.0, x.number / np.where(is_zero, 1.0, y.number))
    is_near = (size <= 2 * y.error) & (y.error > 0)
    error = (x.error + np.abs(quotient) * y.error) / np.where(
        is_near | is_zero, 1.0, size - y.error
    )
    return value(quotient, np.where(is_zero, 0.0, error), x, y, special=is_zero, rough=is_near)


BINARY = {ast.Add: add, ast.Sub: subtract, ast.Mult: multiply, ast.Div: divide}


def power(x: Value, exponent: float) -> Value:
    if exponent < 0:
        return divide(value(np.ones((1, 1)), 0.0), power(x, -exponent))
    size = np.abs(x.number)
    number = x.number**exponent if exponent.is_integer() else size**exponent
    above = (size + x.error) ** exponent - size**exponent
    below = size**exponent - np.maximum(size - x.error, 0) ** exponent
    return value(number, np.maximum(above, below) + 8 * UNIT * np.abs(number), x)


def call(name: str, x: Value) -> Value:
    if name in ("minmax", "zscore"):
        return scale(name, x)
    if "_" in name:
        return reduce(x, *name.split("_"))
    return ELEMENTWISE[name](x)


def exponential(x: Value) -> Value:
    number = np.exp(np.minimum(x.number, 80))
    error = number * np.expm1(np.minimum(x.error, 100))
    return value(number, error, x, special=x.number > 80)


def logarithm(x: Value) -> Value:
    size = np.maximum(np.abs(x.number), 1e-12)
    least = np.maximum(size - x.error, 1e-12)
    error = np.log((size + x.error) / least)
    return value(np.log(size), error, x, special=np.abs(x.number) < 1e-12)


ELEMENTWISE: dict[str, Callable[[Value], Value]] = {
    "neg": lambda x: value(-x.number, x.error, x),
    "abs": lambda x: value(np.abs(x.number), x.error, x),
    "skip": lambda x: x,
    "sqr": lambda x: power(x, 2.0),
    "sqrt": lambda x: power(x, 0.5),
    "exp": exponential,
    "log": logarithm,
    "tanh": lambda x: value(np.tanh(x.number), np.minimum(x.error, 2), x),
}
AXIS: dict[str, Any] = {"row": 1, "col": 0, "matrix": (0, 1)}


def reduce(x: Value, left: str, kind: str) -> Value:
    def over(array: Array, how: Any) -> Array:
        return np.asarray(how(array, axis=AXIS[left], keepdims=True))

    count = x.number.size / over(x.number, np.sum).size
    ways: dict[str, Callable[[], tuple[Array, Array]]] = {
        "sum": lambda: (over(x.number, np.sum), over(x.error, np.sum)),
        "mean": lambda: (over(x.number, np.mean), over(x.error, np.sum) / count),
        "max": lambda: (over(x.number, np.max), over(x.error, np.max)),
        "norm": lambda: (_norm(x.number, left), _norm(x.error, left)),
    }
    number, error = ways[kind]()
    flags = (over(flag, np.any) for flag in (x.is_out, x.is_special, x.is_rough))
    return value(number, error, Value(number, error, *flags))


def _norm(array: Array, left: str) -> Array:
    largest = np.max(np.abs(array), axis=AXIS[left], keepdims=True)
    scaled = array / np.where(largest > 0, largest, 1)
    return np.asarray(largest * np.sqrt(np.sum(scaled**2, axis=AXIS[left], keepdims=True)))


def scale(name: str, x: Value) -> Value:
    lowest, mean = x.number.min(), x.number.mean()
    spread = x.number.max() - lowest
    start, width = (lowest, spread) if name == "minmax" else (mean, x.number.std())
    worst = x.error.max()
    is_constant = spread == 0
    number = np.zeros_like(x.number) if is_constant else (x.number - start) / width
    error = (x.error + worst + np.abs(number) * 2 * worst) / (1.0 if is_constant else width)
    flags = (
        np.broadcast_to(flag.any(), number.shape) for flag in (x.is_out, x.is_special, x.is_rough)
    )
    # Its square on the way to a standard deviation has to be within float64.
    rough = (width <= 8 * worst and worst > 0) or not np.isfinite(width)
    return value(number, error, Value(number, error, *flags), rough=rough)


def layer(kind: str, seed: int) -> dict[str, Array]:
    """The features of a small layer of this kind, float32 numbers."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, row in FEATURES.items():
        by_row, by_column = AXES[row.shape]
        shape = (OUT if by_row else 1, IN if by_column else 1)
        found[name] = np.exp(rng.normal(0, 1.5, shape))
        if not row.nonnegative:
            found[name] *= rng.choice([-1, 1], shape)
    _make(kind, found, rng)
    size = np.abs(found["W"])
    found["R1"], found["C1"] = size.sum(1, keepdims=True), size.sum(0, keepdims=True)
    found["R2"], found["C2"] = (np.sqrt((size**2).sum(axis, keepdims=True)) for axis in (1, 0))
    return {name: one.astype(np.float32).astype(np.float64) for name, one in found.items()}


def _make(kind: str, found: dict[str, Array], rng: Any) -> None:
    if kind == "zeros":
        found["W"] *= rng.random((OUT, IN)) < 0.6
        found["W"][1] = 0
        found["G"] *= rng.random((OUT, IN)) < 0.6
    elif kind == "dead channels":
        for name in ("X", "X_ms", "X_rms", "X_mean", "X_var", "H"):
            found[name][:, ::3] = 0
    elif kind in ("huge", "tiny"):
        for name in found:
            found[name] *= 1e12 if kind == "huge" else 1e-12
    elif kind == "negative":
        for name, row in FEATURES.items():
            found[name] *= 1 if row.nonnegative else -np.sign(found[name])
    elif kind == "constant":
        for name in found:
            found[name][:] = found[name].flat[0]


@dataclass
class Comparison:
    """One formula on one layer, entry by entry."""

    counts: Counter[str]
    fault: str = ""


def compared(text: str, features: dict[str, Array]) -> Comparison:
    """What prunezero computes of a formula, against its text.

    Raises:
        CriterionError: no formula.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FormulaWarning)
        criterion = Criterion.parse(text)
    if any("the count of what is summed" in str(one.message) for one in caught):
        return Comparison(Counter({"told by a warning of sizes": OUT * IN}))
    typed, printed = computed(text, features), computed(criterion.text, features)
    tensors = {name: torch.from_numpy(features[name]).float() for name in criterion.features}
    ours = evaluate(criterion, tensors, (OUT, IN)).double().broadcast_to(OUT, IN).numpy()
    told = bool(caught) & (typed.is_special | printed.is_special)
    with np.errstate(all="ignore"):
        allowed = 4 * (typed.error + printed.error)
        differs = ~(np.abs(ours - typed.number) <= allowed)
    order = [
        ("left float32 as typed", typed.is_out),
        ("left float32 as simplified", printed.is_out),
        ("told by a warning", told),
        ("rounding decides", typed.is_rough | printed.is_rough),
        ("differ", differs),
        ("equal", np.ones((OUT, IN), bool)),
    ]
    counts, left = Counter[str](), np.ones((OUT, IN), bool)
    for name, mask in order:
        counts[name] = int((left & mask).sum())
        if name == "differ" and counts[name]:
            place = tuple(np.argwhere(left & mask)[0])
            wanted, found = np.broadcast_to(typed.number, (OUT, IN))[place], ours[place]
            return Comparison(counts, f"{text} is {wanted} but {criterion.text} is {found}")
        left &= ~mask
    return Comparison(counts)


def compare_many(formulas: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Counts of entries by what was found of them, and a sentence for each that differs."""
    totals, faults = Counter[str](), []
    layers = {kind: layer(kind, seed) for kind in KINDS}
    for index in range(formulas):
        rng = random.Random(seed * 10**6 + index)
        # Of few words, which meet again: simplification has more to do.
        words = PLAIN if index % 2 else tuple(OPERATORS)
        features = rng.sample(list(FEATURES), rng.randint(1, 3))
        text = random_text(rng, rng.randint(1, 4), operators=words, features=features)
        try:
            found = [compared(text, layers[kind]) for kind in KINDS]
        except CriterionError:
            totals["formulas refused"] += 1
            continue
        totals["formulas"] += 1
        for kind, one in zip(KINDS, found, strict=True):
            totals += one.counts
            faults += [f"{kind}: {one.fault}"] if one.fault else []
        is_equal = all(one.counts["equal"] for one in found)
        totals["formulas with equal entries in all kinds"] += is_equal
    return totals, faults


def main() -> None:
    """Compare as many as asked for, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formulas", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    begin = time.process_time()
    totals, faults = compare_many(chosen.formulas, chosen.seed)
    print("\n".join(faults[:50]))
    entries = sum(count for name, count in totals.items() if not name.startswith("formulas"))
    for name, count in totals.items():
        share = "" if name.startswith("formulas") else f" ({count / entries:.2%} of entries)"
        print(f"{name}: {count}{share}")
    print(f"{len(faults)} differ; {time.process_time() - begin:.0f} CPU seconds")


if __name__ == "__main__":
    main()
