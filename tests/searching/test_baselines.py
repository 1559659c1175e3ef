"""The published recipes that a search is compared with, as they are and on its terms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunezero.formula import Criterion
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.searching.experiment.baselines import (
    baselines,
    choices_in_words,
    on_terms_of,
)
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.session import (
    measure_baselines,
    measure_on_same_terms,
    open_session,
)
from tests.searching.testbed import make_task, tiny_space, tiny_testbed

FORMULAS = ("magnitude", "wanda", "ria", "gblm", "pruner_zero", "fisher")
MENDING = {"update": [["none"], ["admm"]]}


def test_formulas_are_compared_by_the_same_dense_statistics() -> None:
    found = baselines(make_task(tiny_space(), None, pattern="2:4"))
    assert [recipe.name for recipe in found] == list(FORMULAS)
    assert {(recipe.statistics, recipe.pattern) for recipe in found} == {("dense", "2:4")}


def test_a_search_that_mends_weights_is_compared_with_methods_that_do(tmp_path: Path) -> None:
    task = make_task(tiny_space(choices=MENDING), 0.5)
    found = {recipe.name: recipe for recipe in baselines(task)}
    assert list(found) == [*FORMULAS, "sparsegpt", "admm"]
    # As their papers have it: later layers see what pruned ones make of the text.
    assert found["admm"].statistics == found["sparsegpt"].statistics == "sequential"
    session = open_session([tiny_testbed()], task, tmp_path / "run")
    rows = list(measure_baselines(session, ("validation",)))
    session.rungs.close()
    assert [row["recipe"] for row in rows] == ["dense", *found]
    assert rows[-1]["statistics"] == "sequential" and rows[-1]["validation_perplexity"]


def test_without_gradients_nobody_needs_them() -> None:
    space = tiny_space(terminals=["abs(W)", "X"], choices=MENDING)
    names = [recipe.name for recipe in baselines(make_task(space, 0.5))]
    assert names == ["magnitude", "wanda", "ria", "sparsegpt", "admm"]


MINE = Criterion.parse("abs(W)*sqrt(X)")
# What the recipe of a rule leaves to its space.
USUAL = {"compare": "model"}
ON_SAME_TERMS = [f"{name} +" for name in FORMULAS]


def found_in(task: Any, **choices: Any) -> Recipe:
    """What a search of this task might find, with these choices around its formula."""
    recipe: Recipe = task.recipe(Rule(MINE, {**USUAL, **choices}), "it")
    return recipe


def names(recipes: list[Recipe]) -> list[str]:
    return [recipe.name for recipe in recipes]


def test_where_all_layers_compete_each_formula_is_asked_to_compete_so() -> None:
    task = make_task(tiny_space(), 0.5)
    found = found_in(task)
    recipes, refused = on_terms_of(found, task)
    assert names(recipes) == ON_SAME_TERMS and not refused
    for recipe, published in zip(recipes, baselines(task), strict=True):
        assert recipe.criterion == published.criterion != found.criterion
        assert recipe.compare == "model" and recipe.updates == ()
        assert not (recipe.source or recipe.provenance or recipe.published or recipe.note)


def test_a_baseline_whose_own_choices_are_the_winners_has_one_row() -> None:
    task = make_task(tiny_space(), 0.5)
    # Magnitude competes in layers, all others in rows.
    rows, _ = on_terms_of(found_in(task, compare="row"), task)
    layers, _ = on_terms_of(found_in(task, compare="layer"), task)
    assert names(rows) == ["magnitude +"]
    assert names(layers) == [name for name in ON_SAME_TERMS if name != "magnitude +"]


def test_a_pattern_says_itself_who_competes_so_no_row_is_measured_twice() -> None:
    task = make_task(tiny_space(), None, pattern="2:4")
    for compare in ("model", "row", "layer"):
        assert on_terms_of(found_in(task, compare=compare), task) == ([], {})
    # Beside another budget that lets all layers compete, it matters again.
    both = make_task(tiny_space(), 0.5, also=("2:4",))
    assert names(on_terms_of(found_in(both), both)[0]) == ON_SAME_TERMS


def test_updates_and_formulas_of_some_layers_are_the_winners_as_far_as_they_are_choices() -> None:
    task = make_task(tiny_space(choices=MENDING), None, pattern="2:4")
    plain = found_in(task, update="admm")
    found = plain.model_copy(update={"criteria": {"q_proj": Criterion.parse("abs(W)")}})
    recipes, refused = on_terms_of(found, task)
    assert not refused
    # The formula of sparsegpt is asked to be mended as the winner is; that of admm is wanda's.
    assert names(recipes) == [*ON_SAME_TERMS, "sparsegpt +"]
    assert {recipe.updates for recipe in recipes} == {("admm",)}
    assert {recipe.pattern for recipe in recipes} == {"2:4"}
    # A formula for some layers is no choice around a formula.
    assert not any(recipe.criteria for recipe in recipes)


def test_a_baseline_that_excludes_the_winners_choices_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Recipe(name="of_rows", criterion=Criterion.parse("R2"), compare="layer")
    mine.save(tmp_path / "of_rows.yaml")
    chosen = ("wanda", str(tmp_path / "of_rows.yaml"))
    monkeypatch.setitem(UNITS, "weight", replace(UNITS["weight"], baselines=chosen))
    task = make_task(tiny_space(), 0.5)
    session = open_session([tiny_testbed()], task, tmp_path / "run")
    try:
        recipes, refused = on_terms_of(found_in(task, compare="row"), task)
        rows = list(measure_on_same_terms(session, found_in(task, compare="row"), ("test",)))
    finally:
        session.rungs.close()
    assert recipes == [] and list(refused) == ["of_rows +"]
    assert "ranks nothing there" in refused["of_rows +"]
    assert rows == [{"recipe": "of_rows +", "fault": refused["of_rows +"]}]


def test_rows_on_the_winners_terms_are_those_of_its_recipe_with_another_formula(
    tmp_path: Path,
) -> None:
    task = make_task(tiny_space(), 0.5)
    session = open_session([tiny_testbed()], task, tmp_path / "run")
    found = found_in(task)
    rows = list(measure_on_same_terms(session, found, ("test",)))
    assert [row["recipe"] for row in rows] == ON_SAME_TERMS
    wanda = found.model_copy(update={"criterion": Recipe.load("wanda").criterion})
    expected = session.rungs.measure(wanda, ("test",))
    session.rungs.close()
    assert rows[1]["test_perplexity"] == expected["test_perplexity"]
    assert len({row["test_perplexity"] for row in rows}) > 1


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({}, "compare model"),
        ({"compare": "row", "update": ["swaps", "admm"]}, "compare row, update swaps, admm"),
        ({"compare": "row", "allocate": "owl"}, "compare row, allocate owl"),
        ({"permute": "heuristic", "pattern": "2:4"}, "compare model, permute heuristic"),
        (
            {"schedule": "iterative", "recover": "tune"},
            "compare model, schedule iterative, recover tune",
        ),
    ],
)
def test_choices_are_told_as_far_as_they_are_unusual(choices: dict[str, Any], words: str) -> None:
    recipe = Recipe.model_validate({"name": "it", "criterion": MINE, **USUAL, **choices})
    assert choices_in_words(recipe) == words
