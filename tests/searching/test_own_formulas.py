"""Searches that may give kinds of projection a formula of their own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import ScoreError
from prunezero.formula import Criterion
from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.report.runs.summary import latex_of_front
from prunezero.report.runs.warm_start import rules_of
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.rung_correlation import rung_correlation
from prunezero.searching.experiment.baselines import published_equivalent
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.rule import Rule, factor_of, scaled
from prunezero.searching.experiment.task import Task
from prunezero.searching.history import History
from prunezero.searching.proxies.layer_error import WeightSamples, masks_on
from prunezero.searching.proxies.samples import Sample, Stack, probe_of
from prunezero.searching.session import find, open_session
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.strategies.catalogue import STRATEGIES
from prunezero.searching.strategies.evolution import _with_choices
from prunezero.searching.strategies.parents import ParentPool
from prunezero.searching.strategies.per_layer import settled, with_formula, with_own_formula
from prunezero.testing.strategies import broken_promises
from tests.searching.testbed import make_task, tiny_space, tiny_testbed
from tests.tiny_models import tiny_model

WANDA = Criterion.parse("abs(W)*X")
OWN = {"down_proj": "abs(W)", "q_proj": "abs(W)*sqrt(G)"}


def task_of(sparsity: float | None = 0.5, pattern: str = "free", **space: Any) -> Task:
    layers = find_linears(tiny_model().model)
    fields = {"criteria": ["q_proj", "down_proj", "c_attn"], **space}
    return make_task(tiny_space(**fields), sparsity, pattern=pattern).on(layers)


def candidate(text: str, slot: int, **choices: Any) -> Candidate:
    fields: Any = {"mask": str(slot), "layer_error": 0.1 + slot, "kl": 1.0 + slot}
    return Candidate(slot, 0, Criterion.parse(text), "seed", (), "new", choices, **fields)


def test_kinds_that_the_model_lacks_and_those_taken_already_are_left_out() -> None:
    assert task_of().criteria == ("q_proj", "down_proj")
    assert task_of(None, "2:4").criteria == ("q_proj", "down_proj")
    twice = task_of(criteria=["mlp.down_proj", "down_proj", "re:self_attn"])
    assert twice.criteria == ("mlp.down_proj", "re:self_attn")
    both = make_task(tiny_space(criteria=["q_proj", "c_attn"]), 0.5).on(
        find_linears(tiny_model().model), find_linears(tiny_model("gpt2").model)
    )
    assert both.criteria == ()


@pytest.mark.parametrize("name", ["projections"])
def test_the_space_of_projections_names_each_kind_of_every_family(name: str) -> None:
    space = SearchSpace.load(name)
    for family in ("llama", "gpt2", "opt"):
        layers = find_linears(tiny_model(family).model)
        task = make_task(space, None, pattern="2:4").on(layers)
        named = {layer.name for layer in layers for kind in task.criteria if kind in layer.name}
        assert named == {layer.name for layer in layers}


@pytest.mark.parametrize("compare", ["row", "model"])
def test_a_child_has_another_formula_for_one_kind(compare: str) -> None:
    task = task_of()
    history = History()
    for slot, text in enumerate(("abs(W)*X", "abs(W)*G", "W**2*minmax(G)")):
        history.keep(candidate(text, slot, compare=compare))
    parent_pool = ParentPool.among(history, task.space, 0)
    own = {"q_proj": "0.8*abs(W)*X" if compare == "model" else "abs(W)*G1"}
    parent = candidate("abs(W)*X", 0, compare=compare, criteria=own)
    seen = set()
    for seed in range(60):
        rule = with_own_formula(task, parent, parent_pool, random.Random(seed))
        assert rule.criterion == parent.criterion
        recipe = task.recipe(rule, "it")
        assert recipe.compare == compare and set(recipe.criteria) <= {"q_proj", "down_proj"}
        assert all(map(task.space.holds, rule.formulas))
        seen.add(rule.text)
        if compare == "model":
            # Only factors: scores of other formulas would not compare.
            assert all(factor_of(one, WANDA) for one in recipe.criteria.values())
    # At a factor once more, or at the parent's own formula.
    assert len(seen) == 8 if compare == "model" else len(seen) > 10, seen


def test_what_another_candidate_has_for_a_kind_is_taken_over_for_that_kind() -> None:
    task, history = task_of(criteria=["q_proj"]), History()
    history.keep(candidate("abs(W)", 1, criteria={"q_proj": "abs(W)*F"}))
    history.keep(candidate("abs(W)", 2, criteria={"q_proj": "abs(W)*F"}))
    parent_pool = ParentPool.among(history, task.space, 0)
    parent = candidate("abs(W)*X", 0)
    seen = {
        str(with_own_formula(task, parent, parent_pool, random.Random(seed)).choices)
        for seed in range(20)
    }
    assert "{'criteria': {'q_proj': 'abs(W)*F'}}" in seen


def test_where_all_layers_compete_a_kind_keeps_its_factor_when_the_formula_changes() -> None:
    own = {"q_proj": "0.8*abs(W)*(100*G1 + X)", "down_proj": "abs(W)*G", "up_proj": "2*abs(W)*X"}
    before = Criterion.parse("abs(W)*(100*G1 + X)")
    rule = Rule(before, {"compare": "model", "criteria": own})
    after = Criterion.parse("abs(W)*sqrt(F)")
    task = task_of()
    # Of another formula nobody knows what it would be now.
    assert with_formula(task, rule, after).choices == {
        "compare": "model",
        "criteria": {"q_proj": "0.8*abs(W)*sqrt(F)"},
    }
    by_rows = Rule(before, {"compare": "row", "criteria": own})
    assert with_formula(task, by_rows, after).per_layer.keys() == own.keys()
    one = rule.with_per_layer({"q_proj": Criterion.parse(own["q_proj"])})
    recipe = task.recipe(one, "it")
    assert task.with_formula(recipe, after).text == "abs(W)*sqrt(F); q_proj: 0.8*abs(W)*sqrt(F)"
    # A pattern says itself who competes, whatever the rule says.
    pattern = task_of(None, "2:4")
    assert pattern.with_formula(recipe, after).criteria == recipe.criteria


def test_factors_keep_three_decimals_however_often_they_change() -> None:
    base = Criterion.parse("abs(W)*X + 0.123*G + 2.461*F")
    factor = 1.0
    for _ in range(40):
        changed = scaled(base, factor * 0.8 if factor > 0.01 else factor * 70)
        assert changed is not None
        found = factor_of(changed, base)
        assert found is not None and found == round(found, 3) > 0
        factor = found
    assert factor_of(Criterion.parse("abs(W)*G"), base) is None


@pytest.mark.parametrize(
    ("compare", "own", "left"),
    [
        ("row", {"q_proj": "abs(W)*X"}, {}),
        ("row", {"q_proj": "0.8*abs(W)*X"}, {}),
        ("row", {"q_proj": "sqrt(abs(W)*X)/R1"}, {}),
        ("row", {"q_proj": "2*abs(W)*G"}, {"q_proj": "abs(W)*G"}),
        ("model", {"q_proj": "abs(W)*X"}, {}),
        ("model", {"q_proj": "0.8*abs(W)*X"}, {"q_proj": "0.8*abs(W)*X"}),
        ("row", {"q_proj": "abs(W)*X*G*G1*R1*C1*F*Y*(X + C1)*(G + Y)*(Y + C1)"}, {}),
    ],
)
def test_what_no_mask_sees_of_own_formulas_is_taken_away(
    compare: str, own: dict[str, str], left: dict[str, str]
) -> None:
    rule = Rule(WANDA, {"compare": compare, "criteria": own})
    found = settled(task_of(), rule)
    assert found.choices.get("criteria", {}) == left
    assert found.criterion == WANDA and found.choices["compare"] == compare


def test_the_mask_on_the_probe_is_that_of_all_formulas(tmp_path: Path) -> None:
    session = open_session([tiny_testbed()], task_of(), tmp_path / "run")

    def digest(text: str, **choices: Any) -> str:
        mask = session.rungs.probe(Rule(Criterion.parse(text), choices))
        assert mask is not None
        return mask.digest

    plain = digest("abs(W)*X")
    assert digest("abs(W)*X", criteria={"q_proj": "abs(W)"}) != plain
    assert digest("abs(W)*X", criteria={"q_proj": "2*abs(W)*X"}) == plain
    # Where all layers compete, the scale of one beside the other is seen.
    wide: dict[str, Any] = {"compare": "model", "criteria": {"q_proj": "0.8*abs(W)*X"}}
    assert digest("abs(W)*X", **wide) != digest("2*abs(W)*X", **wide)
    assert digest("abs(W)*X", **wide) == digest(
        "2*abs(W)*X", compare="model", criteria={"q_proj": "1.6*abs(W)*X"}
    )
    session.journal.close()


def test_a_layer_of_each_kind_is_on_the_probe() -> None:
    layers = find_linears(tiny_model(num_hidden_layers=8).model)
    weight = torch.ones(2, 4)
    samples = [Sample(one.name, {"W": weight}, None, torch.ones(2)) for one in layers]
    usual = {sample.name for sample in probe_of(samples)}
    missing = next(layer.name for layer in layers if layer.name not in usual)
    wider = [sample.name for sample in probe_of(samples, kinds=[missing, "q_proj", "c_attn"])]
    assert set(wider) == usual | {missing}
    assert wider == [sample.name for sample in samples if sample.name in wider]


def test_the_audit_looks_at_all_rules_whose_error_sees_what_they_are() -> None:
    some = [candidate("abs(W)*X", slot, criteria={"q_proj": "abs(W)"}) for slot in range(4)]
    others = [candidate("abs(W)*G", slot, criteria={}) for slot in range(4, 9)]
    assert rung_correlation([*some, *others], "layer_error", "kl").count == 9


@pytest.mark.parametrize("compare", ["row", "model"])
def test_evolution_keeps_its_contract_with_own_formulas(compare: str) -> None:
    task = task_of(compare=compare, choices={}, chosen=0.8, max_complexity=4)
    assert broken_promises(STRATEGIES["evolution"], task) == []


def test_formulas_of_some_layers_are_dropped_where_other_weights_now_compete() -> None:
    task = task_of(criteria=["q_proj"])
    parent = candidate("abs(W)*X", 0, compare="row", criteria={"q_proj": "abs(W)*G"})
    assert _with_choices(task, parent, {**parent.choices, "compare": "model"}).choices == {
        "compare": "model"
    }
    other = _with_choices(task, parent, {**parent.choices, "update": "admm"})
    assert other.choices["criteria"] == {"q_proj": "abs(W)*G"}


def stacks_of(evaluator: Evaluator) -> Sequence[Stack]:
    samples = evaluator._sampled[0].samples
    assert isinstance(samples, WeightSamples)
    return samples.stacks


def test_the_layer_error_is_that_of_each_layers_own_formula() -> None:
    testbed, task = tiny_testbed(), task_of()
    evaluator = Evaluator(task, [testbed])
    stacks = stacks_of(evaluator)
    formulas = {kind: Criterion.parse(text) for kind, text in OWN.items()}
    mixed = masks_on(stacks, Recipe(name="it", criterion=WANDA, criteria=formulas), 0.5, "free")
    names = [name for stack in stacks for name in stack.names]
    masks = dict(zip(names, (mask for of_stack in mixed for mask in of_stack), strict=True))
    for text in ("abs(W)*X", *OWN.values()):
        one = Recipe(name="it", criterion=Criterion.parse(text))
        alone = masks_on(stacks, one, 0.5, "free")
        flat = (mask for of_stack in alone for mask in of_stack)
        for name, mask in zip(names, flat, strict=True):
            if OWN.get(name.rsplit(".", 1)[-1], "abs(W)*X") == text:
                assert torch.equal(masks[name], mask)


def test_a_formula_that_ranks_nothing_where_it_counts_is_told_by_layer_and_formula() -> None:
    stacks = stacks_of(Evaluator(task_of(), [tiny_testbed()]))
    # Beyond what exp can tell apart.
    own = {"down_proj": Criterion.parse("exp(abs(W) + 100)")}
    with pytest.raises(ScoreError, match=r"exp\(.*\) gives every weight of .*down_proj the same"):
        masks_on(stacks, Recipe(name="it", criterion=WANDA, criteria=own), 0.5, "free")


def test_its_size_and_signal_are_those_of_all_formulas() -> None:
    one = candidate("abs(W)*X", 0, criteria=OWN)
    words = [Criterion.parse(text).complexity for text in ("abs(W)*X", *OWN.values())]
    assert one.complexity == sum(words) == one.row()["complexity"]
    assert one.signal == "gradients" == one.row()["signal"]
    assert candidate("abs(W)*X", 0).complexity == words[0]


def test_it_is_no_equivalent_of_a_published_recipe() -> None:
    task = task_of()
    assert published_equivalent(task, Rule(WANDA)) == "wanda"
    assert published_equivalent(task, Rule(WANDA, {"criteria": OWN})) is None


def test_the_front_in_latex_names_the_layers_of_each_formula() -> None:
    row = candidate("abs(W)*X", 0, criteria={"down_proj": "abs(W)"}).row()
    table = latex_of_front([{**row, "search_perplexity": 12.0}])
    assert r"; \texttt{down\_proj}: $" in table and "criteria" not in table


def test_a_search_finds_them_goes_on_and_hands_them_on(tmp_path: Path) -> None:
    space = tiny_space(criteria=["q_proj", "down_proj", "up_proj"], chosen=0.8, tuned=0)

    def searched(name: str, max_candidates: int, **options: Any) -> list[Candidate]:
        folder = tmp_path / name
        return list(
            find(tiny_testbed(), space, 0.5, folder=folder, budget=max_candidates, **options)
        )

    whole = searched("whole", 30)
    own = [one for one in whole if "criteria" in one.choices and one.kl is not None]
    assert len(own) > 3
    assert all(one.fault == "" for one in own)
    searched("parts", 14)
    again = searched("parts", 30, resume=True)
    assert [one.rule.text for one in again] == [one.rule.text for one in whole]
    assert [one.layer_error for one in again] == [one.layer_error for one in whole]

    task = make_task(space, 0.5).on(find_linears(tiny_model().model))
    recipe = task.recipe(own[0].rule, "mine")
    recipe.save(tmp_path / "mine.yaml")
    start = rules_of(str(tmp_path / "mine.yaml"), tmp_path)
    begun = make_task(space, 0.5, start=start).on(find_linears(tiny_model().model))
    assert begun.seeds[0] == own[0].rule
    # Another space, or a model without those layers, begins with its formula alone.
    bare = own[0].rule.with_per_layer({})
    assert make_task(tiny_space(), 0.5, start=start).seeds[0] == bare
    other = make_task(space, 0.5, start=start).on(find_linears(tiny_model("gpt2").model))
    assert other.seeds[0] == bare
