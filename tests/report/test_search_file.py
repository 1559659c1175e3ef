"""`search.json` holds the experiment of a search, and tells when it is asked otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import OutputError, SearchError
from prunezero.report.runs.search_file import continued, read_config, write_config
from prunezero.searching.experiment.config import SearchConfig
from prunezero.searching.session import make_task
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
def config() -> SearchConfig:
    return SearchConfig.of(**OPTIONS)


def with_fields(config: SearchConfig, **fields: Any) -> SearchConfig:
    return config.model_copy(update=fields)


def test_what_is_written_reads_back_to_the_same(config: SearchConfig, tmp_path: Path) -> None:
    assert read_config(tmp_path) is None
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config
    write_config(with_fields(config, seed=2), tmp_path)
    assert read_config(tmp_path) == with_fields(config, seed=2)
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]


def test_what_was_left_to_the_machine_and_to_the_pattern_is_settled(config: SearchConfig) -> None:
    settled = config.settled(tiny_testbed())
    assert (settled.dtype, settled.device, settled.sparsity) == ("float32", "cpu", 0.5)
    assert settled.also == ("0.7",)
    before, after = make_task(with_fields(config, sparsity=0.5)), make_task(settled)
    assert (after.budgets, after.seeds) == (before.budgets, before.seeds)


def test_only_options_that_were_typed_count(config: SearchConfig, tmp_path: Path) -> None:
    assert continued(config, {}, tmp_path) == config
    assert continued(config, {"seed": 1}, tmp_path) == config
    with pytest.raises(SearchError, match="--seed 1, now 2; --dtype float32, now bfloat16"):
        continued(with_fields(config, dtype="float32"), {"seed": 2, "dtype": "bfloat16"}, tmp_path)


def test_which_gpu_it_is_changes_no_result(config: SearchConfig, tmp_path: Path) -> None:
    before = with_fields(config, device="cuda")
    assert continued(before, {"device": "cuda:1"}, tmp_path).device == "cuda:1"
    assert continued(before, {"device": "auto"}, tmp_path).device == "cuda"
    with pytest.raises(SearchError, match="--device cuda, now cpu"):
        continued(before, {"device": "cpu"}, tmp_path)


def test_a_model_that_was_moved_is_looked_for_where_it_is_now(
    config: SearchConfig, tmp_path: Path
) -> None:
    old, new, other = (tmp_path / place for place in ("old/model", "new/model", "new/other"))
    for folder in (new, other):
        folder.mkdir(parents=True)
    before = with_fields(config, model=str(old))
    assert continued(before, {"model": str(new)}, tmp_path).model == str(new)
    with pytest.raises(SearchError, match="--model .*old/model, now .*new/other"):
        continued(before, {"model": str(other)}, tmp_path)
    old.mkdir(parents=True)
    with pytest.raises(SearchError, match="--model"):
        continued(before, {"model": str(new)}, tmp_path)
    # Another way to spell the same folder changes nothing.
    assert continued(before, {"model": f"{old}/../model"}, tmp_path).model == str(old)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"model": "demo"}', "\x00"])
def test_a_damaged_file_is_one_sentence(damage: str, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(damage)
    with pytest.raises(SearchError, match="search.json cannot be read .*take it away"):
        read_config(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_sentence(
    config: SearchConfig, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_config(config, tmp_path / "nowhere")


def test_a_file_with_more_than_we_know_is_read_all_the_same(
    config: SearchConfig, tmp_path: Path
) -> None:
    write_config(config, tmp_path)
    path = tmp_path / "search.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    assert read_config(tmp_path) == config


def test_further_models_are_kept_and_moved_ones_are_looked_for(
    config: SearchConfig, tmp_path: Path
) -> None:
    assert config.also_model == ()
    before = SearchConfig.of(**OPTIONS, also_model=["demo", str(tmp_path / "old/a")])
    write_config(before, tmp_path)
    assert read_config(tmp_path) == before
    assert continued(before, {}, tmp_path) == before
    (tmp_path / "new/a").mkdir(parents=True)
    moved = ["demo", str(tmp_path / "new/a")]
    assert continued(before, {"also_model": moved}, tmp_path).also_model == tuple(moved)
    with pytest.raises(SearchError, match="--also-model demo and .*a, now demo;"):
        continued(before, {"also_model": ["demo"], "seed": 2}, tmp_path)
    with pytest.raises(SearchError, match="--also-model nothing, now demo"):
        continued(config, {"also_model": ["demo"]}, tmp_path)


def test_signals_are_those_of_the_space_unless_typed(config: SearchConfig, tmp_path: Path) -> None:
    assert config.signals == "second order"
    few = SearchConfig.of(**OPTIONS | {"space": "formulas", "signals": "activations"})
    assert few.signals == few.space_content.signals == "activations"
    words = [criterion.text for criterion in few.space_content.terminals]
    assert "G" not in words and "X" in words
    assert make_task(few).space.features[-1] == "Y"
    write_config(few, tmp_path)
    assert read_config(tmp_path) == few
    # The space is named again, and is the same under these signals.
    assert continued(few, {"space": "formulas", "signals": "activations"}, tmp_path) == few
    with pytest.raises(SearchError, match="--signals activations, now gradients"):
        continued(few, {"signals": "gradients"}, tmp_path)


def test_a_file_from_before_signals_were_asked_for_is_read(
    config: SearchConfig, tmp_path: Path
) -> None:
    write_config(config, tmp_path)
    path = tmp_path / "search.json"
    before = {key: value for key, value in json.loads(path.read_text()).items() if key != "signals"}
    path.write_text(json.dumps(before))
    assert read_config(tmp_path) == config


@pytest.mark.parametrize("key", ["also", "targets", "ignore"])
def test_lists_that_were_written_as_text_with_commas_are_read(key: str, tmp_path: Path) -> None:
    config = SearchConfig.of(**OPTIONS | {key: ["0.7", "1:4"]})
    write_config(config, tmp_path)
    path = tmp_path / "search.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "0.7,1:4"}))
    assert read_config(tmp_path) == config
