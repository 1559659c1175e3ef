"""`prunezero search --objective` ends at the best by that measure, and says so everywhere."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pyarrow.parquet as parquet

from prunezero.errors import SearchError
from prunezero.pruning.recipes.recipe import Recipe
from tests.cli.conftest import Run, flat, small_space


def test_a_search_by_acceptance_ends_at_the_highest_on_validation_text(run: Run) -> None:
    small_space(Path("small.yaml"))
    typed = "search MODEL --sparsity 0.6 --space small.yaml --budget 8 --name mine"
    result = run(f"{typed} --objective acceptance --json found.json")
    assert result.exit_code == 0, (result.output, result.exception)
    told = flat(result.output)
    rows = parquet.read_table("runs/mine/candidates.parquet").to_pylist()
    validated = [row for row in rows if row["validation_acceptance"] is not None]
    best = max(validated, key=lambda row: (row["validation_acceptance"], -row["slot"]))
    recipe = Recipe.load(Path("runs/mine/recipe.yaml"))
    assert len(validated) >= 3 and recipe.provenance["slot"] == best["slot"]
    assert recipe.provenance["objective"] == "acceptance"
    found = json.loads(Path("found.json").read_text())["rows"]
    assert found[0]["test_acceptance"] == 1.0
    assert found[-1]["validation_acceptance"] == best["validation_acceptance"]
    assert found[-1]["acceptance"] == best["validation_acceptance"]
    windows = found[-1]["window_acceptance"]["test"]
    assert abs(sum(windows) / len(windows) - found[-1]["test_acceptance"]) < 1e-12
    assert f"test acceptance {100 * found[-1]['test_acceptance']:.2f} % against" in told
    assert {row["recipe"] for row in recipe.provenance["measured"]} >= {"dense", "wanda", "mine"}
    with sqlite3.connect("runs/mlflow.db") as database:
        metrics = {key for (key,) in database.execute("select distinct key from latest_metrics")}
    told_of = {"search_acceptance", "validation_acceptance", "test_acceptance", "acceptance"}
    assert {f"eval/{key}" for key in told_of | {"kl", "top1_agreement"}} <= metrics
    assert "search/best_acceptance" in metrics and "search/best_perplexity" not in metrics
    shown, checked = run("show mine"), run("verify mine --top 1")
    assert "objective acceptance" in flat(shown.output) and shown.exit_code == 0
    assert checked.exit_code == 0 and "numbers of acceptance agree" in checked.output
    # What was not typed stays, and another measure is another search.
    assert run("search --name mine --resume --budget 8").exit_code == 0
    refused = run("search --name mine --resume --budget 8 --objective kl")
    assert isinstance(refused.exception, SearchError)
    assert "--objective acceptance, now kl" in str(refused.exception)
