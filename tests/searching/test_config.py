"""`SearchConfig`, one experiment by name: what it refuses, settles, and keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunezero.errors import PruneZeroError, RecipeError, SearchError
from prunezero.report.runs.search_file import headed
from prunezero.searching.experiment.config import SearchConfig, starting_rules
from prunezero.searching.experiment.provenance import header
from prunezero.searching.session import find, open_session
from prunezero.searching.spaces.space import SearchSpace
from tests.searching.testbed import SETTINGS, make_task, tiny_space, tiny_testbed


def test_it_goes_through_json_and_comes_out_the_same() -> None:
    config = SearchConfig.of(space="tiny", pattern="2:4", also="0.7", targets="mlp.up_proj,q_proj")
    assert (config.also, config.targets) == (("0.7",), ("mlp.up_proj", "q_proj"))
    assert SearchConfig.model_validate_json(config.model_dump_json()) == config


def test_signals_hold_also_where_the_space_itself_is_given() -> None:
    assert SearchConfig.of(signals="none").space_content.features == ("W", "R1", "C1", "R2", "C2")
    limited = SearchConfig.of(space_content=SearchSpace.load("formulas"), signals="none")
    assert limited.space_content == SearchConfig.of(signals="none").space_content
    with pytest.raises(RecipeError, match="'bogus' is no signal"):
        SearchConfig.of(space_content=SearchSpace.load("formulas"), signals="bogus")


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({"stratgy": "random"}, "'stratgy' is no option of a search; did you mean 'strategy'"),
        ({"model": "other"}, "'model' is what the testbed says"),
        ({"sequence_length": 8}, "'sequence_length' is what the testbed says"),
        ({"start_from": ["wanda"]}, "start="),
        ({"start": ["abs(Q)"]}, "'Q' is not"),
        ({"signals": "bogus"}, "'bogus' is no signal"),
    ],
)
def test_what_cannot_be_asked_from_python_is_refused_by_name(
    named: dict[str, object], told: str, tmp_path: Path
) -> None:
    with pytest.raises(PruneZeroError, match=told):
        next(iter(find(tiny_testbed(), tiny_space(), 0.5, folder=tmp_path / "run", **named)))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_rules_formulas_and_their_texts_may_begin_a_search() -> None:
    (text, criterion) = starting_rules(["abs(W)", SearchSpace.load("tiny").terminals[0]])
    assert text.formula == "abs(W)" and criterion.choices == {}


def test_a_journal_begins_with_what_was_settled_and_stands_in_for_a_lost_file(
    tmp_path: Path,
) -> None:
    task = make_task(tiny_space(), pattern="2:4", also="0.70")
    session = open_session([tiny_testbed()], task, tmp_path)
    session.rungs.close()
    first = (tmp_path / "journal.jsonl").read_text().splitlines()[0]
    written = json.loads(first[first.index("{") :])["header"]
    assert written == header(session.task, session.testbeds)
    config = headed(tmp_path)
    assert config == session.task.config == task.config.settled(tiny_testbed())
    assert (config.sparsity, config.also, config.dtype) == (0.5, ("0.7",), "float32")
    assert config.settings == SETTINGS and headed(tmp_path / "nowhere") is None


def test_a_task_without_a_draw_is_refused() -> None:
    with pytest.raises(SearchError, match="at least 1 draw"):
        make_task(tiny_space(), 0.5, draws=0)
