"""A search over several budgets, as a user runs it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tests.cli.conftest import Run, flat, small_space


def test_a_search_over_budgets_reports_shows_and_verifies_geometric_means(
    run: Run, tmp_path: Path
) -> None:
    small_space(tmp_path / "small.yaml")
    result = run(
        "search MODEL --sparsity 0.5 --also 0.7,2:4 --space small.yaml --budget 6 --name all "
        "--json all.json"
    )
    assert result.exit_code == 0, (result.output, result.exception)
    winner = json.loads(Path("all.json").read_text())["rows"][-1]
    parts = [budget["test_perplexity"] for budget in winner["regimes"]]
    assert len(parts) == 3
    assert math.isclose(winner["test_perplexity"], math.prod(parts) ** (1 / 3), rel_tol=1e-9)
    assert "perplexity on test text under each budget" in flat(result.output)
    assert "geometric mean of the perplexities" in result.output
    shown = run("show all")
    assert "pattern free, 0.7, 2:4" in shown.output
    assert "perplexity on test text under each budget" in flat(shown.output)
    assert run("verify all --top 1").exit_code == 0
    assert run("search --name all --resume --budget 6").exit_code == 0
    assert run("search --name all --resume --budget 6 --also 0.70,02:4").exit_code == 0
    assert "geometric mean of test perplexity" in Path("runs/all/pruner.py").read_text()
    refused = run("search --name all --resume --budget 6 --also 0.7")
    assert "--also 0.7,2:4, now 0.7" in str(refused.exception)


def test_a_search_of_a_version_without_other_budgets_goes_on(run: Run, mine: Path) -> None:
    path = mine / "search.json"
    before = json.loads(path.read_text())
    del before["also"]
    path.write_text(json.dumps(before))
    assert run("search --name mine --resume --budget 12").exit_code == 0
