"""`--signals` keeps a search from all that costs more, and its folder tells."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import PruneZeroError
from prunezero.models.observing import calibration
from prunezero.report.runs.summary import read_candidates
from tests.cli.conftest import Run, small_space

SEARCH = "search MODEL --sparsity 0.5 --space small.yaml --budget 6"


def test_a_search_without_gradients_makes_none_and_remembers_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("gradients were collected")

    monkeypatch.setattr(calibration, "gradient_statistics", refused)
    small_space(Path("small.yaml"))
    result = run(f"{SEARCH} --name few --signals activations --json o.json")
    assert result.exit_code == 0, result.exception
    names = [row["recipe"] for row in json.loads(Path("o.json").read_text())["rows"]]
    assert "wanda" in names and not {"gblm", "pruner_zero"} & set(names)
    asked = json.loads(Path("runs/few/search.json").read_text())
    assert asked["signals"] == "activations"
    assert not asked["space_content"]["weighted_by_gradient"]
    assert not {"G", "G1", "F", "D"} & set(asked["space_content"]["terminals"])
    rows = read_candidates(Path("runs/few")) or []
    assert {row["signal"] for row in rows} <= {"none", "activations"}
    assert "signals   activations, the costliest" in run("show few").output
    with sqlite3.connect("runs/mlflow.db") as database:
        (told,) = database.execute("select value from params where key = 'signals'").fetchall()
    assert told == ("activations",)
    again = run(f"{SEARCH} --name few --signals activations --resume")
    assert again.exit_code == 0, again.exception
    other = run("search --name few --budget 6 --resume --signals gradients")
    assert "--signals activations, now gradients" in str(other.exception)


@pytest.mark.parametrize(
    ("signals", "sentence"),
    [("activation", "did you mean 'activations'"), ("none", "allow costlier signals")],
)
def test_signals_that_leave_nothing_are_one_sentence(signals: str, sentence: str, run: Run) -> None:
    small_space(Path("small.yaml"), terminals=["abs(W)*X", "G"])
    result = run(f"{SEARCH} --signals {signals}")
    assert isinstance(result.exception, PruneZeroError)
    assert sentence in str(result.exception) and "\n" not in str(result.exception)
    assert not Path("runs/mlflow.db").exists()
