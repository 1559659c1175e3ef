"""Several budgets at once: a rule is worth the geometric mean of what it is worth in each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import PruneZeroError, SearchError
from prunezero.formula import Criterion
from prunezero.models.measures import SHARES
from prunezero.pruning.budget import Budget
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.searching.evaluation.journal import read_journal
from prunezero.searching.experiment.baselines import published_equivalent
from prunezero.searching.experiment.budgets import geometric_mean, read_budgets
from prunezero.searching.experiment.provenance import comparable
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.search import search
from prunezero.searching.session import Session, find, measure_baselines, open_session
from prunezero.searching.workers.worker import EvaluatorPlan
from tests.searching.testbed import make_task, tiny_space, tiny_testbed

WANDA = Criterion.parse("abs(W)*X")


def opened(folder: Path, sparsity: float, pattern: str = "free", also: str = "") -> Session:
    task = make_task(tiny_space(), sparsity, pattern=pattern, also=also)
    return open_session([tiny_testbed()], task, folder)


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[list[Session]]:
    """One for each of two budgets, and one for both."""
    found = [
        opened(tmp_path / "half", 0.5),
        opened(tmp_path / "pattern", 0.5, "2:4"),
        opened(tmp_path / "both", 0.5, also="2:4"),
    ]
    yield found
    for session in found:
        session.rungs.close()


def recipe_in(session: Session) -> Recipe:
    return session.task.recipe(WANDA, "wanda")


def test_budgets_are_read_from_words_and_told_by_them() -> None:
    assert read_budgets("") == ()
    assert read_budgets("0.7, 2:4") == (Budget(0.7), Budget(0.5, pattern="2:4"))
    assert [budget.word for budget in read_budgets("0.7,1:4")] == ["0.7", "1:4"]
    # What is told reads back to the same budget, to the last digit.
    assert read_budgets("0.4374996")[0].word == "0.4374996"
    assert read_budgets("02:04") == read_budgets("2:4")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("0.7,dense", "'dense' is no budget"),
        ("1.5", "1.5"),
        ("5:4", "5:4"),
        ("0.5", "twice"),
        ("2:4,02:4", "twice"),
        ("0", "at sparsity 0"),
    ],
)
def test_a_word_that_is_no_budget_is_told(words: str, told: str) -> None:
    with pytest.raises(PruneZeroError, match=told):
        make_task(tiny_space(), 0.5, also=words)


def test_the_mean_of_one_number_is_that_number_to_the_last_bit() -> None:
    assert geometric_mean([0.1]) == 0.1
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(geometric_mean([0.0, math.nan]))


def test_the_layer_error_is_the_geometric_mean_over_budgets(sessions: list[Session]) -> None:
    half, pattern, both = (
        next(session.rungs.errors([Rule(WANDA)]))["layer_error"] for session in sessions
    )
    assert half != pattern
    assert both == pytest.approx(math.sqrt(half * pattern))


def test_a_mask_is_known_only_if_it_is_so_under_every_budget(sessions: list[Session]) -> None:
    half, pattern, both = (session.rungs.probe(WANDA) for session in sessions)
    assert half and pattern and both
    assert len(both.bits) == len(half.bits) + len(pattern.bits)
    assert len({half.digest, pattern.digest, both.digest}) == 3


def test_a_row_holds_geometric_means_and_each_budget_by_itself(sessions: list[Session]) -> None:
    splits = ("search", "validation", "test")
    half, pattern, both = (
        session.rungs.measure(recipe_in(session), splits) for session in sessions
    )
    for key in ("search_perplexity", "validation_perplexity", "test_perplexity", "kl"):
        assert both[key] == pytest.approx(math.sqrt(half[key] * pattern[key]))
    for key in SHARES:
        assert both[key] == pytest.approx((half[key] + pattern[key]) / 2)
        assert [one[key] for one in both["regimes"]] == [half[key], pattern[key]]
    assert half["acceptance"] != pattern["acceptance"]
    assert [one["test_perplexity"] for one in both["regimes"]] == [
        half["test_perplexity"],
        pattern["test_perplexity"],
    ]
    assert both["pattern"] == "free, 2:4"
    # Tests over windows are about the number that is shown.
    losses = both["window_losses"]["test"]
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(both["test_perplexity"])


def test_baselines_are_measured_under_the_same_budgets(sessions: list[Session]) -> None:
    rows = list(measure_baselines(sessions[2], ("validation",)))
    assert rows[0]["recipe"] == "dense"
    assert all(len(row["regimes"]) == 2 for row in rows[1:])


def test_what_is_left_open_is_usable_under_every_budget() -> None:
    choices = {
        "compare": ("row", "layer"),
        "allocate": ("uniform", "owl"),
        "permute": ("none", "heuristic"),
    }
    space = tiny_space(choices=choices)
    assert set(make_task(space, 0.5).options) == {"compare", "allocate"}
    assert set(make_task(space, None, pattern="2:4").options) == {"permute"}
    # Owl is refused at 2:4 and a permutation elsewhere; who competes matters at 50 % alone.
    assert set(make_task(space, 0.5, also="2:4").options) == {"compare"}
    assert set(make_task(space, 0.5, also="0.7").options) == {"compare", "allocate"}


def test_an_equivalent_recipe_competes_alike_where_that_matters() -> None:
    magnitude = Criterion.parse("abs(W)")
    space = tiny_space(compare="row")
    assert published_equivalent(make_task(space, None, pattern="2:4"), magnitude) == "magnitude"
    assert published_equivalent(make_task(space, None, pattern="2:4", also="0.5"), magnitude) != (
        "magnitude"
    )


def test_a_search_over_budgets_is_resumed_and_refuses_others(tmp_path: Path) -> None:
    def words(also: str, *, resume: bool = False) -> list[Any]:
        found = find(
            tiny_testbed(),
            tiny_space(),
            0.5,
            also=also,
            folder=tmp_path / "run",
            budget=12,
            resume=resume,
        )
        return [(one.slot, one.mask, one.layer_error, one.search_perplexity) for one in found]

    assert words("0.7,2:4") == words("0.7,2:4", resume=True)
    with pytest.raises(SearchError, match="also"):
        words("0.7", resume=True)


def test_a_worker_measures_under_the_same_budgets() -> None:
    task = make_task(tiny_space(), 0.5, also="0.7,2:4")
    assert EvaluatorPlan.of(task.config, [tiny_testbed()]).config.budgets == task.budgets


def test_a_search_over_one_budget_asks_and_answers_as_it_did_before(tmp_path: Path) -> None:
    session = opened(tmp_path / "one", 0.5)
    try:
        row = session.rungs.measure(recipe_in(session), ("validation",))
        assert "regimes" not in row and row["pattern"] == "free"
        assert list(search(session.rungs, max_candidates=3))
    finally:
        session.rungs.close()
    first = read_journal(tmp_path / "one" / "journal.jsonl")[0]
    assert "also" not in comparable(first["header"])
