"""What one search measured, the next one finds."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import OutputError
from prunezero.searching.archive import Archive

HEADER: dict[str, Any] = {"model": "a", "sparsity": 0.5, "seed": 0, "space": {"name": "tiny"}}


def test_an_answer_is_found_by_a_search_that_differs_in_seed_and_space_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "archive.jsonl"
    Archive(path, HEADER).write("layer error", "W", {"layer_error": 0.1})
    other = Archive(path, {**HEADER, "seed": 1, "space": {"name": "formulas"}})
    assert other.known("layer error", "W") == {"layer_error": 0.1}
    assert other.known("measurement", "W") is None


@pytest.mark.parametrize(("key", "value"), [("model", "b"), ("sparsity", 0.7), ("torch", "9")])
def test_an_answer_under_other_conditions_is_not_found(
    key: str, value: object, tmp_path: Path
) -> None:
    path = tmp_path / "archive.jsonl"
    Archive(path, HEADER).write("layer error", "W", {"layer_error": 0.1})
    assert len(Archive(path, {**HEADER, key: value})) == 0
    assert len(Archive(path, HEADER)) == 1


def test_a_torn_line_costs_that_answer_alone(tmp_path: Path) -> None:
    path = tmp_path / "archive.jsonl"
    archive = Archive(path, HEADER)
    archive.write("layer error", "W", {"layer_error": 0.1})
    archive.write("layer error", "X", {"layer_error": 0.2})
    whole = path.read_bytes()
    for cut in range(1, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        again = Archive(path, HEADER)
        again.write("layer error", "Y", {"layer_error": 0.3})
        found = Archive(path, HEADER)
        assert found.known("layer error", "W") == {"layer_error": 0.1}
        assert found.known("layer error", "Y") == {"layer_error": 0.3}


def test_searches_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "archive.jsonl"

    def write(name: str) -> None:
        archive = Archive(path, HEADER)
        for place in range(40):
            archive.write("layer error", f"{name}{place}", {"layer_error": 0.5})

    threads = [threading.Thread(target=write, args=(name,)) for name in "WXYZ"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Archive(path, HEADER)) == 160


def test_an_archive_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        Archive(tmp_path, HEADER)
