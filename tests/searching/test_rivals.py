"""The published recipes that a search is compared with."""

from __future__ import annotations

from pathlib import Path

from prunezero.searching.experiment.baselines import baselines
from prunezero.searching.session import measure_baselines, open_session
from tests.searching.testbed import make_task, tiny_space, tiny_testbed

MENDING = {"update": [["none"], ["admm"]]}

FORMULAS = ("magnitude", "wanda", "ria", "gblm", "pruner_zero", "fisher")


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
