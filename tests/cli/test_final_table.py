"""How a search ends: what it says of its winner, and what it leaves."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from prunezero.cli.final_table import verdict
from prunezero.cli.tables import cell
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import with_choices
from prunezero.report.export.page import pruner_page
from prunezero.searching import session
from tests.cli.conftest import Run, flat, small_space

PUBLISHED = ["magnitude", "wanda", "ria", "gblm", "pruner_zero", "fisher"]
ON_SAME_TERMS = [f"{name} +" for name in PUBLISHED]
SPLITS = ("validation", "test")


def row(name: str, validation: float | None, test: float | None, **more: Any) -> dict[str, Any]:
    """A row of results; the windows of a greater perplexity all have a greater loss."""
    losses = [0.01 * place + (test or 0.0) for place in range(5)]
    perplexities = {"validation_perplexity": validation, "test_perplexity": test}
    return {"recipe": name, **perplexities, "window_losses": {"test": losses}, **more}


DENSE = row("dense", 1.0, 1.0)


def test_the_winner_is_held_against_the_best_on_validation_text_not_on_test_text() -> None:
    (told,) = verdict([DENSE, row("wanda", 10.0, 12.0), row("ria", 11.0, 9.0), row("it", 8.0, 9.0)])
    # Of 2 ** 5 signs of five windows, one is all lower.
    assert told == (
        "better than wanda, the best of these on validation text: test perplexity 9.00 against "
        "12.00 (-25.0%; chance of no gain 0.031 over 5 windows)"
    )


def test_a_published_formula_with_the_winners_choices_is_named_and_what_it_leaves_of_the_gain() -> (
    None
):
    rows = [DENSE, row("wanda", 12.0, 12.0), row("ria", 13.0, 13.0)]
    rows += [row("wanda +", 10.5, 10.5), row("ria +", 10.0, 10.0), row("it", 9.0, 9.5)]
    told, left = verdict(rows)
    assert told.startswith("better than ria +, the best of these on validation text: test")
    assert "9.50 against 10.00 (-5.0%" in told
    # The best as published is another one than the best on the same terms.
    assert left == (
        "of the 2.50 that it gains over wanda as published, 0.50 (20%) are left on the same "
        "terms: those are the formula's"
    )


def test_where_recipes_as_published_are_stronger_they_alone_are_named() -> None:
    rows = [DENSE, row("wanda", 10.0, 10.0), row("wanda +", 11.0, 11.0), row("it", 9.0, 9.0)]
    (told,) = verdict(rows)
    assert told.startswith("better than wanda, the best of these")


def test_what_beats_the_published_recipes_by_its_choices_alone_is_told_so() -> None:
    rows = [DENSE, row("wanda", 12.0, 12.0), row("wanda +", 10.0, 10.0), row("it", 10.5, 11.0)]
    told, left = verdict(rows)
    assert told.startswith("no better than wanda +, the best of these on validation text: test")
    assert "11.00 against 10.00 (+10.0%; chance of no gain 1 over 5 windows)" in told
    assert left == (
        "nothing of the 1.00 that it gains over wanda as published is left on the same terms: it "
        "is what the choices around gain"
    )


def test_a_winner_that_does_not_beat_the_recipes_as_published_shares_no_gain() -> None:
    rows = [DENSE, row("wanda", 12.0, 9.0), row("wanda +", 10.0, 10.0), row("it", 9.5, 9.5)]
    told, left = verdict(rows)
    assert told.startswith("better than wanda +")
    assert left == "wanda as published is not beaten"


@pytest.mark.parametrize(
    ("roundings", "word"), [((0.1, 0.3), "better than"), ((0.6, 0.1), "no better than")]
)
def test_a_gain_within_rounding_of_either_row_is_none(
    roundings: tuple[float, float], word: str
) -> None:
    one, other = ({"test_rounding": rounding} for rounding in roundings)
    (told,) = verdict([DENSE, row("wanda", 10.0, 10.0, **one), row("it", 9.0, 9.5, **other)])
    assert told.startswith(f"{word} wanda, ")
    assert told.endswith(f"; {max(roundings):.2f} may be rounding")


@pytest.mark.parametrize("unknown", [(None, 9.0), (9.0, None)])
def test_rows_without_a_number_are_held_against_nobody(
    unknown: tuple[float | None, float | None],
) -> None:
    wanda, winner = row("wanda", 12.0, 12.0), row("it", 9.0, 9.5)
    (told,) = verdict([DENSE, wanda, row("wanda +", *unknown), winner])
    assert told.startswith("better than wanda, ")
    # No sentence of what is left where no recipe was measurable as published.
    (told,) = verdict([DENSE, row("wanda", *unknown), row("wanda +", 10.0, 10.0), winner])
    assert told.startswith("better than wanda +, ")
    nothing = ["no published recipe to compare with was measurable"]
    assert verdict([DENSE, row("wanda", *unknown), winner]) == nothing
    assert verdict([DENSE, wanda, row("it", 9.0, None)]) == nothing


def test_baselines_on_the_winners_terms_stand_in_the_table_and_in_all_that_is_left(
    finished_search: Path,
) -> None:
    rows = json.loads((finished_search / "results.json").read_text())["rows"]
    assert [one["recipe"] for one in rows] == ["dense", *PUBLISHED, *ON_SAME_TERMS, "mine"]
    by_name = {one["recipe"]: one for one in rows}
    recipe = Recipe.load(finished_search / "recipe.yaml")
    for name in PUBLISHED:
        plain, on_same_terms = by_name[name], by_name[f"{name} +"]
        assert on_same_terms["formula"] == plain["formula"]
        assert on_same_terms["compare"] == recipe.compare == "model" != plain["compare"]
        assert on_same_terms["test_perplexity"] != plain["test_perplexity"]
    output = (finished_search.parents[1] / "output").read_text()
    cells = [[part.strip() for part in line.split("│")] for line in output.splitlines()]
    for one in rows:
        numbers = [cell(f"{split}_perplexity", one[f"{split}_perplexity"]) for split in SPLITS]
        assert any(one["recipe"] in line and set(numbers) <= {*line} for line in cells), one
    told = flat(output)
    assert "+: a published formula with the choices of the winner: compare model" in told
    assert all(sentence in told for sentence in verdict(rows))
    measured = recipe.provenance["measured"]
    assert [one["recipe"] for one in measured] == [one["recipe"] for one in rows]
    assert {one["recipe"]: one["test_perplexity"] for one in measured} == {
        one["recipe"]: one["test_perplexity"] for one in rows
    }
    page = flat((finished_search / "pruner.py").read_text())
    assert page == flat(pruner_page(recipe))
    for one in rows[1:]:
        name = one["recipe"].replace(" +", " with these choices")
        sentence = f"{name}: test perplexity {one['test_perplexity']:.2f}, validation"
        assert sentence in page


def test_mlflow_holds_a_run_for_each_baseline_on_the_winners_terms(finished_search: Path) -> None:
    rows = json.loads((finished_search / "results.json").read_text())["rows"]
    tests = {one["recipe"]: one["test_perplexity"] for one in rows}
    wanted = {(f"{name} 0.5 free", "model", tests[name], "baseline") for name in ON_SAME_TERMS}
    with sqlite3.connect(finished_search.parent / "mlflow.db") as database:
        found = database.execute(
            "select runs.name, params.value, latest_metrics.value, tags.value from runs "
            "join params using (run_uuid) join latest_metrics using (run_uuid) "
            "join tags using (run_uuid) where params.key = 'compare' and "
            "latest_metrics.key = 'eval/test_perplexity' and tags.key = 'role' "
            "and runs.name like '% + %'"
        ).fetchall()
    assert len(found) == len(wanted) and set(found) == wanted


def test_a_winner_that_mends_weights_ends_the_search_as_any_other(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = session.found_recipe

    def mending(*arguments: Any) -> Recipe:
        return with_choices(found(*arguments), update="admm")

    small_space(Path("small.yaml"))
    monkeypatch.setattr(session, "found_recipe", mending)
    result = run("search MODEL --sparsity 0.5 --space small.yaml --budget 6 --name mine")
    assert result.exit_code == 0, (result.output, result.exception)
    told = flat(result.output)
    assert "no pruner page: mine has update: admm, which a one-page pruner cannot follow" in told
    assert "pruner: runs" not in told
    assert {"recipe.yaml", "results.json"} <= set(os.listdir("runs/mine"))
    assert "pruner.py" not in os.listdir("runs/mine")
    recipe = Recipe.load(Path("runs/mine/recipe.yaml"))
    assert recipe.updates == ("admm",)
    assert f"choices of the winner: compare {recipe.compare}, update admm" in told
    rows = json.loads(Path("runs/mine/results.json").read_text())["rows"]
    assert {one["recipe"] for one in rows if one["update"] == "admm"} == {*ON_SAME_TERMS, "mine"}
    assert run("show mine").exit_code == 0
    pruned = run("prune MODEL --recipe runs/mine/recipe.yaml --sparsity 0.5 --output pruned")
    assert pruned.exit_code == 0, (pruned.output, pruned.exception)
