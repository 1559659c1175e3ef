"""A search that ends by itself says whether it saw everything."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from prunezero.formula import Criterion
from prunezero.searching.history import History
from prunezero.searching.search import search
from prunezero.searching.strategies.catalogue import STRATEGIES
from prunezero.searching.strategies.enumeration import Blocks, enumerate_formulas
from prunezero.searching.strategies.evolution import ending
from tests.searching.test_strategies import PlantedRungs, small_space


def task() -> Any:
    return PlantedRungs(space=small_space()).task


def test_an_enumeration_that_saw_everything_certifies_its_space() -> None:
    propose = enumerate_formulas(task())
    assert ending(propose) == ""
    proposals = propose(History(), 0)
    assert len(list(itertools.islice(proposals, 20))) == 20
    # A budget or a time limit may end it here, and then nothing is known.
    assert ending(propose) == ""
    assert list(propose(History(), 1))
    assert ending(propose).startswith("space 'formulas' is certified: every ranking")
    assert "up to 7 words make at its default choices was proposed" in ending(propose)


def test_a_formula_that_saturates_for_some_values_is_not_taken_for_a_shorter_one() -> None:
    terminals = tuple(map(Criterion.parse, ("abs(W)", "G")))
    words = {"terminals": terminals, "operators": ("mul", "tanh"), "constants": (100.0,)}
    space = small_space().model_copy(update=words)
    found = {criterion.text for criterion in Blocks(space)}
    assert "abs(W)*tanh(100*G)" in found and "abs(W)" in found


def test_an_enumeration_that_had_too_many_to_build_with_says_how_far_it_came() -> None:
    propose = enumerate_formulas(task(), most=8)
    assert list(propose(History(), 0))
    whole = Blocks(small_space())
    sizes = []
    for _ in whole:
        sizes.append(whole.size)
    full = next(size for size in range(1, 8) if sizes.count(size) > 8)
    said = ending(propose)
    assert "is not certified" in said and f"of {full} words more than 8 sub-formulas differ" in said
    assert f"every ranking of up to {full - 1} words was seen" in said
    assert "lower max_complexity from 7" in said


def test_a_strategy_without_an_end_says_nothing_of_it() -> None:
    for word in ("evolution", "random", "optuna", "plain-gp"):
        assert ending(STRATEGIES[word].start(task())) == ""


@pytest.mark.parametrize(("max_candidates", "is_told"), [(None, True), (1000, True), (10, False)])
def test_a_search_passes_on_how_its_strategy_ended(
    max_candidates: int | None, is_told: bool
) -> None:
    told: list[str] = []
    rungs: Any = PlantedRungs(space=small_space())
    found = list(
        search(rungs, strategy="enumeration", max_candidates=max_candidates, ended=told.append)
    )
    assert found and len(told) == is_told
    assert all("is certified" in sentence for sentence in told)


def test_a_search_that_was_stopped_says_nothing_of_an_end() -> None:
    """The last proposal was made, and not all of them were screened."""
    told: list[str] = []
    rungs: Any = PlantedRungs(space=small_space().model_copy(update={"generation": 1000}))

    def stop() -> bool:
        return rungs.asked["layer error"] >= 20

    assert list(search(rungs, strategy="enumeration", stop=stop, ended=told.append))
    assert told == []
