"""What MLflow is told of a search over several models."""

from __future__ import annotations

from pathlib import Path

from prunezero.formula import Criterion
from prunezero.pruning.bench import Bench
from prunezero.report.records import RunRecord
from prunezero.report.tracked import (
    tracked_candidate,
    tracked_champion,
    tracked_rows,
    tracked_search,
)
from prunezero.searching.candidate import Candidate
from prunezero.searching.session import make_task, measure_rivals, open_session
from tests.searching.bench import tiny_bench, tiny_space


def records(folder: Path, also: list[Bench]) -> list[RunRecord]:
    """The records of a search, of a candidate, of the winner, and of the rivals."""
    task = make_task(tiny_space(), 0.5)
    session = open_session(tiny_bench(), task, folder, also_benches=also)
    try:
        rows = list(measure_rivals(session, ("validation", "test")))
    finally:
        session.ladder.close()
    candidate = Candidate(0, 0, Criterion.parse("abs(W)*X"), "random", (), "new")
    recipe = task.recipe(candidate.rule, "mine")
    return [
        tracked_search(session, "mine", finished=True),
        tracked_candidate(candidate, session, "mine"),
        tracked_champion(recipe, rows[-1], session, "mine", folder),
        *tracked_rows(rows, session.bench, also_benches=session.also_benches),
    ]


def test_records_name_all_models_and_rivals_of_one_model_keep_theirs(tmp_path: Path) -> None:
    alone = records(tmp_path / "alone", [])
    both = records(tmp_path / "both", [tiny_bench("gpt2"), tiny_bench("opt")])
    assert not any("also_models" in record.params for record in alone)
    assert {record.params["also_models"] for record in both} == {"gpt2, opt"}
    assert {record.params["model"] for record in both} == {"llama"}
    # A mean over models must not take the place of what one model gave.
    assert {one.role for one in both[3:]} == {"dense", "baseline"}
    assert not {one.key for one in alone[3:]} & {one.key for one in both[3:]}
