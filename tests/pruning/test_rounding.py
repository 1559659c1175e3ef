"""What rounding alone changes in a figure is measured and shown."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prunezero.cli.tables import results_table
from prunezero.pruning.compare import compare, rounding
from prunezero.pruning.recipes.recipe import Recipe
from tests.searching.testbed import tiny_testbed, tiny_text


def test_the_reversed_bench_has_the_same_calibration_windows_in_the_opposite_order() -> None:
    testbed = tiny_testbed()
    drawn, back = testbed.windows("calibration"), testbed.reversed().windows("calibration")
    assert len(drawn) > 1 and not torch.equal(drawn, back)
    assert [ids.tolist() for ids in back] == [ids.tolist() for ids in drawn][::-1]
    for split in ("search", "validation", "test"):
        assert torch.equal(testbed.reversed().windows(split), testbed.windows(split))
    assert torch.equal(testbed.reversed().reversed().windows("calibration"), drawn)


def test_in_reverse_the_windows_of_each_source_stay_at_its_places() -> None:
    parts = (replace(tiny_text(), name="plain"), replace(tiny_text(), name="spoken"))
    testbed = replace(tiny_testbed(), text=replace(tiny_text(), name="both", parts=parts))
    back = testbed.reversed()
    assert back.sources("calibration") == testbed.sources("calibration")
    drawn, again = testbed.windows("calibration"), back.windows("calibration")
    for turn in range(2):
        assert torch.equal(again[turn::2], drawn[turn::2].flip(0))


@pytest.mark.parametrize("statistics", ["dense", "sequential"])
def test_only_recipes_that_mend_weights_are_pruned_again_in_reverse(statistics: str) -> None:
    testbed = tiny_testbed()
    recipes = [Recipe.load("wanda"), Recipe.load("sparsegpt")]
    dense, wanda, sparsegpt = compare(testbed, recipes, 0.5, statistics=statistics)
    assert "test_rounding" not in dense and "test_rounding" not in wanda
    back = testbed.reversed()
    (_, again) = compare(back, recipes[1:], 0.5, statistics=statistics, with_rounding=False)
    for split in ("validation", "test"):
        change = abs(sparsegpt[f"{split}_perplexity"] - again[f"{split}_perplexity"])
        assert sparsegpt[f"{split}_rounding"] == change
    assert "test_rounding" not in again


def test_a_perplexity_that_is_no_number_has_no_rounding() -> None:
    row = {"test_perplexity": float("inf"), "validation_perplexity": 3.0}
    again = {"test_perplexity": float("inf"), "validation_perplexity": 3.5}
    assert rounding(row, again, ("validation", "test")) == {"validation_rounding": 0.5}


def test_the_table_shows_rounding_beside_the_figure_it_belongs_to() -> None:
    row = {"recipe": "a", "validation_perplexity": 31.5, "test_perplexity": 40.0, "kl": 1.0}
    table = results_table([row, {**row, "recipe": "b", "test_rounding": 0.25}], "rows")
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["test"] == ["40.00", "40.00 ±0.25"]
    assert cells["validation"] == ["31.50", "31.50"]


def test_recipes_that_choose_weights_alone_mend_none() -> None:
    assert Recipe.load("sparsegpt").mends and Recipe.load("admm").mends
    assert not any(Recipe.load(name).mends for name in ("wanda", "ria", "gblm", "magnitude"))
