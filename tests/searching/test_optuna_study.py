"""Optuna reads from the mirror what the search measured, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import optuna
import pytest

from prunezero.formula import Criterion
from prunezero.report.runs import folder as run_folder
from prunezero.report.runs.optuna_study import study_journal
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.task import Task
from prunezero.searching.session import Session, make_task
from tests.searching.testbed import tiny_space

UPDATES = [["none"], ["obs"], ["swaps", "admm"]]


def candidate(slot: int, formula: str = "abs(W)", **values: Any) -> Candidate:
    values = {"status": "new", "origin": "random", "generation": 1, "seconds": 2.5, **values}
    return Candidate(slot=slot, criterion=Criterion.parse(formula), parents=(), **values)


FOUND = [
    candidate(0, search_perplexity=30.0, origin="seed", generation=0),
    candidate(1, "abs(W)*X", layer_error=0.25, kl=0.5, search_perplexity=20.0),
    candidate(2, "abs(W)*G", search_perplexity=25.0),
    candidate(3, "abs(W)*X*R1", search_perplexity=1.0, status="known"),
    candidate(4, "abs(W)*C1", layer_error=0.5, kl=0.75),
    candidate(5, "abs(W)*C2", search_perplexity=2.0, status="invalid"),
    candidate(6, "abs(W)*X + abs(W)*G", search_perplexity=19.5, validation_perplexity=18.25),
]


def task(**changes: Any) -> Task:
    return make_task(tiny_space(**changes), 0.5, seed=7)


def opened(text: str, folder: Path) -> optuna.Study:
    """The study as the dashboard opens it: from the file alone, by Optuna's own reader."""
    path = folder / "optuna.log"
    path.write_text(text)
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    (name,) = optuna.get_all_study_names(optuna.storages.JournalStorage(backend))
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))


def slots(trials: Sequence[optuna.trial.FrozenTrial]) -> list[int]:
    return sorted(trial.user_attrs["slot"] for trial in trials)


def test_a_trial_stands_for_each_candidate_that_was_measured_itself(tmp_path: Path) -> None:
    study = opened(study_journal(FOUND, task(), "mine"), tmp_path)
    assert study.study_name == "mine"
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE"]
    assert study.metric_names == ["search_perplexity", "complexity"]
    assert study.user_attrs["sparsity"] == 0.5 and study.user_attrs["seed"] == 7
    assert slots(study.trials) == [0, 1, 2, 6]
    for trial in study.trials:
        one = FOUND[trial.user_attrs["slot"]]
        assert trial.state is optuna.trial.TrialState.COMPLETE
        assert trial.values == [one.search_perplexity, one.criterion.complexity]
        assert trial.duration is not None and trial.duration.total_seconds() == 2.5
    # One after another, as they would stand on a clock.
    assert [trial.datetime_start for trial in study.trials[1:]] == [
        trial.datetime_complete for trial in study.trials[:-1]
    ]


def test_the_best_trials_are_the_front(tmp_path: Path) -> None:
    study = opened(study_journal(FOUND, task(), "mine"), tmp_path)
    assert slots(study.best_trials) == [0, 1, 6]


def test_a_trial_tells_what_is_known_and_leaves_out_what_is_not(tmp_path: Path) -> None:
    told = {
        trial.user_attrs["slot"]: trial.user_attrs
        for trial in opened(study_journal(FOUND, task(), "mine"), tmp_path).trials
    }
    assert told[0] == {
        "slot": 0,
        "generation": 0,
        "origin": "seed",
        "formula": "abs(W)",
        "seconds": 2.5,
    }
    assert (told[1]["layer_error"], told[1]["kl"]) == (0.25, 0.5)
    assert told[6]["validation_perplexity"] == 18.25


def test_parameters_say_what_a_formula_uses_and_what_was_chosen_around_it(tmp_path: Path) -> None:
    open_task = task(choices={"compare": ["row", "layer"], "update": UPDATES})
    some = [
        candidate(0, "abs(W)*X", search_perplexity=9.0),
        candidate(1, "abs(W)*G", search_perplexity=8.0, choices={"update": ["swaps", "admm"]}),
        candidate(2, search_perplexity=7.0, choices={"compare": "layer", "update": "obs"}),
    ]
    trials = opened(study_journal(some, open_task, "mine"), tmp_path).trials
    params = [trial.params for trial in trials]
    assert [one["compare"] for one in params] == ["row", "row", "layer"]
    assert [one["update"] for one in params] == ["none", "swaps, admm", "obs"]
    assert [one["signal"] for one in params] == ["activations", "gradients", "none"]
    assert [one["uses X"] for one in params] == [True, False, False]
    assert [(one["complexity"], one["depth"]) for one in params] == [(4, 3), (4, 3), (2, 2)]
    assert {key.removeprefix("uses ") for key in params[0] if key.startswith("uses ")} == (
        set(open_task.space.features)
    )
    assert trials[0].distributions["update"].choices == ("none", "obs", "swaps, admm")
    # Optuna plots and weighs only parameters whose distributions are the same everywhere.
    assert all(trial.distributions == trials[0].distributions for trial in trials)


def test_a_table_that_the_search_wrote_tells_its_candidate_from_others(tmp_path: Path) -> None:
    some = [
        candidate(0, search_perplexity=9.0),
        candidate(
            1, search_perplexity=8.0, choices={"allocate": {"table": {"ratios": {"q_proj": 0.9}}}}
        ),
    ]
    trials = opened(
        study_journal(some, task(choices={}, ratios=["q_proj"]), "mine"), tmp_path
    ).trials
    tables = [trial.params["allocate"] for trial in trials]
    assert "q_proj" in tables[1] and tables[0] == "uniform"


def test_the_same_candidates_make_the_same_file_at_any_time_and_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = study_journal(FOUND, task(), "mine")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert study_journal(FOUND, task(), "mine") == first
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder without pictures, which take seconds."""
    for name in ("pareto", "proxy_against_truth", "progress"):
        monkeypatch.setattr(run_folder, name, lambda *args: None)


def written(candidates: Sequence[Candidate], folder: Path) -> None:
    nothing = cast(Any, None)
    session = Session(testbed=nothing, task=task(), rungs=nothing, journal=nothing)
    run_folder.write_run(session, folder, candidates, [])


@pytest.mark.usefixtures("no_pictures")
def test_a_run_folder_gets_one_whole_file_of_it_and_none_without_a_trial(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    written(FOUND, folder)
    first = (folder / "optuna.log").read_text()
    assert first == study_journal(FOUND, task(), "mine")
    written(FOUND, folder)
    assert (folder / "optuna.log").read_text() == first
    # Nothing of the writing is left beside it.
    assert set(os.listdir(folder)) == {"candidates.parquet", "candidates.csv", "optuna.log"}
    written(FOUND[3:5], folder)
    assert not (folder / "optuna.log").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_study_that_cannot_be_written_is_a_warning_and_ends_no_search(tmp_path: Path) -> None:
    (tmp_path / "mine" / "optuna.log").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"optuna\.log cannot be written"):
        written(FOUND, tmp_path / "mine")
    assert set(os.listdir(tmp_path / "mine")) == {
        "candidates.parquet",
        "candidates.csv",
        "optuna.log",
    }
