"""What is read from the folder of a search is what was written there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import SearchError
from prunezero.formula import Criterion
from prunezero.report.runs.candidate_tables import write_candidates
from prunezero.report.runs.summary import (
    counted,
    find_run,
    front,
    latex_of_front,
    read_candidates,
    read_run,
    rule_of,
)
from prunezero.searching.evaluation.journal import Journal
from prunezero.searching.experiment.candidate import Candidate

CHOICES: list[dict[str, Any]] = [
    {},
    {"compare": "128 columns"},
    {"compare": "row", "update": "none"},
    {"update": ["swaps", "admm"], "damping": 0.01},
    {"allocate": {"owl": {"spread": 0.08, "multiple": 5}}, "update": {"obs": {"block": 64}}},
    {"damping": 1e-05},
]


def candidate(slot: int, formula: str = "abs(W)", **values: Any) -> Candidate:
    values = {"status": "new", **values}
    return Candidate(slot, 0, Criterion.parse(formula), "random", (), **values)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_the_rule_of_a_candidate_is_read_back_from_its_row(
    choices: dict[str, Any], tmp_path: Path
) -> None:
    one = candidate(3, "abs(W)*X**0.37", choices=choices)
    write_candidates([one.row()], tmp_path)
    (row,) = read_candidates(tmp_path) or []
    assert rule_of(row) == one.rule


def test_counts_are_those_of_the_rungs() -> None:
    rows = [
        candidate(0, layer_error=0.1, kl=0.2, search_perplexity=9.0).row(),
        candidate(1, layer_error=0.2, kl=0.3).row(),
        candidate(2, layer_error=0.3).row(),
        candidate(3, status="known", layer_error=0.1).row(),
        candidate(4, status="known", search_perplexity=9.0).row(),
        candidate(5, status="invalid").row(),
    ]
    assert counted(rows) == {
        "proposed": 6,
        "known": 2,
        "invalid": 1,
        "screened": 3,
        "by quick KL": 2,
        "measured": 1,
    }


def test_the_front_leaves_out_what_a_smaller_formula_beats() -> None:
    rows = [
        candidate(0, "abs(W)", search_perplexity=30.0).row(),
        candidate(1, "abs(W)*X", search_perplexity=20.0).row(),
        candidate(2, "abs(W)*G", search_perplexity=25.0).row(),
        candidate(3, "abs(W)*sqrt(X)*G", search_perplexity=21.0).row(),
        candidate(4, "abs(W)*X + abs(W)*G", search_perplexity=19.0).row(),
        candidate(5, "abs(W)*X*R1", search_perplexity=1.0, status="known").row(),
        candidate(6, "abs(W)*X*C1", search_perplexity=None).row(),
    ]
    assert [row["slot"] for row in front(rows)] == [0, 1, 4]
    assert [row["slot"] for row in front(rows, 2)] == [1, 4]
    assert front(rows, 0) == [] and front([], 3) == []


def test_the_best_of_each_size_on_the_front_stand_together_best_first() -> None:
    rows = [
        candidate(0, "abs(W)", search_perplexity=30.0).row(),
        candidate(1, "abs(W)*X", search_perplexity=20.0).row(),
        candidate(2, "abs(W)*G", search_perplexity=25.0).row(),
        candidate(3, "abs(W)*F", search_perplexity=35.0).row(),
        candidate(4, "abs(W)*D", search_perplexity=1.0, status="known").row(),
        candidate(5, "abs(W)*sqrt(X)*G", search_perplexity=21.0).row(),
    ]
    assert [row["slot"] for row in front(rows, each=2)] == [0, 1, 2]
    assert [row["slot"] for row in front(rows, each=9)] == [0, 1, 2, 3]
    # One size, however many of it are shown.
    assert [row["slot"] for row in front(rows, 1, each=2)] == [1, 2]
    assert front(rows, each=1) == front(rows)


def test_latex_escapes_what_is_no_mathematics() -> None:
    row = candidate(0, "row_norm(abs(W)*X)*abs(W)", choices={"update": {"obs": {"damp_to": "5%"}}})
    table = latex_of_front([{**row.row(), "search_perplexity": 12.345}])
    (line,) = [line for line in table.splitlines() if "obs" in line]
    assert line.startswith(f"{row.criterion.complexity} & 12.35 & -- & $")
    assert r"(update: \{'obs': \{'damp\_to': '5\%'\}\}) \\" in line


def test_a_name_in_the_runs_folder_comes_before_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (Path("one"), Path("runs/one"), Path("far/two")):
        folder.mkdir(parents=True)
        (folder / "journal.jsonl").write_text("")
    assert find_run("one", Path("runs")) == Path("runs/one")
    assert find_run("./far/two", Path("runs")) == Path("far/two")
    assert find_run(str(tmp_path / "far/two"), Path("runs")) == tmp_path / "far/two"
    for wrong in ("two", "x" * 400, "\0"):
        with pytest.raises(SearchError, match="there is no search"):
            find_run(wrong, Path("runs"))


@pytest.mark.parametrize("header", [{}, {"space": {"name": "x"}}, {"space": 5}])
def test_a_journal_that_is_no_search_is_refused(header: dict[str, Any], tmp_path: Path) -> None:
    from prunezero.errors import PruneZeroError

    Journal(tmp_path / "journal.jsonl", header, resume=False).close()
    with pytest.raises(PruneZeroError, match=str(tmp_path)):
        read_run(tmp_path)
    (tmp_path / "journal.jsonl").write_text("damaged\n")
    with pytest.raises(SearchError, match="no journal of a search"):
        read_run(tmp_path)


def test_a_search_that_is_not_found_is_not_taken_for_its_own_mistyping(tmp_path: Path) -> None:
    runs = tmp_path / "my runs"
    for name in ("s", "empty"):
        (runs / name).mkdir(parents=True)
    (runs / "s" / "journal.jsonl").write_text("")
    with pytest.raises(SearchError, match="^there is no search 'x/s' .*; did you mean 's'[?]$"):
        find_run("x/s", runs)
    with pytest.raises(SearchError, match=r"has no journal.jsonl; see `prunezero list runs --runs"):
        find_run("empty", runs)
    with pytest.raises(SearchError, match=f"--runs-dir '{runs}'`$"):
        find_run("quite-another", runs)
