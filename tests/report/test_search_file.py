"""`search.json` holds what a search was asked to do, and tells when it is asked otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import OutputError, SearchError
from prunezero.report.runs.search_file import Asked, asked_for, goes_on, read_asked, write_asked
from tests.searching.testbed import tiny_testbed

OPTIONS: dict[str, Any] = {
    "model": "demo",
    "text": "demo",
    "space": "tiny",
    "sparsity": None,
    "pattern": "2:4",
    "also": "0.7",
    "seed": 1,
    "from_scratch": False,
    "strategy": "evolution",
    "sequence_length": 16,
    "calibration_tokens": 64,
    "evaluation_tokens": 64,
    "test_tokens": 64,
    "dtype": "auto",
    "device": "auto",
}


@pytest.fixture
def asked() -> Asked:
    return asked_for({**OPTIONS, "budget": 3})


def test_what_is_written_reads_back_to_the_same(asked: Asked, tmp_path: Path) -> None:
    assert read_asked(tmp_path) is None
    write_asked(asked, tmp_path)
    assert read_asked(tmp_path) == asked
    write_asked(replace(asked, seed=2), tmp_path)
    assert read_asked(tmp_path) == replace(asked, seed=2)
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]


def test_what_was_left_to_the_machine_and_to_the_pattern_is_settled(asked: Asked) -> None:
    settled = asked.settled(tiny_testbed(), asked.task())
    assert (settled.dtype, settled.device, settled.sparsity) == ("float32", "cpu", 0.5)
    assert settled.task() == replace(asked, sparsity=0.5).task()


def test_only_options_that_were_typed_count(asked: Asked, tmp_path: Path) -> None:
    assert goes_on(asked, {}, tmp_path) == asked
    assert goes_on(asked, {"name": "other", "budget": 9, "seed": 1}, tmp_path) == asked
    with pytest.raises(SearchError, match="--seed 1, now 2; --dtype float32, now bfloat16"):
        goes_on(
            replace(asked, dtype="float32"), {"seed": 2, "budget": 9, "dtype": "bfloat16"}, tmp_path
        )


def test_which_gpu_it_is_changes_no_result(asked: Asked, tmp_path: Path) -> None:
    before = replace(asked, device="cuda")
    assert goes_on(before, {"device": "cuda:1"}, tmp_path).device == "cuda:1"
    assert goes_on(before, {"device": "auto"}, tmp_path).device == "cuda"
    with pytest.raises(SearchError, match="--device cuda, now cpu"):
        goes_on(before, {"device": "cpu"}, tmp_path)


def test_a_model_that_was_moved_is_looked_for_where_it_is_now(asked: Asked, tmp_path: Path) -> None:
    old, new, other = (tmp_path / place for place in ("old/model", "new/model", "new/other"))
    for folder in (new, other):
        folder.mkdir(parents=True)
    before = replace(asked, model=str(old))
    assert goes_on(before, {"model": str(new)}, tmp_path).model == str(new)
    with pytest.raises(SearchError, match="--model .*old/model, now .*new/other"):
        goes_on(before, {"model": str(other)}, tmp_path)
    old.mkdir(parents=True)
    with pytest.raises(SearchError, match="--model"):
        goes_on(before, {"model": str(new)}, tmp_path)
    # Another way to spell the same folder changes nothing.
    assert goes_on(before, {"model": f"{old}/../model"}, tmp_path).model == str(old)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"model": "demo"}', "\x00"])
def test_a_damaged_file_is_one_sentence(damage: str, asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(damage)
    with pytest.raises(SearchError, match="search.json cannot be read .*take it away"):
        read_asked(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_sentence(asked: Asked, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_asked(asked, tmp_path / "nowhere")


def test_a_file_with_more_than_we_know_is_read_all_the_same(asked: Asked, tmp_path: Path) -> None:
    write_asked(asked, tmp_path)
    path = tmp_path / "search.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    assert read_asked(tmp_path) == asked


def test_further_models_are_kept_and_moved_ones_are_looked_for(
    asked: Asked, tmp_path: Path
) -> None:
    assert asked.also_model == ()
    before = asked_for({**OPTIONS, "also_model": ["demo", str(tmp_path / "old/a")]})
    write_asked(before, tmp_path)
    assert read_asked(tmp_path) == before
    assert goes_on(before, {}, tmp_path) == before
    (tmp_path / "new/a").mkdir(parents=True)
    moved = ["demo", str(tmp_path / "new/a")]
    assert goes_on(before, {"also_model": moved}, tmp_path).also_model == tuple(moved)
    with pytest.raises(SearchError, match="--also-model demo and .*a, now demo;"):
        goes_on(before, {"also_model": ["demo"], "seed": 2}, tmp_path)
    with pytest.raises(SearchError, match="--also-model nothing, now demo"):
        goes_on(asked, {"also_model": ["demo"]}, tmp_path)


def test_signals_are_those_of_the_space_unless_typed(asked: Asked, tmp_path: Path) -> None:
    assert asked.signals == "second order"
    few = asked_for({**OPTIONS, "space": "formulas", "signals": "activations"})
    assert few.signals == few.space_content["signals"] == "activations"
    assert "G" not in few.space_content["terminals"] and "X" in few.space_content["terminals"]
    assert few.task().space.features[-1] == "Y"
    write_asked(few, tmp_path)
    assert read_asked(tmp_path) == few
    # The space is named again, and is the same under these signals.
    assert goes_on(few, {"space": "formulas", "signals": "activations"}, tmp_path) == few
    with pytest.raises(SearchError, match="--signals activations, now gradients"):
        goes_on(few, {"signals": "gradients"}, tmp_path)


def test_a_file_from_before_signals_were_asked_for_is_read(asked: Asked, tmp_path: Path) -> None:
    write_asked(asked, tmp_path)
    path = tmp_path / "search.json"
    before = {key: value for key, value in json.loads(path.read_text()).items() if key != "signals"}
    path.write_text(json.dumps(before))
    assert read_asked(tmp_path) == asked
