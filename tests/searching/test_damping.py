"""Candidates are looked at with the damping that their recipe has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.scoring.feature_values import needed_sums
from prunezero.scoring.score import evaluate, features_of
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.request import Request
from prunezero.searching.evaluation.rungs import shown_by_mask
from prunezero.searching.experiment.config import SearchConfig
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.task import Task
from prunezero.searching.proxies.layer_error import merged_scores
from prunezero.searching.proxies.samples import sample_rows, stacked
from prunezero.searching.session import open_session
from tests.searching.testbed import make_task, tiny_space, tiny_testbed
from tests.tiny_models import tiny_batches, tiny_model

FORMULA, OWN = Criterion.parse("abs(W)/U*X"), Criterion.parse("W**2/V")


@pytest.mark.parametrize("damping", [0.01, 0.8])
def test_scores_on_samples_are_those_of_the_layers_at_the_damping_of_the_recipe(
    damping: float,
) -> None:
    model = tiny_model()
    layers = find_linears(model.model)
    features = ("W", "X", "U", "V")
    statistics = calibrate(model, tiny_batches(), layers, needed_sums(features) | {"gram"})
    samples = sample_rows(layers, statistics, features, share=1.0, dampings=[0.8])
    recipe = Recipe(name="it", criterion=FORMULA, criteria={"down_proj": OWN}, damping=damping)
    weights = {layer.name: layer.weight for layer in layers}
    stacks = stacked(samples)
    for stack, scores in zip(stacks, merged_scores(stacks, recipe), strict=True):
        for name, found in zip(stack.names, scores, strict=True):
            criterion, weight = recipe.criterion_of(name), weights[name]
            values = features_of(criterion, weight, statistics[name], damping=damping)
            assert torch.equal(found, evaluate(criterion, values, weight.shape))


def test_a_damping_that_was_not_sampled_is_no_other_one() -> None:
    model = tiny_model()
    layers = find_linears(model.model)
    statistics = calibrate(model, tiny_batches(), layers, needed_sums(["U"]))
    (stack, *_) = stacked(sample_rows(layers, statistics, ("W", "U")))
    assert stack.at_damping(0.01) is stack
    with pytest.raises(KeyError):
        stack.at_damping(0.3)
    plain, *_ = stacked(sample_rows(layers, statistics, ("W",)))
    assert plain.at_damping(0.3) is plain


def test_layer_errors_follow_the_damping_together_as_alone() -> None:
    space = tiny_space(terminals=["abs(W)", "U", "X"], choices={"damping": [0.01, 0.8]})
    testbed = tiny_testbed()
    task = Task(SearchConfig.on(testbed, [], space_content=space, sparsity=0.5))
    evaluator = Evaluator(task, [testbed])
    recipes = [
        Recipe(name="it", criterion=FORMULA, damping=damping) for damping in (0.01, 0.8, 0.01)
    ]
    requests = [Request.of(recipe) for recipe in recipes]
    together = [result["layer_error"] for result in evaluator.results(requests)]
    assert together == [evaluator.result(request)["layer_error"] for request in requests]
    assert together[0] == together[2] != together[1]


def test_rungs_ask_with_the_damping_of_a_rule_whose_formula_looks_at_a_factor(
    tmp_path: Path,
) -> None:
    space = tiny_space(terminals=["abs(W)", "U", "X"], choices={"damping": [0.01, 0.8]})
    session = open_session([tiny_testbed()], make_task(space, 0.5), tmp_path)
    try:
        usual, other = (Rule(FORMULA, {"damping": damping}) for damping in (0.01, 0.8))
        errors = [one["layer_error"] for one in session.rungs.errors([usual, other])]
        assert errors[0] != errors[1]
        probes = [session.rungs.probe(rule) for rule in (usual, other)]
        assert probes[0] is not None and probes[1] is not None
        assert probes[0].digest != probes[1].digest
        # A formula that looks at none is asked about once.
        plain = [Rule(Criterion.parse("abs(W)*X"), rule.choices) for rule in (usual, other)]
        assert {str(shown_by_mask(rule)) for rule in plain} == {"{}"}
    finally:
        session.rungs.close()
