"""Several draws of calibration text: a rule is worth the mean of what it is worth under each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import ScoreError, SearchError
from prunezero.formula import Criterion
from prunezero.models.text.windows import windows_fingerprint
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import Testbed, set_up
from prunezero.report.tracking.search_records import tracked_rows, tracked_search
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.journal import read_journal
from prunezero.searching.evaluation.request import Request
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.provenance import comparable, conditions
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.testbeds import about, drawn
from prunezero.searching.session import Session, find, found_recipe, measure_baselines, open_session
from prunezero.searching.workers.worker import EvaluatorPlan
from tests.searching.test_search import outcome
from tests.searching.test_testbeds import files, timeless
from tests.searching.testbed import SETTINGS, config_of, make_task, tiny_space, tiny_testbed

__all__ = ["files"]

WANDA = Criterion.parse("abs(W)*X")
SPLITS = ("search", "validation", "test")
KEYS = ("search_perplexity", "validation_perplexity", "test_perplexity", "kl")


def testbed_with(seed: int, family: str = "llama") -> Testbed:
    """A tiny model under one draw."""
    return replace(tiny_testbed(family), settings=replace(SETTINGS, seed=seed))


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[list[Session]]:
    """One under each of two draws, and one under both."""
    places = {"first": (3, 1), "second": (4, 1), "both": (3, 2)}
    found = []
    for name, (seed, draws) in places.items():
        testbeds = [testbed_with(seed)]
        task = make_task(tiny_space(), 0.5, draws=draws, testbeds=testbeds)
        found.append(open_session(testbeds, task, tmp_path / name))
    yield found
    for session in found:
        session.rungs.close()


def test_the_layer_error_is_the_geometric_mean_over_draws(sessions: list[Session]) -> None:
    first, second, both = (
        next(session.rungs.errors([Rule(WANDA)]))["layer_error"] for session in sessions
    )
    assert first != second
    assert both == pytest.approx(math.sqrt(first * second))


def test_a_mask_is_known_only_if_it_is_under_every_draw(sessions: list[Session]) -> None:
    first, second, both = (session.rungs.probe(WANDA) for session in sessions)
    assert first and second and both
    assert [*both.bits] == [*first.bits, *second.bits]


def test_a_row_holds_geometric_means_and_each_draw_by_itself(sessions: list[Session]) -> None:
    rows = [
        session.rungs.measure(session.task.recipe(WANDA, "wanda"), SPLITS) for session in sessions
    ]
    first, second, both = rows
    assert first["test_perplexity"] != second["test_perplexity"]
    for key in KEYS:
        assert both[key] == pytest.approx(math.sqrt(first[key] * second[key]))
        assert [part[key] for part in both["regimes"]] == [first[key], second[key]]
    assert [part["seed"] for part in both["regimes"]] == [3, 4]
    assert not any("model" in part for part in both["regimes"])
    assert (both["seed"], both["draws"]) == (3, 2) and "draws" not in first
    losses = both["window_losses"]["test"]
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(both["test_perplexity"])


def test_the_dense_model_and_baselines_are_measured_under_all_draws(
    sessions: list[Session],
) -> None:
    first, second, both = (list(measure_baselines(session, SPLITS)) for session in sessions)
    for alone, other, row in zip(first, second, both, strict=True):
        mean = math.sqrt(alone["test_perplexity"] * other["test_perplexity"])
        assert row["test_perplexity"] == pytest.approx(mean)
        assert [part["seed"] for part in row["regimes"]] == [3, 4]


def test_every_model_is_measured_under_every_draw_and_budget(tmp_path: Path) -> None:
    both, last = [testbed_with(3), testbed_with(3, "opt")], [testbed_with(4, "opt")]
    task = make_task(tiny_space(), 0.5, also="2:4", draws=2, testbeds=both)
    session = open_session(both, task, tmp_path / "all")
    own = make_task(tiny_space(), None, pattern="2:4", testbeds=last)
    alone = open_session(last, own, tmp_path / "alone")
    try:
        row = session.rungs.measure(task.recipe(WANDA, "wanda"), ("test",))
        alike = alone.rungs.measure(alone.task.recipe(WANDA, "wanda"), ("test",))
    finally:
        session.rungs.close()
        alone.rungs.close()
    places = [(part["model"], part["seed"], part["pattern"]) for part in row["regimes"]]
    budgets = ("free", "2:4")
    assert places == [
        (model, seed, pattern)
        for model in ("llama", "opt")
        for seed in (3, 4)
        for pattern in budgets
    ]
    values = [part["test_perplexity"] for part in row["regimes"]]
    assert values[-1] == alike["test_perplexity"]
    assert row["test_perplexity"] == pytest.approx(math.prod(values) ** (1 / 8))


def test_draws_of_one_model_share_its_dense_weights_and_leave_it_dense() -> None:
    testbed, other = testbed_with(3), testbed_with(3, "opt")
    models = [one.language_model.model for one in (testbed, other)]
    before = [{name: one.clone() for name, one in model.state_dict().items()} for model in models]
    task = make_task(tiny_space(), 0.5, draws=2, testbeds=[testbed, other])
    evaluator = Evaluator(task, [testbed, other])
    kept = [one.runner._dense for one in evaluator._sampled]
    assert [kept[0] is one for one in kept] == [True, True, False, False]
    assert kept[2] is kept[3]
    assert "fault" not in evaluator.result(Request.of(Recipe.load("sparsegpt"), ("search",)))
    for model, known in zip(models, before, strict=True):
        assert all(one.equal(known[name]) for name, one in model.state_dict().items())


def test_one_draw_is_measured_under_the_conditions_of_before(tmp_path: Path) -> None:
    testbed = testbed_with(3)
    alone, both = (
        conditions(config_of(tiny_space(), 0.5, draws=draws, testbeds=[testbed]), [testbed])
        for draws in (1, 2)
    )
    ids = windows_fingerprint(testbed.drawn(1).windows("calibration"))
    assert both == alone | {"draws": 2, "drawn_token_ids": [ids]}
    assert ids != alone["calibration token ids"]
    task = make_task(tiny_space(), 0.5, testbeds=[testbed])
    session = open_session([testbed], task, tmp_path / "one")
    rows = list(measure_baselines(session, SPLITS))
    session.rungs.close()
    assert not any({"regimes", "draws"} & set(row) for row in rows)
    first, *results = read_journal(tmp_path / "one" / "journal.jsonl")
    assert "draws" not in comparable(first["header"])
    assert "draws" not in json.dumps(results)


def candidates(folder: Path, draws: int, *, resume: bool = False) -> list[Candidate]:
    options: dict[str, Any] = {"draws": draws, "budget": 8, "resume": resume}
    return list(find(testbed_with(3), tiny_space(), 0.5, folder=folder, **options))


def test_a_search_over_draws_is_resumed_and_refuses_another_number(tmp_path: Path) -> None:
    found = candidates(tmp_path / "run", 2)
    again = candidates(tmp_path / "run", 2, resume=True)
    assert outcome(again) == outcome(found) and all(one.is_replayed for one in again if one.kl)
    for draws in (1, 3):
        with pytest.raises(SearchError, match="draws: "):
            candidates(tmp_path / "run", draws, resume=True)
    with pytest.raises(SearchError, match="^draws is 0; "):
        candidates(tmp_path / "none", 0)


def test_records_and_recipes_say_how_many_draws(sessions: list[Session]) -> None:
    winner = Candidate(0, 0, WANDA, "random", (), "new")
    alone, _, both = sessions
    assert found_recipe(both, "mine", winner).provenance["draws"] == 2
    assert "draws" not in found_recipe(alone, "mine", winner).provenance
    assert tracked_search(both, "mine", finished=True).params["draws"] == 2
    first, means = (
        list(tracked_rows(list(measure_baselines(one, ("test",))), one.testbeds))
        for one in (alone, both)
    )
    # A mean must not take the place of what one draw gave.
    assert not {one.key for one in first} & {one.key for one in means}
    assert {one.params["draws"] for one in means} == {2}


@pytest.mark.parametrize(
    ("families", "told"),
    [
        (["llama"], "calibration seed 4: it fails"),
        (["llama", "opt"], "model llama, calibration seed 4: it fails"),
    ],
)
def test_an_error_says_under_which_draw(families: list[str], told: str) -> None:
    testbeds = drawn([testbed_with(3, family) for family in families], 2)
    with pytest.raises(ScoreError, match=f"^{told}$"), about(testbeds[1], testbeds):
        raise ScoreError("it fails")


def test_a_plan_builds_the_evaluator_of_all_draws_again(files: tuple[Path, Path, Path]) -> None:
    testbed = set_up(str(files[0]), files[2], SETTINGS, dtype="float32", device="cpu")
    task = make_task(tiny_space(), 0.5, draws=2, testbeds=[testbed])
    evaluator, again = (
        Evaluator(task, [testbed]),
        EvaluatorPlan.of(task.config, [testbed]).evaluator(1),
    )
    recipe = Recipe.load("wanda")
    for request in (Request.of(recipe), Request.of(recipe, ("search",))):
        result = timeless(evaluator.result(request))
        assert timeless(again.result(request)) == result
        assert json.loads(json.dumps(result)) == result
