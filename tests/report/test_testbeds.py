"""What MLflow is told of a search over several models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import normalizers

from prunezero.formula import Criterion
from prunezero.pruning.testbed import Testbed
from prunezero.report.tracking.records import RunRecord
from prunezero.report.tracking.search_records import (
    tracked_candidate,
    tracked_rows,
    tracked_search,
    tracked_winner,
)
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.session import measure_baselines, open_session
from tests.searching.testbed import make_task, tiny_space, tiny_testbed


def records(folder: Path, also: list[Testbed]) -> list[RunRecord]:
    """The records of a search, of a candidate, of the winner, and of the baselines."""
    testbeds = [tiny_testbed(), *also]
    task = make_task(tiny_space(), 0.5, testbeds=testbeds)
    session = open_session(testbeds, task, folder)
    try:
        rows = list(measure_baselines(session, ("validation", "test")))
    finally:
        session.rungs.close()
    candidate = Candidate(0, 0, Criterion.parse("abs(W)*X"), "random", (), "new")
    recipe = task.recipe(candidate.rule, "mine")
    return [
        tracked_search(session, "mine", finished=True),
        tracked_candidate(candidate, session, "mine"),
        tracked_winner(recipe, rows[-1], session, "mine", folder),
        *tracked_rows(rows, session.testbeds),
    ]


def test_records_name_all_models_and_baselines_of_one_model_keep_theirs(tmp_path: Path) -> None:
    alone = records(tmp_path / "alone", [])
    both = records(tmp_path / "both", [tiny_testbed("gpt2"), tiny_testbed("opt")])
    assert not any("also_models" in record.params for record in alone)
    assert {record.params["also_models"] for record in both} == {"gpt2, opt"}
    assert {record.params["model"] for record in both} == {"llama"}
    # A mean over models must not take the place of what one model gave.
    assert {one.role for one in both[3:]} == {"dense", "baseline"}
    assert not {one.key for one in alone[3:]} & {one.key for one in both[3:]}


def changed(testbed: Testbed, **settings: Any) -> Testbed:
    return replace(testbed, settings=replace(testbed.settings, **settings))


def test_the_key_of_a_baseline_holds_all_that_its_numbers_depend_on() -> None:
    testbed = tiny_testbed()
    row: dict[str, Any] = {"recipe": "mine", "sparsity": 0.5, "pattern": "free"}
    row |= {"allocate": "uniform", "statistics": "dense", "seed": 0, "sequence_length": 16}
    row |= {"calibration_tokens": 64, "formula": "abs(W)*X"}
    other = tiny_testbed()
    other.language_model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "b")
    cases = [
        (testbed, row),
        (other, row),
        (changed(testbed, test_tokens=128), row),
        (changed(testbed, evaluation_tokens=128), row),
        (testbed, row | {"formula": "abs(W)"}),
        (testbed, row | {"update": "obs"}),
    ]
    keys = [record.key for one, found in cases for record in tracked_rows([found], [one])]
    assert len(set(keys)) == len(cases)
    (again,) = tracked_rows([row | {"seconds": 3.0}], [tiny_testbed()])
    assert again.key == keys[0]


def test_searches_of_one_name_are_one_run_only_where_they_cannot_differ(tmp_path: Path) -> None:
    keys = []
    for place, seed in (("here", 0), ("there", 0), ("elsewhere", 1)):
        task = make_task(tiny_space(), 0.5, seed=seed)
        session = open_session([tiny_testbed()], task, tmp_path / place)
        session.rungs.close()
        keys.append(tracked_search(session, "mine", finished=True).key)
    assert keys[0] == keys[1] != keys[2]
    assert all(key.startswith("mine-") for key in keys)
