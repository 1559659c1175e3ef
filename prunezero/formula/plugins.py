"""Which operators do other packages add, and can a formula use them?

A package names its rows under the entry point group `prunezero.operators`, in its pyproject.toml:

    [project.entry-points."prunezero.operators"]
    sigmoid = "mypackage:SIGMOID"

A row is loaded and checked when its word is first used. One that cannot be used is an error for
whoever writes its word, a line of `prunezero list operators`, and nothing to anybody else. No
package can give another meaning to a word of ours.
"""

from __future__ import annotations

import ast
import functools
import keyword
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import sympy

from prunezero.errors import CriterionError, reason
from prunezero.formula.features import FEATURES
from prunezero.formula.functions import NAMED, Elementwise
from prunezero.formula.operators import SIGNS, Operator

# Where other packages name their operators.
GROUP = "prunezero.operators"

# What a build of another package is tried on: values of either sign, one of them composed.
_VALUES = (FEATURES["W"].symbol + FEATURES["X_mean"].symbol, FEATURES["W"].symbol)
# Nodes that the canonical form knows; those of NAMED by their names.
_NODES = (sympy.Symbol, sympy.Rational, sympy.Float, sympy.Add, sympy.Mul, sympy.Pow, sympy.Abs)


class Vocabulary(Mapping[str, Operator]):
    """Operators by their words: ours, and those of other packages, which load when asked for.

    A word that cannot be used raises CriterionError, which says why.
    """

    def __init__(self, own: Mapping[str, Operator]) -> None:
        self.own = own
        """the rows of prunezero itself"""
        self._loaded: dict[EntryPoint, Operator] = {}

    def __getitem__(self, word: str) -> Operator:
        if word in self.own:
            return self.own[word]
        # Features are asked for most; other packages are not looked up for them.
        if word in FEATURES or word not in _points():
            raise KeyError(word)
        return self._load(_points()[word][0])

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from (word for word in _points() if word not in self.own and _can_be_written(word))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def others(self) -> dict[EntryPoint, Operator | CriterionError]:
        """Every row of another package, or why it cannot be used."""
        found: dict[EntryPoint, Operator | CriterionError] = {}
        for point in (point for points in _points().values() for point in points):
            try:
                found[point] = self._load(point)
            except CriterionError as error:
                found[point] = error
        return found

    def plugged(self) -> dict[str, str]:
        """What results depend on beside prunezero's own rows: the meaning of each plugged word.

        Empty where no other package adds an operator that can be used.
        """
        rows = [row for row in self.others().values() if isinstance(row, Operator)]
        return {row.name: _meaning(row) for row in sorted(rows, key=lambda row: row.name)}

    def _load(self, point: EntryPoint) -> Operator:
        """The row behind an entry point, checked.

        Raises:
            CriterionError: its name is taken or cannot be written, or the row cannot be used.
        """
        if point not in self._loaded:
            try:
                self._check_name(point)
                self._loaded[point] = _checked(_object(point), point.name)
            except _Unfit as fault:
                raise CriterionError(
                    f"operator '{point.name}' of {point.value} {fault}"
                ) from fault.__cause__
        return self._loaded[point]

    def _check_name(self, point: EntryPoint) -> None:
        if point.name in self.own or point.name in FEATURES:
            raise _Unfit("would redefine a word of prunezero; give it another name")
        if not _can_be_written(point.name):
            raise _Unfit("cannot be written in a formula; use small letters, digits and _")
        others = [other.value for other in _points()[point.name] if other != point]
        if others:
            raise _Unfit(f"is also that of {others[0]}; uninstall one of the two packages")


class _Unfit(Exception):
    """What is wrong with an operator, as the end of a sentence that begins with its name."""


@functools.cache
def _points() -> dict[str, list[EntryPoint]]:
    """The entry points by name; a name that several packages use has several."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def _can_be_written(word: str) -> bool:
    # Formulas are printed in small letters.
    return re.fullmatch("[a-z][a-z0-9_]*", word) is not None and not keyword.iskeyword(word)


def _object(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        raise _Unfit(f"cannot be loaded: {type(error).__name__}: {reason(error)}") from error


def _checked(row: Any, name: str) -> Operator:
    """The row, if a formula can use it.

    Raises:
        _Unfit: it cannot.
    """
    if not isinstance(row, Operator):
        raise _Unfit(f"is a {type(row).__name__}, not an Operator")
    if row.name != name:
        raise _Unfit(f"calls itself '{row.name}'; give row and entry point the same name")
    if row.arity not in (1, 2):
        raise _Unfit(f"has arity {row.arity}; an operator takes 1 or 2 values")
    if row.sign not in SIGNS:
        raise _Unfit(f"has the sign '{row.sign}'; use one of {', '.join(SIGNS)}")
    for text, module in ((row.torch, "torch"), (row.triton, "tl")):
        if text is not None and not _is_expression(text, row.arity, module):
            raise _Unfit(
                f"has the text {text!r}, which is no expression of its values, such as "
                f"{module}.abs({{0}}), that names nothing else than {module}"
            )
    _check_build(row)
    return row


def _is_expression(text: Any, arity: int, module: str) -> bool:
    """Whether a text holds every value of the operator, and no name but that of one module."""
    values = {f"value{index}" for index in range(arity)}
    try:
        if not text.isprintable() or "#" in text:
            # It stands inside a longer line, which it must not end.
            return False
        tree = ast.parse(f"({text.format(*sorted(values))})", mode="eval")
    except (AttributeError, LookupError, SyntaxError, ValueError):
        return False
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return values <= names <= {*values, module}


def _check_build(row: Operator) -> None:
    """Refuse a build that fails, makes what is no formula, or whose value nothing computes."""
    values = _VALUES[: row.arity]
    try:
        built = row.build(*values)
    except Exception as error:
        raise _Unfit(f"cannot be built: {type(error).__name__}: {reason(error)}") from error
    if not isinstance(built, sympy.Basic):
        raise _Unfit(f"builds a {type(built).__name__}, not a SymPy expression")
    foreign = [_name(node) for node in sympy.preorder_traversal(built) if not _is_known(node, row)]
    if foreign:
        raise _Unfit(
            f"cannot be computed: it builds '{foreign[0]}', which is no word of a formula; make "
            "the row by `elementwise`, or build it of words of prunezero"
        )
    is_new = any(_is_own(node, row) for node in sympy.preorder_traversal(built))
    if is_new and (row.arity != 1 or built.args != values):
        raise _Unfit("builds itself inside another expression; build it of other words alone")
    if is_new and row.torch is None:
        raise _Unfit("cannot be computed: it has no torch text")
    if not is_new and (row.torch is not None or row.triton is not None):
        raise _Unfit(
            "has a torch or Triton text, which nobody would read, since it builds other words; "
            "leave the text out, or make the row by `elementwise`"
        )


def _is_known(node: Any, row: Operator) -> bool:
    if isinstance(node, Elementwise):
        return _is_own(node, row) or _name(node) in _points()
    return isinstance(node, (*_NODES, sympy.exp, *NAMED))


def _is_own(node: Any, row: Operator) -> bool:
    return isinstance(node, Elementwise) and _name(node) == row.name


def _name(node: Any) -> str:
    return type(node).__name__


def _meaning(row: Operator) -> str:
    texts = [str(row.build(*_VALUES[: row.arity])), row.torch, row.triton, row.sign]
    return "; ".join(text for text in texts if text is not None)
