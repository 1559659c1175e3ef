"""A search for criteria of experts screens by what mixtures lose, and goes on after a cut."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.formula import Criterion
from prunezero.models.observing.routing import unknown_features
from prunezero.pruning.testbed import Testbed, set_up
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.request import Request
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.testbeds import without_unknown_features
from prunezero.searching.proxies.expert_samples import ExpertSamples
from prunezero.searching.search import search
from prunezero.searching.session import find, make_task, open_session
from prunezero.searching.workers.processes import process_pool
from tests.searching.test_search import outcome
from tests.searching.testbed import SETTINGS, config_of, tiny_space, tiny_text
from tests.tiny_moe import moe_groups, moe_model, save_moe


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


def test_one_worker_and_two_find_the_same(tmp_path: Path) -> None:
    """Each of them loads the mixture anew."""
    folder, text = save_moe("mixtral", tmp_path / "mixtral"), tmp_path / "letters.jsonl"
    rng = random.Random(0)
    documents = [{"text": "".join(rng.choices("abcdefgh ,.", k=400))} for _ in range(80)]
    text.write_text("".join(f"{json.dumps(one)}\n" for one in documents))
    testbed = set_up(str(folder), str(text), SETTINGS, dtype="float32", device="cpu")
    task = make_task(config_of(tiny_space("experts"), 0.34, testbeds=[testbed]))
    found = []
    for count in (0, 1, 2):
        pool = None if count == 0 else partial(process_pool, count=count, threads=1)
        session = open_session([testbed], task, tmp_path / str(count), pool=pool)
        try:
            found.append(list(search(session.rungs, max_candidates=12)))
        finally:
            session.rungs.close()
    assert outcome(found[0]) == outcome(found[1]) == outcome(found[2])
    assert any(one.validation_perplexity is not None for one in found[0])


def test_a_space_lacks_what_routers_of_groups_say_nothing_of() -> None:
    on = Testbed(moe_model("deepseek_v3"), tiny_text(), SETTINGS)
    config = config_of(tiny_space("experts"), 0.34, testbeds=[on])
    assert "LOO" in config.space_content.features
    narrowed, why = without_unknown_features(config, [on])
    gone = set(config.space_content.features) - set(narrowed.space_content.features)
    assert gone == {"LOO"} and why.startswith("LOO (no expert of model.layers.1.mlp can go")
    assert without_unknown_features(narrowed, [on]) == (narrowed, "")


def test_a_router_whose_weights_are_no_shares_has_no_soft_count() -> None:
    model = moe_model("mixtral")
    groups = moe_groups(model)
    assert unknown_features(groups) == {}
    router: Any = groups[0].mixture.router  # type: ignore[union-attr]
    router.register_forward_hook(lambda one, args, out: (out[0], out[1].sqrt(), out[2]))
    assert list(unknown_features(groups)) == ["SOFT"]


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
