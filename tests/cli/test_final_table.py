"""How a search ends: what it says of its winner, and what it leaves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import with_choices
from prunezero.searching import session
from tests.cli.conftest import Run, flat, small_space


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
    assert Recipe.load(Path("runs/mine/recipe.yaml")).updates == ("admm",)
    assert run("show mine").exit_code == 0
    pruned = run("prune MODEL --recipe runs/mine/recipe.yaml --sparsity 0.5 --output pruned")
    assert pruned.exit_code == 0, (pruned.output, pruned.exception)
