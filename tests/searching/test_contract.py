"""What a search trusts its strategies for, and how those of other packages come in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from prunezero.errors import SearchError
from prunezero.formula import Criterion
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.task import Task
from prunezero.searching.history import History
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.strategies import catalogue
from prunezero.searching.strategies.catalogue import (
    GROUP,
    STRATEGIES,
    find_strategy,
    strategy_words,
)
from prunezero.searching.strategies.evolution import Proposal, Strategy, without_state
from prunezero.testing.strategies import broken_promises
from tests.searching.testbed import make_task


@pytest.mark.parametrize("space", ["tiny", "width", "blocks"])
@pytest.mark.parametrize("word", STRATEGIES)
def test_every_strategy_keeps_the_promises_that_others_are_held_to(word: str, space: str) -> None:
    task = make_task(SearchSpace.load(space), 0.5, seed=3)
    assert broken_promises(STRATEGIES[word], task) == []


def test_a_strategy_that_breaks_its_promises_is_told_each_of_them() -> None:
    task = make_task(SearchSpace.load("tiny"), 0.5, seed=3)
    clock = itertools.count()

    def moody(task: Task, history: History, generation: int) -> Iterator[Proposal]:
        while True:
            constant = next(clock) + 2
            yield Proposal(Rule(Criterion.parse(f"{constant}*X + abs(W)")), "moody")
            yield Proposal(Rule(Criterion.parse("abs(W)"), {"compare": "rows"}), "moody")
            yield Proposal(Rule(Criterion.parse("X")), "moody")

    told = "\n".join(broken_promises(Strategy(without_state(moody), ""), task))
    assert "something else" in told and "'rows'" in told and "X is too large" in told
    silent = Strategy(without_state(lambda task, history, generation: iter([None] * 9)), "")
    assert broken_promises(silent, task) == ["it proposes nothing in 50 draws"]


def test_a_strategy_of_another_package_is_found_by_its_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = "prunezero.searching.strategies.catalogue:STRATEGIES"
    points = [
        EntryPoint("theirs", "tests.searching.theirs:STRATEGY", GROUP),
        EntryPoint("wrong", where, GROUP),
        EntryPoint("gone", "tests.searching.nowhere:STRATEGY", GROUP),
    ]
    monkeypatch.setattr(catalogue, "entry_points", lambda group: points)
    assert find_strategy("theirs").note == "from elsewhere"
    assert "theirs" in strategy_words()
    with pytest.raises(SearchError, match="did you mean 'theirs'"):
        find_strategy("their")
    with pytest.raises(SearchError, match="is a dict, not a Strategy"):
        find_strategy("wrong")
    with pytest.raises(SearchError, match="strategy 'gone' of .* fails: No module"):
        find_strategy("gone")
