"""Tables hold every candidate; the readable one starts with the best."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from prunezero.errors import OutputError
from prunezero.formula import Criterion
from prunezero.report.runs import candidate_tables as tables
from prunezero.report.runs.candidate_tables import (
    COLUMNS,
    READABLE,
    RunningTables,
    write_candidates,
)
from prunezero.searching.experiment.candidate import Candidate


def row(slot: int, perplexity: float | None, **changes: Any) -> dict[str, Any]:
    known = {
        "slot": slot,
        "generation": 0,
        "origin": "seed",
        "parents": (1, 2) if slot else (),
        "status": "ok",
        "formula": "abs(W)*X",
        "complexity": 4,
        "depth": 2,
        "signal": "activations",
        "fingerprint": "ab",
        "mask": "cd",
        "layer_error": 0.123456789,
        "search_perplexity": perplexity,
        "validation_perplexity": None,
        "seconds": 1.23456,
    }
    return {**known, **changes}


ROWS = [row(0, 25.0), row(1, None), row(2, 21.123456), row(3, float("nan"), layer_error=None)]


def test_parquet_keeps_every_row_as_it_is(tmp_path: Path) -> None:
    write_candidates(ROWS, tmp_path / "night")
    table = parquet.read_table(tmp_path / "night" / "candidates.parquet")
    assert tuple(table.column_names) == COLUMNS
    found = table.to_pylist()
    assert [entry["slot"] for entry in found] == [0, 1, 2, 3]
    assert found[2]["search_perplexity"] == 21.123456 and found[2]["parents"] == [1, 2]
    assert found[1]["search_perplexity"] is None


def test_csv_is_rounded_and_starts_with_the_best(tmp_path: Path) -> None:
    write_candidates([*ROWS, row(4, 22.0, formula='Müller, "x"')], tmp_path)
    with (tmp_path / "candidates.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [entry["slot"] for entry in found] == ["2", "4", "0", "1", "3"]
    best = found[0]
    assert (best["search_perplexity"], best["layer_error"], best["seconds"], best["parents"]) == (
        "21.123",
        "0.12346",
        "1.23",
        "1 2",
    )
    assert found[1]["formula"] == 'Müller, "x"'
    assert set(READABLE) == set(COLUMNS)


def test_an_empty_search_still_has_its_tables(tmp_path: Path) -> None:
    write_candidates([], tmp_path)
    assert parquet.read_table(tmp_path / "candidates.parquet").num_rows == 0
    assert (tmp_path / "candidates.csv").read_text().startswith("search_perplexity,")


def test_writing_again_replaces_the_tables_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_candidates(ROWS, tmp_path)
    write_candidates(ROWS[:1], tmp_path)
    assert parquet.read_table(tmp_path / "candidates.parquet").num_rows == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "candidates.csv",
        "candidates.parquet",
    ]


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_candidates(ROWS, tmp_path / "file")


def candidate(slot: int, **values: Any) -> Candidate:
    values = {"status": "new", **values}
    return Candidate(slot, 0, Criterion.parse("abs(W)"), "random", (), **values)


class Clock:
    """Stands still unless it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def rows_after(running: RunningTables, found: dict[int, Candidate], folder: Path) -> int | None:
    """How many rows the table has once the last candidate was shown."""
    running.show(found[max(found)], found)
    path = folder / "candidates.parquet"
    return parquet.read_table(path).num_rows if path.is_file() else None


def test_tables_of_a_running_search_come_early_and_then_at_longer_intervals(tmp_path: Path) -> None:
    clock = Clock()
    running = RunningTables(tmp_path, clock=clock)
    found: dict[int, Candidate] = {}
    moments = []
    seen = None
    for slot in range(200):
        found[slot] = candidate(slot, status="invalid" if slot == 0 else "new", fault="no mask")
        rows = rows_after(running, found, tmp_path)
        if rows != seen:
            assert rows == slot + 1
            moments.append(clock.now)
            seen = rows
        clock.now += 1.0
    # The first is invalid, and nothing is known of a search that has screened nobody.
    assert moments == [1, 2, 4, 8, 16, 32, 62, 92, 122, 152, 182]
    assert (tmp_path / "candidates.csv").read_text().count("no mask") == 183


def test_a_search_that_goes_on_leaves_the_longer_tables_of_before(tmp_path: Path) -> None:
    write_candidates(ROWS, tmp_path)
    running = RunningTables(tmp_path, clock=Clock())
    found = {0: candidate(0, is_replayed=True), 1: candidate(1, status="known")}
    assert rows_after(running, found, tmp_path) == len(ROWS)
    found[2] = candidate(2)
    assert rows_after(running, found, tmp_path) == 3


def test_slow_tables_are_written_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    moments = []

    def slow(rows: Any, folder: Path) -> None:
        moments.append(clock.now)
        clock.now += 2.0

    monkeypatch.setattr(tables, "write_candidates", slow)
    running = RunningTables(tmp_path, clock=clock)
    for slot in range(300):
        running.show(candidate(slot), {slot: candidate(slot)})
        clock.now += 1.0
    assert moments == [0, 102, 204]


def test_a_folder_that_could_not_be_written_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    clock = Clock()
    running = RunningTables(tmp_path / "run", clock=clock)
    with pytest.raises(OutputError, match="cannot be written"):
        running.show(candidate(0), {0: candidate(0)})
    (tmp_path / "run").unlink()
    clock.now = 100.0
    assert rows_after(running, {0: candidate(0)}, tmp_path / "run") == 1
