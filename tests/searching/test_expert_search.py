"""A search for criteria of experts screens by what mixtures lose, and goes on after a cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunezero.formula import Criterion
from prunezero.pruning.testbed import Testbed
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.request import Request
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.proxies.expert_samples import ExpertSamples
from prunezero.searching.search import search
from prunezero.searching.session import find, make_task, open_session
from tests.searching.test_search import outcome
from tests.searching.testbed import SETTINGS, config_of, tiny_space, tiny_text
from tests.tiny_moe import moe_model


@pytest.fixture(scope="module")
def testbed() -> Testbed:
    return Testbed(moe_model("mixtral"), tiny_text(), SETTINGS)


def test_the_error_is_what_mixtures_lose_with_a_router_of_those_that_stay(
    testbed: Testbed,
) -> None:
    task = make_task(config_of(tiny_space("experts"), 0.34, testbeds=[testbed]))
    evaluator = Evaluator(task, [testbed])
    samples = evaluator._sampled[0].samples
    assert isinstance(samples, ExpertSamples)
    recipe = task.recipe(Rule(Criterion.parse("GF/N")), "it")
    (masks,) = samples.masks_under(recipe, task.budgets)
    errors = []
    for group, known, kept in zip(samples.groups, samples.losses, masks, strict=True):
        layer, lost, whole = group.mixture, 0.0, 0.0
        assert layer is not None
        for token in known.tokens:
            outputs = []
            for alive in (torch.ones_like(kept), kept):
                # Mixtral: softmax over the two largest logits of those that may be chosen.
                logits = (layer.router_weight @ token).masked_fill(~alive, -torch.inf)
                largest, chosen = logits.topk(2)
                output = torch.zeros_like(token)
                for share, expert in zip(largest.softmax(0), chosen, strict=True):
                    gate, up = (layer.up[expert] @ token).chunk(2)
                    inside = torch.nn.functional.silu(gate) * up
                    output += share * (layer.down[expert] @ inside)
                outputs.append(output.detach())
            lost += float((outputs[1] - outputs[0]).square().sum())
            whole += float(outputs[0].square().sum())
        errors.append(lost / whole)
    assert samples.error(recipe, masks) == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert samples.error(recipe, [torch.ones_like(kept) for kept in masks]) == 0.0
    evaluator.result(Request.of(recipe, ("validation",)))
    pruned = evaluator._sampled[0].runner.outcome
    assert pruned is not None
    assert [kept.tolist() for _, kept in pruned.selection] == [kept.tolist() for kept in masks]


def test_a_search_of_experts_finds_candidates_and_goes_on_as_it_would_have(
    testbed: Testbed, tmp_path: Path
) -> None:
    space = tiny_space("experts")
    whole = list(find(testbed, space, 0.5, folder=tmp_path / "whole", budget=24))
    assert any(one.validation_perplexity is not None for one in whole)
    assert {one.status for one in whole} <= {"new", "known", "invalid"}
    task = make_task(config_of(space, 0.5, testbeds=[testbed]))
    found = []
    for resume in (False, True):
        session = open_session([testbed], task, tmp_path / "cut", resume=resume)
        try:
            found = list(search(session.rungs, max_candidates=24 if resume else 7))
        finally:
            session.journal.close()
    assert outcome(found) == outcome(whole)
