"""What a criterion is: a SymPy expression over the vocabulary that ranks the weights of a layer.

The lower the value, the sooner the weight goes. Two criteria are equal when their canonical
expressions are, whatever text they were written as.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy

from prunezero.errors import CriterionError, FormulaWarning, did_you_mean
from prunezero.formula.algebra import negated
from prunezero.formula.canonical import canonical, combine
from prunezero.formula.changes import changes
from prunezero.formula.constants import number
from prunezero.formula.feature_row import costliest
from prunezero.formula.features import FEATURES
from prunezero.formula.functions import shape_of
from prunezero.formula.printing import is_negated, latex_of, split_quotient, split_sum, text_of
from prunezero.formula.reading import MAX_DEPTH, MAX_NODES, check_readable, read
from prunezero.formula.vocabulary import OPERATORS

# Pruner-Zero's code by its own names; `W`, `X` and `G` are what it stores under those letters:
# |W|, the sum of squared inputs per sequence, and the root of summed squares of 100 g.
_PRUNER_ZERO_TERMINALS = {"W": "abs(W)", "X": "X**2", "G": "100*G"}
_PRUNER_ZERO_UNARY = {
    "neg": "neg",
    "abs": "abs",
    "sqr": "sqr",
    "pow": "sqr",
    "sqrt": "sqrt",
    "exp": "exp",
    "tanh": "tanh",
    "skp": "skip",
    "mms": "minmax",
    "zsn": "zscore",
}
_PRUNER_ZERO_BINARY = {"add": "add", "sub": "sub", "mul": "mul", "div": "divide_by_norm"}


@dataclass(frozen=True)
class Criterion:
    """A formula that says how much each weight matters.

    Build one with `Criterion.parse("abs(W) * X")` or `Criterion.from_sympy(expression)`.
    """

    # canonical, over the symbols of FEATURES
    sympy: Any = field(repr=False)
    # the same, as `parse` reads it
    text: str

    @classmethod
    def parse(cls, text: str) -> Criterion:
        """Read a formula such as `abs(W) * sqrt(X)`.

        Raises:
            CriterionError: it is no formula over the vocabulary, or ranks nothing.

        Warns:
            FormulaWarning: the formula means its simplified form, which somewhere differs from the
                text; see `algebra.py`.
        """
        return _told(lambda: read(text), " ".join(text.split()))

    @classmethod
    def from_sympy(cls, expression: sympy.Expr) -> Criterion:
        """Take a SymPy expression whose symbols bear the names of features.

        Raises:
            CriterionError: it holds what the vocabulary does not, or ranks nothing.
        """
        settled = canonical(expression)
        if not settled.free_symbols:
            raise CriterionError("the formula is a constant and ranks nothing; use a feature")
        text = text_of(settled)
        check_readable(text)
        return cls(settled, text)

    @classmethod
    def from_pruner_zero(cls, tree: Mapping[str, Any]) -> Criterion:
        """Take a tree in Pruner-Zero's JSON form: nodes of `data`, `left`, `right`.

        Operators keep the meaning that its code gives them: `div` divides by the norm of the whole
        second operand, `log` is log(|x| + 0.001), `pow` squares, `X` is a sum of squares.

        Raises:
            CriterionError: the tree is damaged or holds an unknown operator.

        Source: Dong et al. 2024, arXiv:2406.02924.
        """
        _check_tree(tree)
        return _told(lambda: _from_pruner_zero(tree, MAX_DEPTH), "this tree")

    def __str__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Criterion) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __reduce__(self) -> tuple[Callable[[str], Criterion], tuple[str]]:
        # Functions such as row_norm are classes that no other process can look up.
        return Criterion.parse, (self.text,)

    @cached_property
    def latex(self) -> str:
        """The formula in LaTeX, in the letters of the papers."""
        return latex_of(self.sympy)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that are equal for equal formulas."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()

    @cached_property
    def features(self) -> tuple[str, ...]:
        """The features it looks at, in the order of the vocabulary."""
        used = {symbol.name for symbol in self.sympy.free_symbols}
        return tuple(name for name in FEATURES if name in used)

    @cached_property
    def signal(self) -> str:
        """The costliest signal it needs, one of SIGNALS."""
        return costliest(FEATURES[name].cost for name in self.features)

    @cached_property
    def shape(self) -> str:
        """Whether it varies by "element", "row", "column", or not at all ("scalar")."""
        return shape_of(self.sympy)

    @cached_property
    def complexity(self) -> int:
        """How many words it takes: one for each feature, number and operator."""
        return complexity_of(self.sympy)

    @cached_property
    def depth(self) -> int:
        """How deeply it is nested; a single feature has depth 1."""
        return _depth(self.sympy)


def _told(build: Callable[[], Any], typed: str) -> Criterion:
    """The criterion that `build` makes; a warning says where it differs from what was typed."""
    with changes() as while_read:
        expression = build()
    with changes() as afterwards:
        criterion = Criterion.from_sympy(expression)
    points = sorted(while_read | afterwards)
    if points:
        warnings.warn(
            f"{typed} is read as {criterion.text}, which differs from it {', and '.join(points)}",
            FormulaWarning,
            stacklevel=3,
        )
    return criterion


def complexity_of(node: Any) -> int:
    """How many words the text of an expression takes: features, numbers and operators."""
    if isinstance(node, sympy.Add):
        # A minus sign in a sum is the operator of its term.
        added, taken = split_sum(node)
        return sum(map(complexity_of, [*added, *taken])) + len(node.args) - bool(added)
    if isinstance(node, sympy.Mul) or _is_negative_power(node):
        if is_negated(node):
            return 1 + complexity_of(negated(node))
        above, below = split_quotient(node)
        factors = [*(above or [sympy.Integer(1)]), *below]
        return sum(map(complexity_of, factors)) + len(factors) - 1
    if isinstance(node, sympy.Pow) and not isinstance(node, sympy.exp):
        is_one_word = node.args[1] == sympy.Rational(1, 2)
        return complexity_of(node.args[0]) + (1 if is_one_word else 2)
    return 1 + sum(map(complexity_of, node.args))


def _is_negative_power(node: Any) -> bool:
    is_power = isinstance(node, sympy.Pow) and not isinstance(node, sympy.exp)
    return is_power and bool(node.args[1].is_negative)


def _depth(node: Any) -> int:
    return 1 + max((_depth(argument) for argument in node.args), default=0)


def _check_tree(tree: object) -> None:
    """Refuse what has more nodes than a text may have words."""
    level, count = [tree], 0
    while level and count <= MAX_NODES:
        count += len(level)
        nodes = [node for node in level if isinstance(node, Mapping)]
        sides = (node.get(side) for node in nodes for side in ("left", "right"))
        level = [side for side in sides if side is not None]
    if level:
        raise CriterionError(f"a Pruner-Zero tree may have at most {MAX_NODES} nodes")


def _from_pruner_zero(node: Any, depth: int) -> Any:
    if not isinstance(node, Mapping) or not isinstance(node.get("data"), str) or depth == 0:
        raise CriterionError(
            f"a Pruner-Zero tree needs nodes with 'data', at most {MAX_DEPTH} deep"
        )
    word = node["data"]
    if word in _PRUNER_ZERO_TERMINALS:
        return read(_PRUNER_ZERO_TERMINALS[word])
    if word in _PRUNER_ZERO_BINARY:
        sides = (_from_pruner_zero(node.get(side), depth - 1) for side in ("left", "right"))
        return combine(OPERATORS[_PRUNER_ZERO_BINARY[word]], *sides)
    if word not in _PRUNER_ZERO_UNARY and word != "log":
        known = [*_PRUNER_ZERO_TERMINALS, *_PRUNER_ZERO_UNARY, "log", *_PRUNER_ZERO_BINARY]
        near = did_you_mean(word, known) or "."
        raise CriterionError(
            f"'{word}' is no operator of Pruner-Zero{near} Known: {', '.join(known)}."
        )
    child = node["left"] if node.get("left") is not None else node.get("right")
    inner = _from_pruner_zero(child, depth - 1)
    if word == "log":
        shifted = combine(OPERATORS["add"], combine(OPERATORS["abs"], inner), number(0.001))
        return combine(OPERATORS["log"], shifted)
    return combine(OPERATORS[_PRUNER_ZERO_UNARY[word]], inner)
