"""Enumeration, a strategy: every formula of a space, shortest first.

Long formulas are made of short ones. Of sub-formulas that have the same values on random numbers a
single one is kept to build with (observational equivalence, Udupa et al. 2013, TRANSIT), and of
whole formulas that rank alike a single one is proposed. A search that ends because nothing is left,
and not because there were too many to build with, has seen every mask that a formula of so many
words can make, so its best by layer error is the best of them; `Enumeration.ending` says which.

What a space forbids is never built upon, since it would stay inside; a formula that could only be
written by way of it counts as forbidden too. Of two sub-formulas with the same values both are kept
where an operator may hold the later one and not the earlier one.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor

from prunezero.errors import CriterionError
from prunezero.formula.canonical import combine
from prunezero.formula.constants import number
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import FEATURES
from prunezero.formula.functions import AXES
from prunezero.formula.vocabulary import OPERATORS, Operator
from prunezero.scoring.feature_values import feature
from prunezero.scoring.score import evaluate
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.task import Task
from prunezero.searching.history import History
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.strategies.evolution import Proposal, Proposals
from prunezero.searching.strategies.genetics import as_seen

# Sub-formulas of one size to build with; what would need more is left out.
MOST_BLOCKS = 20_000
# Size of the weight on whose random values formulas are told apart.
_SHAPE = (6, 8)
# Features are looked at in three sizes, for an operator that saturates may hide one in two of them.
_SCALES = (1.0, 1e-4, 1e2)
# Two values are equal when they agree to about this many parts of one: five digits.
_PARTS = 1e5
# Operators whose arguments may change places.
_COMMUTATIVE = {"add", "mul"}


class Enumeration:
    """The proposals of one search; each generation goes on where the last one stopped."""

    ending = ""
    """one sentence once nothing is left to propose: was that all, and if not, how far it came"""

    def __init__(self, task: Task, most: int) -> None:
        self._space = task.space
        self._compare = task.competing({})
        self._blocks = Blocks(task.space, most)
        self._proposals = self._all()

    def __call__(self, history: History, generation: int) -> Proposals:
        """What is left; the memory changes nothing."""
        return self._proposals

    def _all(self) -> Iterator[Proposal]:
        """One proposal for all formulas that rank alike."""
        seen: set[str] = set()
        for block in self._blocks:
            try:
                criterion = as_seen(block, self._space, self._compare)
            except CriterionError:
                continue
            if criterion.text not in seen and self._space.holds(criterion):
                seen.add(criterion.text)
                yield Proposal(Rule(criterion), "enumerate")
        self.ending = self._blocks.ending


def enumerate_formulas(task: Task, *, most: int = MOST_BLOCKS) -> Enumeration:
    """Every formula of the space in order of size; the seed changes nothing.

    Args:
        most: sub-formulas of one size; the proposals end before there are more.
    """
    return Enumeration(task, most)


class Blocks:
    """The formulas of a space that differ in their values, shortest first, whatever they rank.

    A terminal, a number and an operator are one word each, and no formula has more words than
    `space.max_complexity`.
    """

    def __init__(self, space: SearchSpace, most: int = MOST_BLOCKS) -> None:
        """Begin with none.

        Args:
            most: of one size; iteration ends before there are more.
        """
        self.tried = 0
        """expressions that were built, those with known values among them"""
        self.kept = 0
        """expressions that are built upon"""
        self.size = 0
        """words of those that are built now; of the last ones once iteration ended"""
        self.is_complete = False
        """whether iteration ended since no formula is left, not since there were too many"""
        self._space = space
        self._most = most
        drawn = _random_features(space)
        self._features = [
            {name: value * scale for name, value in drawn.items()} for scale in _SCALES
        ]
        # What is known by its values, and the watched operators of each formula that has them.
        self._values: dict[bytes, list[frozenset[str]]] = {}
        # Expressions by number of words.
        self._by_size: list[list[Any]] = [[]]

    def __iter__(self) -> Iterator[Criterion]:
        """Those that are no mere number, each as soon as it is found."""
        for size in range(1, self._space.max_complexity + 1):
            self.size = size
            self._by_size.append([])
            for expression in self._built(size):
                self.tried += 1
                found = self._new(expression)
                if found is None:
                    continue
                if len(self._by_size[size]) == self._most:
                    return
                self.kept += 1
                if isinstance(found, Criterion):
                    self._by_size[size].append(found.sympy)
                    yield found
                else:
                    self._by_size[size].append(found)
        self.is_complete = True

    @property
    def ending(self) -> str:
        """How iteration ended, in one sentence."""
        space = self._space
        name, most = space.name, space.max_complexity
        if self.is_complete:
            is_open = space.choices or space.criteria or space.ratios
            choices = " at its default choices" if is_open else ""
            return (
                f"space '{name}' is certified: every ranking that its formulas of up to {most} "
                f"words make{choices} was proposed, as far as random numbers tell formulas apart, "
                "so of those that did not fail none has a smaller layer error than the best found"
            )
        return (
            f"space '{name}' is not certified: of {self.size} words more than {self._most} "
            f"sub-formulas differ, so every ranking of up to {self.size - 1} words was seen, some "
            f"of {self.size}, and none of more; lower max_complexity from {most}, or take words out"
        )

    def _new(self, expression: Any) -> Criterion | sympy.Rational | None:
        """The expression as a formula or a number; None if it is forbidden or its values known."""
        watched = frozenset[str]()
        if isinstance(expression, sympy.Rational):
            found, key = expression, f"{float(expression):.5g}".encode()
        else:
            try:
                found = Criterion.from_sympy(expression)
            except CriterionError:
                return None
            if self._space.forbids(found):
                return None
            watched = self._space.watched(found)
            key = b"".join(self._key(found, features) for features in self._features)
        known = self._values.setdefault(key, [])
        # One that holds no more than this one may stand wherever this one may.
        if any(others <= watched for others in known):
            return None
        known.append(watched)
        return found

    def _key(self, criterion: Criterion, features: dict[str, Tensor]) -> bytes:
        seen = {name: features[name] for name in criterion.features}
        return _key(criterion, evaluate(criterion, seen, _SHAPE))

    def _built(self, size: int) -> Iterator[Any]:
        """Every expression of this many words that is made of shorter blocks; not canonical."""
        if size == 1:
            yield from (terminal.sympy for terminal in self._space.terminals)
            yield from map(number, self._space.constants)
        for name in self._space.operators:
            for arguments in self._arguments(OPERATORS[name], size):
                try:
                    yield combine(OPERATORS[name], *arguments)
                except CriterionError:
                    continue

    def _arguments(self, operator: Operator, size: int) -> Iterator[tuple[Any, ...]]:
        """What the operator can be applied to so that the whole has this many words."""
        blocks = self._by_size
        if operator.name == "power":
            exponents = list(map(number, self._space.exponents))
            yield from itertools.product(blocks[max(0, size - 2)], exponents)
        elif operator.arity == 1:
            yield from zip(blocks[size - 1], strict=True)
        elif operator.name in _COMMUTATIVE:
            for left in range(1, (size - 1) // 2 + 1):
                right = size - 1 - left
                if left == right:
                    yield from itertools.combinations_with_replacement(blocks[left], 2)
                else:
                    yield from itertools.product(blocks[left], blocks[right])
        else:
            for left in range(1, size - 1):
                yield from itertools.product(blocks[left], blocks[size - 1 - left])


def _random_features(space: SearchSpace) -> dict[str, Tensor]:
    """Values of the features of a small layer: random, but for those that follow from the weight.

    They are about 1, where no operator saturates.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_SHAPE, generator=generator)
    values: dict[str, Tensor] = {}
    for name in space.features:
        row = FEATURES[name]
        if row.inputs == ("weight",):
            values[name] = feature(name, weight)
            continue
        shape = [
            size if varies else 1 for size, varies in zip(_SHAPE, AXES[row.shape], strict=True)
        ]
        drawn = torch.rand(shape, generator=generator) + 0.5
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        values[name] = drawn if row.nonnegative else drawn * signs
    return values


def _key(criterion: Criterion, values: Tensor) -> bytes:
    """Equal for formulas of the same shape whose values agree to five digits.

    The shape matters: the sum over a row of what does not vary in it is that value itself.
    """
    fractions, exponents = np.frexp(np.nan_to_num(values.double().numpy()))
    digits = np.rint(fractions * _PARTS).astype(np.int32)
    digest = hashlib.blake2b(criterion.shape.encode(), digest_size=16)
    digest.update(digits.tobytes())
    digest.update(np.where(digits == 0, 0, exponents).astype(np.int32).tobytes())
    return digest.digest()
