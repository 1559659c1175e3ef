"""What a space forbids to stand inside what, no draw, seed, number or enumeration writes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import sympy

from prunezero.errors import RecipeError
from prunezero.formula import Criterion
from prunezero.pruning.recipes.documents import validated
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.history import History
from prunezero.searching.search import search
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.strategies.enumeration import Blocks, enumerate_formulas
from prunezero.searching.strategies.genetics import as_seen, cross, mutate, random_criterion
from tests.searching.test_strategies import SPACE, PlantedRungs
from tests.searching.testbed import bare_task, make_task, tiny_space

CURVES = ("exp", "log", "tanh")
NO_CURVE_IN_A_CURVE = {word: list(CURVES) for word in CURVES}
ONE_LINE = {
    "terminals": ["abs(W)", "X"],
    "constants": [],
    "exponents": [],
    "choices": {},
    "tuned": 0,
}


def nests_a_curve(criterion: Criterion) -> bool:
    """Looked for in SymPy's tree, not in our steps."""
    kinds = (sympy.exp, sympy.log, sympy.tanh)
    return any(node.args[0].atoms(*kinds) for node in criterion.sympy.atoms(*kinds))


@pytest.mark.parametrize(
    ("forbid", "formula", "is_held"),
    [
        ({"exp": ["log"]}, "exp(abs(W)*log(X))", False),
        ({"exp": ["log"]}, "exp(tanh(1 + sqrt(log(X) + W)))", False),
        ({"exp": ["log"]}, "log(exp(W) + X)", True),
        ({"exp": ["log"]}, "exp(W)*log(X)", True),
        # what simplification takes away was never there
        ({"exp": ["log"]}, "exp(log(X) - log(X) + W)", True),
        # words as they are computed, whatever they were written as
        ({"exp": ["sqr"]}, "exp(W*W)", False),
        ({"exp": ["sqr"]}, "exp(abs(W)**1.5)", True),
        ({"exp": ["power"]}, "exp(W*W)", False),
        ({"exp": ["power"]}, "exp(sqrt(X)*W)", False),
        ({"exp": ["power"]}, "exp(abs(W)**1.5)", False),
        ({"exp": ["sqrt"]}, "exp(X**0.5*W)", False),
        ({"exp": ["mul"]}, "exp(W + W)", False),
        ({"exp": ["div"]}, "exp(W + X**-1)", False),
        ({"power": ["tanh"]}, "sqrt(tanh(W) + X)", False),
        ({"power": ["power"]}, "(W**2 + X)**0.75", False),
        ({"power": ["power"]}, "W**2*X**0.75", True),
        ({"sqrt": ["abs"]}, "sqrt(W + X)", False),
        ({"sqrt": ["abs"]}, "sqrt(R1 + X)*W", True),
    ],
)
def test_a_space_refuses_what_stands_inside_what_it_must_not(
    forbid: dict[str, list[str]], formula: str, is_held: bool
) -> None:
    criterion = Criterion.parse(formula)
    assert tiny_space(forbid={}).holds(criterion)
    assert tiny_space(forbid=forbid).holds(criterion) == is_held


def test_terminals_are_words_that_nobody_looks_into() -> None:
    whole = {"terminals": ["log(abs(W))", "exp(tanh(X))", "Y"], "forbid": NO_CURVE_IN_A_CURVE}
    space = tiny_space(**whole)
    for formula in ("exp(tanh(X))*abs(W)", "tanh(log(abs(W)) + Y)", "log(exp(tanh(X)) + abs(W))"):
        assert space.holds(Criterion.parse(formula))
    # beside a terminal its own part is looked at as any other
    assert not space.holds(Criterion.parse("tanh(tanh(X)*W)"))
    assert not space.holds(Criterion.parse("log(abs(W)) + tanh(exp(log(abs(W))*Y))"))


def test_draws_mutants_and_children_obey() -> None:
    space, free = tiny_space(forbid=NO_CURVE_IN_A_CURVE), tiny_space()
    rng = random.Random(0)
    pool = [one for one in (random_criterion(space, rng) for _ in range(80)) if one]
    found = [mutate(rng.choice(pool), space, rng) for _ in range(80)]
    found += [cross(rng.choice(pool), rng.choice(pool), space, rng) for _ in range(80)]
    known = [one for one in [*pool, *found] if one is not None]
    assert len(known) > 200 and not any(map(nests_a_curve, known))
    # without the key they would not have
    lax = [one for one in (random_criterion(free, random.Random(n)) for n in range(300)) if one]
    assert any(map(nests_a_curve, lax))


def test_a_published_formula_that_nests_what_is_forbidden_is_no_seed() -> None:
    def seeds(**changes: Any) -> set[str]:
        return {seed.text for seed in make_task(tiny_space(**changes), 0.5).seeds}

    assert seeds() - seeds(forbid={"mul": ["minmax"]}) == {"W**2*minmax(G)"}


def test_a_formula_stays_as_it_is_where_its_simplest_form_is_forbidden() -> None:
    criterion = Criterion.parse("sqrt(abs(W))*tanh(X)**0.25")
    simplest = Criterion.parse("abs(W)*sqrt(abs(tanh(X)))")
    assert as_seen(criterion, tiny_space()) == simplest
    space = tiny_space(forbid={"sqrt": ["tanh"]})
    assert as_seen(criterion, space) == criterion and space.holds(criterion)


class Tuning(PlantedRungs):
    """Finds that every formula is better with something around a part that the space forbids."""

    def tunings(self, rules: Sequence[Rule], trials: int) -> Iterator[dict[str, Any]]:
        for rule in rules:
            self.asked["tuning"] += 1
            yield {"formula": f"exp(tanh(X)) + {rule.criterion.text}"}


def test_numbers_that_make_a_forbidden_nesting_are_not_taken() -> None:
    for forbid, is_taken in (({}, True), ({"exp": ["tanh"]}, False)):
        words = {"operators": [*SPACE.operators, "exp", "tanh"], "forbid": forbid, "tuned": 2}
        space = SearchSpace.model_validate({**SPACE.model_dump(mode="json"), **words})
        rungs: Any = Tuning(space=space)
        found = list(search(rungs, max_candidates=12))
        assert rungs.asked["tuning"] and found
        assert ("tune" in {one.origin for one in found}) == is_taken


def test_enumeration_leaves_out_what_is_forbidden_and_nothing_else() -> None:
    small = {**ONE_LINE, "operators": ["mul", "add", "abs", "log", "tanh"], "max_complexity": 6}
    curves = ["log", "tanh"]

    def texts(forbid: dict[str, list[str]]) -> set[str]:
        task = bare_task(tiny_space(**small, forbid=forbid))
        drawn = enumerate_formulas(task)(History(), 0)
        return {one.rule.criterion.text for one in drawn if one is not None}

    free = texts({})
    allowed = {text for text in free if not nests_a_curve(Criterion.parse(text))}
    assert len(free) > len(allowed) > 20
    assert texts({word: curves for word in curves}) == allowed


def test_enumeration_never_builds_upon_what_is_forbidden() -> None:
    small = {**ONE_LINE, "operators": ["mul", "exp", "tanh"], "max_complexity": 5}
    free = Blocks(tiny_space(**small))
    strict = Blocks(tiny_space(**small, forbid={"exp": ["exp", "tanh"], "tanh": ["exp", "tanh"]}))
    found = list(free), list(strict)
    assert any(map(nests_a_curve, found[0])) and not any(map(nests_a_curve, found[1]))
    assert 4 * strict.tried < 3 * free.tried


def test_enumeration_keeps_equal_values_apart_where_one_may_be_put_and_one_may_not() -> None:
    """log(|W| X) is found first, and may not stand under a root here; its other spelling may."""
    small = {**ONE_LINE, "operators": ["mul", "add", "log", "sqrt"], "max_complexity": 6}
    spelled = {"log(abs(W)*X)", "log(abs(W)) + log(X)"}
    whole = "sqrt(abs(log(abs(W)) + log(X)))"
    free = {one.text for one in Blocks(tiny_space(**small))}
    strict = {one.text for one in Blocks(tiny_space(**small, forbid={"sqrt": ["mul"]}))}
    assert len(spelled & free) == 1 and whole not in free
    assert spelled < strict and whole in strict
    assert "sqrt(abs(log(abs(W)*X)))" in free - strict


@pytest.mark.parametrize(
    ("forbid", "complaint"),
    [
        ({"ex": ["log"]}, "forbid: 'ex' is not a known operator; did you mean 'exp'"),
        ({"exp": ["lgo"]}, "forbid: 'lgo' is not a known operator; did you mean 'log'"),
        ({"exp": ["mul"]}, "forbid: 'exp' is no operator of this space"),
        ({"power": ["tanh"]}, "forbid: 'tanh' is no operator of this space"),
        ({"power": ["skip"]}, "forbid: 'skip' becomes other words"),
        ({"power": "power"}, "forbid.*tuple"),
        (["power"], "forbid.*dictionary"),
    ],
)
def test_a_faulty_key_is_refused_by_its_word(forbid: object, complaint: str) -> None:
    fields = SearchSpace.load("tiny").model_dump(mode="json") | {"forbid": forbid}
    with pytest.raises(RecipeError, match=complaint):
        validated(SearchSpace, fields, "mine.yaml")


def test_words_that_arithmetic_makes_of_others_may_be_forbidden_where_they_are_not_drawn() -> None:
    fields = SearchSpace.load("tiny").model_dump(mode="json") | {"forbid": {"sqrt": ["sqr"]}}
    space = validated(SearchSpace, fields, "mine.yaml")
    assert "sqr" not in space.operators
    assert not space.holds(Criterion.parse("sqrt(W*W + X)"))
    pruner_zero = SearchSpace.load("pruner_zero").model_dump(mode="json")
    fields = pruner_zero | {"forbid": {"exp": ["matrix_norm"]}}
    space = validated(SearchSpace, fields, "mine.yaml")
    assert not space.holds(Criterion.parse("exp(divide_by_norm(abs(W), X))"))
