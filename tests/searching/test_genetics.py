"""Every child is a formula of its space, and every space can be searched."""

from __future__ import annotations

import random

import pytest

from prunezero.errors import RecipeError
from prunezero.formula import Criterion
from prunezero.searching.proposing.genetics import as_seen, cross, mutate, random_criterion, tunable
from prunezero.searching.space import SearchSpace, search_spaces


def test_the_folder_holds_the_three_spaces() -> None:
    assert {"formulas", "pruner_zero", "tiny"} <= set(search_spaces())


@pytest.mark.parametrize("name", sorted(search_spaces()))
def test_children_are_formulas_of_the_space(name: str) -> None:
    space = SearchSpace.load(name)
    rng = random.Random(0)
    fresh = [random_criterion(space, rng) for _ in range(60)]
    pool = [criterion for criterion in fresh if criterion is not None]
    assert len(pool) > 50
    children = [mutate(rng.choice(pool), space, rng) for _ in range(60)]
    children += [cross(rng.choice(pool), rng.choice(pool), space, rng) for _ in range(60)]
    found = [criterion for criterion in [*pool, *children] if criterion is not None]
    assert len(found) > 150
    for criterion in found:
        assert space.holds(criterion)
        assert set(criterion.features) <= set(space.features)
        assert Criterion.parse(criterion.text) == criterion
        # What no mask can see was taken away before anything was computed.
        assert as_seen(criterion, space) == criterion
    assert len({criterion.text for criterion in found}) > 40


def test_tuning_keeps_a_formula_at_its_own_numbers_and_moves_it_at_others() -> None:
    for text in ("abs(W)*(100*G1 + X)", "abs(W)*sqrt(X)", "W**2*minmax(G)", "abs(W)*X"):
        criterion = Criterion.parse(text)
        filled, values = tunable(criterion)
        assert Criterion.from_sympy(filled(values)) == criterion
        assert Criterion.from_sympy(filled([1.5 * value for value in values])) != criterion


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"operators": ["ad"]}, "did you mean 'add'"),
        ({"terminals": ["X", "R1"]}, "none varies by weight"),
        ({"compare": "rows"}, "did you mean 'row'"),
        ({"exponents": []}, "'power' needs some"),
        ({"exponents": [100]}, "exponents: an exponent is 100"),
        ({"exponents": [0]}, "and not 0"),
        ({"constants": [1e9]}, "constants: a constant .* too large"),
        ({"crossover": 2}, "crossover"),
        ({"budget": 3}, "not a known key"),
    ],
)
def test_a_faulty_space_is_refused_by_key(change: dict[str, object], complaint: str) -> None:
    from prunezero.pruning.documents import validated

    fields = SearchSpace.load("tiny").model_dump(mode="json") | change
    with pytest.raises(RecipeError, match=complaint):
        validated(SearchSpace, fields, "mine.yaml")


def test_an_unknown_space_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'formulas'"):
        SearchSpace.load("formula")
