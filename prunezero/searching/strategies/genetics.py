"""Genetic operators on formulas: random trees, mutation, crossover; functions of (tree, rng).

A tree is the criterion's own SymPy expression. A child is built in raw form and becomes a
`Criterion`, so it is simplified before anyone looks at it; what no mask can see is taken
away (`formula/ranking.py`), and a child that is no formula of the space is drawn again, from the
same generator, up to a limit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import sympy

from prunezero.errors import CriterionError
from prunezero.formula.canonical import combine, with_arguments
from prunezero.formula.constants import number
from prunezero.formula.criterion import Criterion
from prunezero.formula.ranking import ranking_form
from prunezero.formula.vocabulary import OPERATORS
from prunezero.searching.spaces.space import SearchSpace

# How often a child is drawn again before the parent's place is given up.
MAX_DRAWS = 50
# A constant or exponent is nudged by about this factor.
_NUDGE = 1.5

# A place in a tree: the index of the argument to follow at each level.
Path = tuple[int, ...]


def draw(
    build: Callable[[], Any],
    space: SearchSpace,
    *,
    compare: str | None = None,
    as_ranked: bool = True,
) -> Criterion | None:
    """The first formula of the space among up to MAX_DRAWS that `build` makes; None if none is.

    Args:
        compare: see `as_seen`.
        as_ranked: take away what no mask can see; else the formula stays as it was built.
    """
    for _ in range(MAX_DRAWS):
        try:
            criterion = Criterion.from_sympy(build())
            if as_ranked:
                criterion = as_seen(criterion, space, compare)
        except CriterionError:
            continue
        if space.holds(criterion):
            return criterion
    return None


def as_seen(criterion: Criterion, space: SearchSpace, compare: str | None = None) -> Criterion:
    """The simplest formula that ranks as this one does; itself where the space cannot write that.

    Args:
        compare: which weights compete; None takes the widest group of the space, so that nothing
            is taken away that the mask of any of its rules could see.

    Raises:
        CriterionError: it ranks nothing in such groups.
    """
    form = Criterion.from_sympy(ranking_form(criterion.sympy, compare or space.widest_group))
    return form if space.speaks(form) and not space.forbids(form) else criterion


def random_criterion(
    space: SearchSpace,
    rng: random.Random,
    *,
    compare: str | None = None,
    as_ranked: bool = True,
) -> Criterion | None:
    """A fresh formula of the space, grown to at most `space.fresh_depth`."""

    def fresh() -> Any:
        return random_tree(space, rng, space.fresh_depth)

    return draw(fresh, space, compare=compare, as_ranked=as_ranked)


def mutate(
    parent: Criterion,
    space: SearchSpace,
    rng: random.Random,
    *,
    compare: str | None = None,
    as_ranked: bool = True,
) -> Criterion | None:
    """A formula that differs from its parent in one place."""

    def child() -> Any:
        return rng.choice(MUTATIONS)(parent.sympy, space, rng)

    return draw(child, space, compare=compare, as_ranked=as_ranked)


def cross(
    mother: Criterion,
    father: Criterion,
    space: SearchSpace,
    rng: random.Random,
    *,
    compare: str | None = None,
    as_ranked: bool = True,
) -> Criterion | None:
    """The mother with one of her sub-formulas exchanged for one of the father's."""

    def child() -> Any:
        scion = _at(father.sympy, _place(father.sympy, space, rng))
        return _replaced(mother.sympy, _place(mother.sympy, space, rng), scion)

    return draw(child, space, compare=compare, as_ranked=as_ranked)


def random_tree(space: SearchSpace, rng: random.Random, depth: int) -> Any:
    """A raw tree of the space's words, of at most `depth` levels."""
    if depth <= 1 or rng.random() < 0.2:
        return _leaf(space, rng)
    name = rng.choice(space.operators)
    operator = OPERATORS[name]
    first = random_tree(space, rng, depth - 1)
    if name == "power":
        return combine(operator, first, number(rng.choice(space.exponents)))
    if operator.arity == 1:
        return combine(operator, first)
    return combine(operator, first, random_tree(space, rng, depth - 1))


def _leaf(space: SearchSpace, rng: random.Random) -> Any:
    if space.constants and rng.random() < 0.15:
        return number(rng.choice(space.constants))
    return rng.choice(space.terminals).sympy


def _grow(tree: Any, space: SearchSpace, rng: random.Random) -> Any:
    """One sub-formula exchanged for a fresh one."""
    return _replaced(tree, _place(tree, space, rng), random_tree(space, rng, 3))


def _wrap(tree: Any, space: SearchSpace, rng: random.Random) -> Any:
    """One sub-formula put inside an operator."""
    path = _place(tree, space, rng)
    inner = _at(tree, path)
    name = rng.choice(space.operators)
    if name == "power":
        return _replaced(
            tree, path, combine(OPERATORS[name], inner, number(rng.choice(space.exponents)))
        )
    if OPERATORS[name].arity == 1:
        return _replaced(tree, path, combine(OPERATORS[name], inner))
    return _replaced(tree, path, combine(OPERATORS[name], inner, _leaf(space, rng)))


def _hoist(tree: Any, space: SearchSpace, rng: random.Random) -> Any:
    """One sub-formula exchanged for one of its own parts, so the tree gets smaller."""
    path = _place(tree, space, rng)
    part = _at(tree, path)
    is_leaf = not part.args or part in _leaves(space)
    return _replaced(tree, path, _leaf(space, rng) if is_leaf else rng.choice(part.args))


def _nudge(tree: Any, space: SearchSpace, rng: random.Random) -> Any:
    """One number moved a little, or one sub-formula raised to a power."""
    has_power = "power" in space.operators
    numbers = [
        path
        for path in _paths(tree, _leaves(space), numbers=True)
        if _is_number(_at(tree, path))
        and (has_power if _is_exponent(tree, path) else bool(space.constants))
    ]
    if numbers:
        path = rng.choice(numbers)
        value = float(_at(tree, path)) * _NUDGE ** rng.uniform(-1, 1)
        return _replaced(tree, path, number(float(format(value, ".3g"))))
    if not has_power:
        return _grow(tree, space, rng)
    path = _place(tree, space, rng)
    exponent = number(rng.choice(space.exponents))
    return _replaced(tree, path, combine(OPERATORS["power"], _at(tree, path), exponent))


MUTATIONS: tuple[Callable[[Any, SearchSpace, random.Random], Any], ...] = (
    _grow,
    _wrap,
    _hoist,
    _nudge,
)


def tunable(criterion: Criterion) -> tuple[Callable[[Sequence[float]], Any], list[float]]:
    """A formula as a function of its numbers, and their values now.

    The numbers are its constants and exponents, and the exponent 1 of every factor but the first
    of a product at the root; the power of the whole would change no mask.
    """
    tree = criterion.sympy
    if isinstance(tree, sympy.Mul):
        tree = _with_open_exponents(tree)
    paths = [path for path in _paths(tree, numbers=True) if _is_number(_at(tree, path))]
    values = [float(_at(tree, path)) for path in paths]

    def filled(numbers: Sequence[float]) -> Any:
        result = tree
        for path, value in zip(paths, numbers, strict=True):
            result = _replaced(result, path, number(float(format(value, ".4g"))), rebuild=False)
        return result

    return filled, values


def _with_open_exponents(product: Any) -> Any:
    factors = [factor for factor in product.args if not _is_number(factor)]
    opened = [
        factor
        if isinstance(factor, sympy.Pow) or index == 0
        else sympy.Pow(factor, sympy.Integer(1), evaluate=False)
        for index, factor in enumerate(factors)
    ]
    return sympy.Mul(*opened, evaluate=False)


def _place(tree: Any, space: SearchSpace, rng: random.Random) -> Path:
    return rng.choice(list(_paths(tree, _leaves(space))))


def _leaves(space: SearchSpace) -> set[Any]:
    """The terminals, which are never taken apart."""
    return {terminal.sympy for terminal in space.terminals}


def _paths(
    tree: Any, leaves: Set[Any] = frozenset(), *, numbers: bool = False, at: Path = ()
) -> Iterator[Path]:
    """Every place in a tree, from the root down; places of numbers only when asked for."""
    if numbers or not _is_number(tree):
        yield at
    if tree not in leaves:
        for index, argument in enumerate(tree.args):
            yield from _paths(argument, leaves, numbers=numbers, at=(*at, index))


def _is_number(node: Any) -> bool:
    return isinstance(node, sympy.Rational)


def _is_exponent(tree: Any, path: Path) -> bool:
    return bool(path) and path[-1] == 1 and isinstance(_at(tree, path[:-1]), sympy.Pow)


def _at(tree: Any, path: Path) -> Any:
    for index in path:
        tree = tree.args[index]
    return tree


def _replaced(tree: Any, path: Path, part: Any, *, rebuild: bool = True) -> Any:
    """The tree with another part at a place; what is above is simplified if it is rebuilt."""
    if not path:
        return part
    index, *rest = path
    arguments = list(tree.args)
    arguments[index] = _replaced(arguments[index], tuple(rest), part, rebuild=rebuild)
    if rebuild:
        return with_arguments(tree, arguments)
    return tree.func(*arguments, evaluate=False)
