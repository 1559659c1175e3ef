"""Which operators stand inside which? What a search space forbids is looked up here.

A formula is looked at as it is computed, by the steps of `formula/code.py`, since its canonical
form has lost the words it was drawn with: `X*X`, `X**2` and `sqr(X)` are one step, `sqr`. A
terminal of the space is one word, and what it is made of is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from prunezero.formula.code import Step, steps, written_out
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import FEATURES
from prunezero.formula.vocabulary import OPERATORS

# Squares and square roots are steps of their own; whoever speaks of powers means them too.
_POWERS = {"sqr", "sqrt"}

# Words that a formula is computed with though its space may lack them: X*X is sqr, X + X is mul.
_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "power", "neg", "abs", "sqr", "sqrt"})

Words = frozenset[str]


def computed_words(operators: Sequence[str]) -> Words:
    """The words of the steps that formulas of these operators may take."""
    return _ARITHMETIC.union(*map(_computed_by, operators))


def _computed_by(word: str) -> Words:
    """The operator, or those that it is computed by where it is written in other words."""
    row = OPERATORS[word]
    if row.torch is not None:
        return Words([word])
    values = [FEATURES[name].symbol for name in ("W", "X")]
    written = Criterion.from_sympy(row.build(*values[: row.arity]))
    return Words(step.operator.name for step in steps(written))


def nested_words(
    criterion: Criterion, terminals: tuple[Criterion, ...]
) -> list[tuple[Words, Words]]:
    """For each step outside the terminals: its words, and those of all steps in its arguments.

    A terminal that a sum, a product or a power took apart is none any more.
    """
    leaves = _last_steps(terminals)
    taken = steps(criterion)
    named = {step.name: step for step in taken}
    written = written_out(taken)
    found: dict[str, tuple[Words, Words]] = {}

    def words(name: str) -> Words:
        if name not in named or written[name] in leaves:
            return Words()
        if name not in found:
            inside = Words().union(*map(words, named[name].arguments))
            found[name] = _words_of(named[name]), inside
        own, inside = found[name]
        return own | inside

    if taken:
        words(taken[-1].name)
    return list(found.values())


def _words_of(step: Step) -> Words:
    word = step.operator.name
    return Words([word, "power"] if word in _POWERS else [word])


@lru_cache(maxsize=64)
def _last_steps(terminals: tuple[Criterion, ...]) -> Words:
    """The step that gives the value of each terminal; a single feature is no step."""
    taken = [steps(terminal) for terminal in terminals]
    return frozenset(written_out(one)[one[-1].name] for one in taken if one)
