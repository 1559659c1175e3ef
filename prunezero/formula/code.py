"""A criterion as steps that a machine can take: the engine, a kernel, an exported page.

One walk over the canonical expression yields the steps; what differs is only the language in which
a step is written. Equal sub-formulas are computed once. Because the engine runs the very lines that
export writes, a found formula and its exported pruner cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from prunezero.formula.algebra import joint_shape, negated, power
from prunezero.formula.criterion import Criterion
from prunezero.formula.functions import shape_of
from prunezero.formula.printing import is_negated, split_quotient, split_sum
from prunezero.formula.vocabulary import OPERATORS, Operator

_HALF = sympy.Rational(1, 2)


@dataclass(frozen=True)
class Step:
    """One operation on named values."""

    # t1, t2, ... in the order of evaluation
    name: str
    operator: Operator
    # names of earlier steps or features, or numbers such as "0.5"
    arguments: tuple[str, ...]
    # shape of the result: "element", "row", "column" or "scalar"
    shape: str


def steps(criterion: Criterion) -> list[Step]:
    """The operations that compute a criterion, each after those it needs.

    The list is empty for a criterion that is a single feature.
    """
    walk = _Walk([], {})
    _value(criterion.sympy, walk)
    return walk.steps


def written_out(taken: Sequence[Step]) -> dict[str, str]:
    """Each step by name, in words that are equal for equal sub-formulas of any formulas."""
    texts: dict[str, str] = {}
    for step in taken:
        arguments = ",".join(texts.get(name, name) for name in step.arguments)
        texts[step.name] = f"{step.operator.name}({arguments})"
    return texts


@dataclass(frozen=True)
class Split:
    """The steps of a criterion in two parts, so that the second can be taken piece by piece."""

    # those that look at many elements, or give one value for a row, a column or the layer, with all
    # that they are made from
    before: tuple[Step, ...]
    # those that follow, each of which sees one element at a time
    inside: tuple[Step, ...]


def split_steps(criterion: Criterion) -> Split:
    """The steps of a criterion, those for whole matrices first."""
    taken = {step.name: step for step in steps(criterion)}
    if not taken:
        return Split((), ())
    last = list(taken)[-1]
    inside = _needed(last, taken, only_inside=True)
    read = [argument for name in inside for argument in taken[name].arguments] or [last]
    outside = [name for name in read if name in taken and name not in inside]
    before = dict.fromkeys(inner for name in outside for inner in _needed(name, taken))
    return Split(tuple(taken[name] for name in before), tuple(taken[name] for name in inside))


def _is_before(step: Step) -> bool:
    return step.shape != "element" or step.operator.triton is None


def _needed(name: str, taken: dict[str, Step], *, only_inside: bool = False) -> list[str]:
    """The steps that a value is made from, itself included, each after those it needs."""
    if name not in taken or (only_inside and _is_before(taken[name])):
        return []
    order: dict[str, None] = {}
    for argument in taken[name].arguments:
        order |= dict.fromkeys(_needed(argument, taken, only_inside=only_inside))
    return [*order, name]


def torch_lines(criterion: Criterion) -> list[str]:
    """Torch statements that compute a criterion; the last one assigns `score`.

    Features are float32 variables under their own names. A value that is used once stands inside
    the line that uses it, unless that line needs it twice.
    """
    taken = steps(criterion)
    return lines_of(taken) if taken else [f"score = {criterion.text}"]


def plain_line(step: Step) -> str:
    """The torch statement that assigns one step's value to its name."""
    return f"{step.name} = {(step.operator.torch or '').format(*step.arguments)}"


def lines_of(taken: Sequence[Step]) -> list[str]:
    """`torch_lines` of some steps, of which the last one is the score."""
    uses = Counter(argument for step in taken for argument in step.arguments)
    inline: dict[str, str] = {}
    lines = []
    for step in taken:
        text = _written(step, inline)
        if step is taken[-1]:
            lines.append(f"score = {text}")
        elif uses[step.name] == 1 and not _needed_twice(step.name, taken):
            inline[step.name] = text
        else:
            lines.append(f"{step.name} = {text}")
    return lines


def _written(step: Step, inline: dict[str, str]) -> str:
    """The step in torch, with earlier values written out where `inline` holds them."""
    template = step.operator.torch or ""
    values = []
    for index, name in enumerate(step.arguments):
        text = inline.get(name, name)
        has_brackets = f"({{{index}}})" in template or f"({{{index}}}," in template
        is_safe = name not in inline or has_brackets or _is_call(text)
        values.append(text if is_safe else f"({text})")
    return template.format(*values)


def _needed_twice(name: str, taken: Sequence[Step]) -> bool:
    user = next(step for step in taken if name in step.arguments)
    place = f"{{{user.arguments.index(name)}}}"
    return (user.operator.torch or "").count(place) > 1


def _is_call(text: str) -> bool:
    """Whether the text is one call, `f(...)`, that needs no brackets of its own."""
    name, bracket, rest = text.partition("(")
    if not bracket or not name.replace(".", "").replace("_", "").isalnum():
        return False
    open_brackets = 1
    for index, letter in enumerate(rest):
        open_brackets += (letter == "(") - (letter == ")")
        if open_brackets == 0:
            return index == len(rest) - 1
    return False


@dataclass(frozen=True)
class _Walk:
    steps: list[Step]
    # names of the values already computed, by what they compute
    names: dict[tuple[str, tuple[str, ...]], str]

    def take(self, operator: str, *arguments: str, shape: str) -> str:
        key = operator, arguments
        if key not in self.names:
            self.names[key] = f"t{len(self.steps) + 1}"
            self.steps.append(Step(self.names[key], OPERATORS[operator], arguments, shape))
        return self.names[key]


def _value(node: Any, walk: _Walk) -> str:
    if isinstance(node, sympy.Symbol):
        return str(node.name)
    if isinstance(node, sympy.Rational):
        return repr(float(node))
    if isinstance(node, sympy.Add):
        return _sum(node, walk)
    if isinstance(node, sympy.Mul):
        return _product(node, walk)
    if isinstance(node, sympy.Pow) and not isinstance(node, sympy.exp):
        return _power(node, walk)
    inner = _value(node.args[0], walk)
    return walk.take(type(node).__name__.lower(), inner, shape=shape_of(node))


def _sum(node: Any, walk: _Walk) -> str:
    added, taken = split_sum(node)
    terms = [("add", term) for term in added] + [("sub", term) for term in taken]
    operator, first = terms[0]
    value, shapes = _value(first, walk), [first]
    if operator == "sub":
        value = walk.take("neg", value, shape=shape_of(first))
    for operator, term in terms[1:]:
        shapes.append(term)
        value = walk.take(operator, value, _value(term, walk), shape=joint_shape(shapes))
    return value


def _product(node: Any, walk: _Walk) -> str:
    if is_negated(node):
        return walk.take("neg", _value(negated(node), walk), shape=shape_of(node))
    above, below = split_quotient(node)
    first = above[0] if above else sympy.Integer(1)
    value, shapes = _value(first, walk), [first]
    for operator, factor in [("mul", f) for f in above[1:]] + [("div", f) for f in below]:
        shapes.append(factor)
        value = walk.take(operator, value, _value(factor, walk), shape=joint_shape(shapes))
    return value


def _power(node: Any, walk: _Walk) -> str:
    base, exponent = node.args
    shape = shape_of(node)
    if exponent.is_negative:
        below = _value(power(base, -exponent), walk)
        return walk.take("div", "1.0", below, shape=shape)
    value = _value(base, walk)
    if exponent == _HALF:
        return walk.take("sqrt", value, shape=shape)
    if exponent == 2:
        return walk.take("sqr", value, shape=shape)
    if not exponent.is_integer:
        return walk.take("power", value, repr(float(exponent)), shape=shape)
    # Whole powers by multiplication: every backend then rounds alike, and signs are kept.
    result = walk.take("sqr", value, shape=shape)
    for _ in range(int(exponent) - 2):
        result = walk.take("mul", result, value, shape=shape)
    return result
