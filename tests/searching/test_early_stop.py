"""A candidate that cannot be among the best is measured no further, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from prunezero.errors import SearchError
from prunezero.pruning.testbed import Testbed
from prunezero.report.runs.candidate_tables import write_candidates
from prunezero.searching.evaluation import early_stop
from prunezero.searching.evaluation.early_stop import (
    CHANCE,
    FIRST,
    STOPPED,
    at_least,
    is_worse,
    stopped,
    windows_needed,
)
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.journal import read_journal
from prunezero.searching.evaluation.promotion import FINALISTS
from prunezero.searching.evaluation.request import Request
from prunezero.searching.evaluation.rungs import Rungs
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.objectives import OBJECTIVES, PERPLEXITY
from prunezero.searching.experiment.provenance import comparable, header
from prunezero.searching.search import search
from prunezero.searching.session import Session, finalists, open_session
from tests.searching.testbed import SETTINGS, make_task, tiny_space, tiny_text
from tests.tiny_models import tiny_model

WINDOWS = 12
BUDGET = 14


def testbed() -> Testbed:
    # Of larger weights pruning changes more of what the model says.
    model = tiny_model("llama", initializer_range=0.3)
    return Testbed(model, tiny_text(), replace(SETTINGS, evaluation_tokens=16 * WINDOWS))


def opened(folder: Path, *, stop_early: bool = True, **named: Any) -> Session:
    one = testbed()
    kept = {key: named.pop(key) for key in ("archive", "resume") if key in named}
    space = tiny_space(tuned=0, measured=4)
    task = make_task(space, 0.6, testbeds=[one], stop_early=stop_early, **named)
    return open_session([one], task, folder, **kept)


def steps_of(rungs: Rungs, stop_after: int | None = None) -> list[dict[str, Any]]:
    """Every candidate on every rung, without what it costs."""
    steps = []
    for candidate in search(rungs, max_candidates=BUDGET):
        steps.append({key: one for key, one in candidate.row().items() if key != "seconds"})
        if stop_after is not None and len(steps) == stop_after:
            break
    return steps


def last_of_each(session: Session) -> list[Candidate]:
    found = search(session.rungs, max_candidates=BUDGET)
    return list({one.slot: one for one in found}.values())


def test_worse_is_what_a_paired_t_test_calls_worse() -> None:
    drawn = np.random.default_rng(0)
    told = []
    for _ in range(60):
        others = drawn.normal(3, 0.5, 16)
        values = others + drawn.normal(drawn.uniform(-0.1, 0.4), 0.2, 16)
        for seen in range(2, 17):
            test = ttest_rel(values[:seen], others[:seen], alternative="greater")
            expected = FIRST <= seen < 16 and test.pvalue < CHANCE
            assert is_worse(values[:seen].tolist(), others.tolist()) == expected
            told.append(expected)
    assert 0.1 < sum(told) / len(told) < 0.9


def test_a_candidate_that_equals_another_or_gives_no_number_is_looked_at_to_the_end() -> None:
    others = [2.0, 3.0, 2.5, 4.0, 3.5, 3.0]
    assert windows_needed(others, others) == 6
    assert windows_needed([one + 0.5 for one in others], others) == FIRST
    assert windows_needed([math.nan] * 6, others) == 6
    assert windows_needed([9.0, 9.0, 9.0], [1.0, 1.0, 1.0]) == 3


def test_the_bound_is_hardly_ever_above_the_mean_of_all_windows() -> None:
    drawn = np.random.default_rng(1)
    wrong = stops = 0
    for _ in range(2000):
        others = drawn.normal(3, 0.5, 16)
        values = others + drawn.normal(0.25, 0.2, 16)
        seen = windows_needed(values.tolist(), others.tolist())
        if seen < 16:
            stops += 1
            wrong += at_least(values[:seen].tolist(), others.tolist()) > values.mean()
    assert stops > 1000 and wrong < 0.02 * stops


@pytest.mark.parametrize("word", ["perplexity", "acceptance"])
def test_a_stopped_measurement_is_what_a_whole_one_leaves_of_its_first_windows(word: str) -> None:
    one, objective = testbed(), OBJECTIVES[word]
    task = make_task(tiny_space(), 0.6, testbeds=[one], objective=word)
    evaluator = Evaluator(task, [one])
    good, bad = (task.recipe(seed, "it") for seed in task.seeds[:2])
    bad = task.with_formula(bad, type(bad.criterion).parse("1/abs(W)"))
    rival = objective.of_windows(evaluator.result(Request.of(good, ["search"])), "search")
    whole = evaluator.result(Request.of(bad, ["search"]))
    early = evaluator.result(Request.of(bad, ["search"], rival=rival))
    seen = early[STOPPED]["windows"]
    assert FIRST <= seen < WINDOWS == early[STOPPED]["of"]
    assert len(early["window_losses"]["search"]) == seen
    assert early[STOPPED]["at_least"] <= objective.of(whole, "search")
    assert objective.of(early, "search") is None
    costs = {"elapsed", "seconds"}
    expected = stopped(whole, "search", objective, rival)
    assert {key: one for key, one in early.items() if key not in costs} == {
        key: one for key, one in expected.items() if key not in costs
    }


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks a little worse is stopped, as on the tiny model nobody surely is."""
    monkeypatch.setattr(early_stop, "CHANCE", 0.25)


@pytest.mark.usefixtures("soon")
def test_a_stopped_candidate_is_no_finalist_and_behind_those_whom_it_could_not_reach(
    tmp_path: Path,
) -> None:
    with closing((session := opened(tmp_path)).journal):
        found = last_of_each(session)
    stopped_early = [one for one in found if one.search_at_least is not None]
    assert stopped_early and all(one.search_fitness is None for one in stopped_early)
    best = finalists(found)
    assert len(best) >= FINALISTS
    assert not {one.slot for one in best} & {one.slot for one in stopped_early}
    reached = sorted(one.search_fitness for one in found if one.search_fitness is not None)
    for one in stopped_early:
        assert one.search_at_least is not None and one.search_at_least > reached[FINALISTS - 1]
    results = [one["result"] for one in read_journal(tmp_path / "journal.jsonl")[1:]]
    told = [one[STOPPED] for one in results if STOPPED in one]
    assert len(told) >= len(stopped_early)
    assert all(FIRST <= one["windows"] < one["of"] == WINDOWS for one in told)


@pytest.mark.usefixtures("soon")
def test_a_search_that_was_cut_goes_on_to_the_same_end(tmp_path: Path) -> None:
    with closing((session := opened(tmp_path / "one")).journal):
        expected = steps_of(session.rungs)
    with closing((session := opened(tmp_path / "other")).journal):
        assert steps_of(session.rungs, 25) == expected[:25]
    with closing((session := opened(tmp_path / "other", resume=True)).journal):
        assert steps_of(session.rungs) == expected
    assert any("search_at_least" in one for one in expected)


@pytest.mark.usefixtures("soon")
def test_an_archive_of_whole_measurements_changes_nothing(tmp_path: Path) -> None:
    with closing((session := opened(tmp_path / "without")).journal):
        expected = steps_of(session.rungs)
    archive = tmp_path / "archive.jsonl"
    with closing(
        (session := opened(tmp_path / "whole", stop_early=False, archive=archive)).journal
    ):
        steps_of(session.rungs)
    with closing((session := opened(tmp_path / "with", archive=archive)).journal):
        assert steps_of(session.rungs) == expected
    results = [one["result"] for one in read_journal(tmp_path / "with" / "journal.jsonl")[1:]]
    assert any(STOPPED in one for one in results)


class Backwards:
    """Answers requests in reverse, as workers may, and hands them over in order."""

    threads = 1

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def results(self, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
        found = [self._evaluator.result(one) for one in reversed(requests)]
        yield from reversed(found)

    def close(self) -> None:
        """Nothing is held."""


@pytest.mark.usefixtures("soon")
def test_who_answers_first_changes_nothing(tmp_path: Path) -> None:
    with closing((session := opened(tmp_path / "one")).journal):
        expected = steps_of(session.rungs)
    with closing((session := opened(tmp_path / "other")).journal):
        evaluator = session.rungs._evaluator
        rungs = Rungs(evaluator, session.journal, Backwards(evaluator))
        assert steps_of(rungs) == expected


def test_only_a_search_that_stops_early_says_so_in_its_journal(tmp_path: Path) -> None:
    one = testbed()
    for stop_early in (False, True):
        task = make_task(tiny_space(), 0.6, testbeds=[one], stop_early=stop_early)
        head = header(task, [one])
        assert ("stop_early" in head["config"]) == stop_early
        assert comparable(head).get("stop_early", False) == stop_early


def test_several_budgets_are_measured_to_the_end() -> None:
    one = testbed()
    assert make_task(tiny_space(), 0.6, testbeds=[one]).measures_once
    for named in ({"also": ("0.7",)}, {"draws": 2}):
        assert not make_task(tiny_space(), 0.6, testbeds=[one], **named).measures_once


def test_tables_have_the_bounds_of_those_that_were_stopped(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    from prunezero.formula import Criterion

    one = Candidate(0, 0, Criterion.parse("abs(W)"), "seed", (), "new", search_at_least=12.5)
    write_candidates([one.row()], tmp_path)
    table = parquet.read_table(tmp_path / "candidates.parquet")
    assert table["search_at_least"].to_pylist() == [12.5]
    assert "validation_at_least" not in table.column_names
    assert PERPLEXITY.of(one.row(), "search") is None and one.search_rank == 12.5


def test_searches_of_which_one_measurement_does_not_say_enough_are_refused() -> None:
    for named in ({"draws": 2}, {"strategy": "plain-gp"}):
        with pytest.raises(SearchError, match="stop_early compares windows of one model"):
            make_task(tiny_space(), 0.6, testbeds=[testbed()], stop_early=True, **named)
