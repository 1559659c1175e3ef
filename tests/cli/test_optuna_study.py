"""A search leaves a study for Optuna's dashboard in its folder, and `show` says how to open it."""

from __future__ import annotations

from pathlib import Path

import optuna
import pyarrow.parquet as parquet

from tests.cli.conftest import Run


def test_a_finished_search_leaves_a_study_of_what_it_measured(mine: Path) -> None:
    backend = optuna.storages.journal.JournalFileBackend(str(mine / "optuna.log"))
    storage = optuna.storages.JournalStorage(backend)
    trials = optuna.load_study(study_name="mine", storage=storage).trials
    rows = parquet.read_table(mine / "candidates.parquet").to_pylist()
    measured = [row for row in rows if row["search_perplexity"] is not None]
    assert [(one.user_attrs["slot"], one.values[0]) for one in trials] == [
        (row["slot"], row["search_perplexity"]) for row in measured
    ]
    known = [row["validation_perplexity"] for row in measured]
    assert [one.user_attrs.get("validation_perplexity") for one in trials] == known
    assert any(known)


def test_show_names_the_study_where_there_is_one(run: Run, mine: Path) -> None:
    command = "optuna-dashboard optuna.log"
    assert command in run("show mine").output
    (mine / "optuna.log").unlink()
    shown = run("show mine")
    assert shown.exit_code == 0 and command not in shown.output
