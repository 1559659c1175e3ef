"""A search over several draws of calibration text, as a user runs it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from prunezero.errors import SearchError
from tests.cli.conftest import Run, flat, small_space


def test_a_search_over_draws_reports_shows_verifies_and_goes_on(run: Run) -> None:
    small_space(Path("small.yaml"))
    begun = "search MODEL --sparsity 0.5 --space small.yaml --seed 5 --name drawn"
    result = run(f"{begun} --draws 2 --budget 6 --json drawn.json")
    assert result.exit_code == 0, (result.output, result.exception)
    for row in json.loads(Path("drawn.json").read_text())["rows"]:
        parts = row["regimes"]
        assert [part["seed"] for part in parts] == [5, 6]
        values = [part["test_perplexity"] for part in parts]
        assert math.isclose(row["test_perplexity"], math.sqrt(math.prod(values)), rel_tol=1e-9)
    output = flat(result.output)
    assert "perplexity, geometric mean over 2 draws of calibration text" in output
    assert "perplexity on test text under each draw" in output
    assert "pattern free, seeds 5 to 6" in output
    assert "calibration seed 6: gradients of sequence: 4 of 4" in output
    assert " seed 5 ┃ seed 6 ┃" in output
    pruner = (Path("runs") / "drawn" / "pruner.py").read_text()
    assert "geometric mean of test perplexity" in pruner and "seeds 5 to 6." in pruner
    shown = flat(run("show drawn").output)
    assert "draws 2 of calibration text" in shown
    assert run("search --name drawn --resume --budget 6").exit_code == 0
    refused = run("search --name drawn --resume --budget 6 --draws 3")
    assert isinstance(refused.exception, SearchError)
    assert "--draws 2, now 3" in str(refused.exception)
    checked = run("verify drawn --top 1 --json checks.json")
    assert checked.exit_code == 0, (checked.output, checked.exception)
    rows = json.loads(Path("checks.json").read_text())["rows"]
    assert all(abs(row["difference"]) < 1e-9 for row in rows if row["is_reported"])
