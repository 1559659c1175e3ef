"""A search for formulas by which units go in a training: each candidate is one, and is screened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import RecipeError
from prunezero.formula import Criterion
from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.compare import QUICK_KL, RecipeRunner
from prunezero.pruning.prune import prune
from prunezero.pruning.recovery.gradual import GradualRemoval
from prunezero.pruning.recovery.periods import PeriodicRemoval
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import Testbed
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.experiment.baselines import baselines
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.proxies.unit_samples import UnitSamples
from prunezero.searching.search import search
from prunezero.searching.session import find, make_task, open_session
from prunezero.searching.spaces.space import SearchSpace
from tests.pruning.trained import digest
from tests.searching.test_search import outcome
from tests.searching.testbed import config_of, tiny_space, tiny_testbed

STEPS = 6
# lora_prune keeps four of six blocks whole.
SPARSITY = 0.2
TRAINING: dict[str, Any] = {
    "schedule": {"while_training": {"every": 1, "begin": 0.5, "end": 0.9}},
    "recover": {"lora": {"steps": STEPS, "batch": 1, "rank": 2, "learning_rate": 0.01}},
}
PERIODS: dict[str, Any] = {
    "training": {
        "schedule": {"periods": {"periods": 2, "begin": 0.5}},
        "recover": {"tune": {"sequences": STEPS, "batch": 1}},
    },
    "terminals": ["T_norm", "T_first", "T_cos", "PARAMS"],
    "choices": {"compare": ["group", "model"]},
}


def space_of(**changes: Any) -> SearchSpace:
    return tiny_space("lora", **{"training": TRAINING, "max_complexity": 16, **changes})


@pytest.fixture(scope="module")
def testbed() -> Testbed:
    return tiny_testbed(num_hidden_layers=6)


def test_a_rule_of_the_space_is_lora_prune_with_another_formula_and_a_shorter_training() -> None:
    task = make_task(config_of(SearchSpace.load("lora"), 0.2))
    recipe = task.recipe(Rule(Criterion.parse("row_norm(W_lora)*M2")), "it")
    assert recipe.schedule.word == "while_training" and recipe.recover.word == "lora"
    (known,) = (one for one in baselines(task) if one.name == "lora_prune")
    assert known.schedule == recipe.schedule and known.recover == recipe.recover
    assert any("G_lora" in seed.criterion.features for seed in task.seeds)
    assert all(one.recover.word == "none" for one in baselines(task) if one != known)


@pytest.mark.parametrize(
    ("changes", "removal", "at"),
    [({}, GradualRemoval, 3), (PERIODS, PeriodicRemoval, 3)],
)
def test_what_is_screened_are_the_masks_of_the_moment_in_which_units_may_go(
    changes: dict[str, Any],
    removal: Any,
    at: int,
    testbed: Testbed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = digest(testbed.language_model)
    task = make_task(config_of(space_of(**changes), SPARSITY, testbeds=[testbed]))
    samples = Evaluator(task, [testbed])._sampled[0].samples
    assert isinstance(samples, UnitSamples) and digest(testbed.language_model) == before
    formula = "T_norm+T_first" if changes else "row_sum(abs(G_lora*W_lora))"
    recipe = task.recipe(Rule(Criterion.parse(formula), {"compare": "model"}), "it")
    seen: list[dict[Any, torch.Tensor]] = []
    plain = removal.see

    def see(self: Any, trained: Any) -> None:
        known = self.known(trained)
        seen.append({group.key: self.score(group, known).clone() for group in self.groups})
        plain(self, trained)

    monkeypatch.setattr(removal, "see", see)
    layers = find_linears(testbed.language_model.model)
    known = testbed.statistics(layers, dense_sums([recipe]))
    copied = tiny_testbed(num_hidden_layers=6).language_model
    windows = testbed.windows("calibration")
    prune(copied, recipe, SPARSITY, statistics=known, windows=windows)
    kind = recipe.unit.row
    for group in samples.groups:
        found = kind.scores(
            group,
            recipe.criterion,
            samples.statistics,
            damping=recipe.damping,
            options=recipe.unit.options,
        )
        torch.testing.assert_close(found, seen[at][group.key])
        assert not torch.equal(found, seen[at - 1][group.key])
    (masks,) = samples.masks_under(recipe, task.budgets)
    assert any(not bool(mask.all()) for mask in masks)


@pytest.mark.parametrize("changes", [{}, PERIODS])
def test_the_first_number_of_a_candidate_that_climbs_is_that_of_a_training(
    changes: dict[str, Any], testbed: Testbed, tmp_path: Path
) -> None:
    space = space_of(**changes)
    found = list(find(testbed, space, SPARSITY, folder=tmp_path, budget=6))
    climbed = {one.slot: one for one in found if one.kl is not None}
    assert climbed and any(one.validation_perplexity is not None for one in found)
    task = make_task(config_of(space, SPARSITY, testbeds=[testbed]))
    (candidate, *_) = climbed.values()
    recipe = task.recipe(candidate.rule, "by hand")
    layers = find_linears(testbed.language_model.model)
    runner = RecipeRunner(
        testbed, testbed.statistics(layers, dense_sums([recipe])), splits=("search", "validation")
    )
    row = runner.row(recipe, SPARSITY, (QUICK_KL,))
    assert row["kl"] == pytest.approx(candidate.kl, rel=1e-5)
    assert runner.outcome is not None and len(runner.outcome.trainings[0].losses) == STEPS


def test_a_search_that_was_cut_goes_on_as_it_would_have(testbed: Testbed, tmp_path: Path) -> None:
    space = space_of()
    task = make_task(config_of(space, SPARSITY, testbeds=[testbed]))
    whole = list(find(testbed, space, SPARSITY, folder=tmp_path / "whole", budget=5))
    found = []
    for resume in (False, True):
        session = open_session([testbed], task, tmp_path / "cut", resume=resume)
        try:
            found = list(search(session.rungs, max_candidates=5 if resume else 3))
        finally:
            session.journal.close()
    assert outcome(found) == outcome(whole)


def test_spaces_without_a_training_decide_what_they_did() -> None:
    assert "training" not in SearchSpace.load("width").decides()
    assert SearchSpace.load("lora").decides()["training"]["recover"]["lora"]["steps"] == 40


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"training": {}},
            "W_lora is known only while layers train; give the space a training",
        ),
        ({"training": {"recover": "lora"}}, "has the keys schedule and recover, both and no other"),
        (
            {"training": {"schedule": "one-shot", "recover": "lora"}},
            "schedule: one-shot takes nothing out of a training; use while_training or periods",
        ),
        ({"training": {**TRAINING, "recover": "tune"}}, "so it needs recover: lora"),
        ({"choices": {"update": [["none"], ["refit"]]}}, "update: refit looks at units that go at"),
        ({"terminals": ["T_norm", "PARAMS"]}, "T_norm is known only .* schedule: periods"),
        ({"unit": "mlp", "terminals": ["KL"], "choices": {}}, "is for unit .*, not for mlp"),
    ],
)
def test_what_no_search_can_train_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=told):
        space_of(**changes)
