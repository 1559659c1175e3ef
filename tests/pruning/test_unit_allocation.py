"""How many units groups lose: shares add up to the budget, and measured ones beat equal ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import PruneZeroError, RecipeError, SelectionError
from prunezero.models.anatomy.groups import Group, linears_of
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.biases import open_biases
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning import unit_allocation
from prunezero.pruning.allocation import Evidence
from prunezero.pruning.budget import Budget
from prunezero.pruning.outcome import Outcome
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.word_options import Slopes
from prunezero.pruning.requirements import checked_groups, dense_sums
from prunezero.pruning.selecting import check_units, left_of, shares_of
from prunezero.pruning.trials import Trials
from prunezero.pruning.unit_allocation import Ladder, _Belief, _cheapest, _through, slopes
from tests.models.test_mlp import noisy
from tests.pruning.test_neurons import group_of
from tests.tiny_models import LAYOUTS, tiny_batches, tiny_model

BATCHES = tiny_batches(6, 16)


def recipe(**choices: object) -> Recipe:
    fields = {"name": "mine", "criterion": "M2", "unit": "width", "compare": "group"}
    return validated(Recipe, {**fields, **choices}, "mine.yaml")


def known_of(model: LanguageModel, chosen: Recipe) -> Any:
    return calibrate(model, BATCHES, find_linears(model.model), dense_sums([chosen]))


def pruned(model: LanguageModel, chosen: Recipe, share: float) -> Outcome:
    return prune(model, chosen, share, statistics=known_of(model, chosen), windows=BATCHES)


def gone(groups: Sequence[Group], shares: dict[str, float]) -> float:
    return sum(
        (group.units - left_of(group, shares[group.name])) * group.cost_of("parameters")
        for group in groups
    )


@pytest.mark.parametrize("amount", [0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("protected", [0, 1])
def test_groups_of_small_units_make_up_for_those_of_large_ones(
    amount: float, protected: int
) -> None:
    groups = [
        group_of("heads.0", 3, 100, is_protected=protected > 0, least=1),
        group_of("heads.1", 3, 100, least=1),
        group_of("mlp.0", 400, 1, is_protected=protected > 0, least=1),
        group_of("mlp.1", 400, 1, least=1),
    ]
    budget = Budget(amount, measure="parameters")
    if protected and amount == 0.5:
        with pytest.raises(SelectionError, match=r"at most 0\.4279 can"):
            check_units(groups, budget, compare="group")
        return
    shares = shares_of(groups, budget)
    # Each group rounds down, so less than one small unit each is left.
    assert amount * 1400 - 2 < gone(groups, shares) <= amount * 1400
    assert not protected or shares["mlp.0"] == shares["heads.0"] == 0.0


def test_groups_of_one_kind_lose_the_very_share_that_was_asked_for() -> None:
    groups = [group_of("a", 10, 3), group_of("b", 7, 3)]
    assert shares_of(groups, Budget(0.3, measure="parameters")) == {"a": 0.3, "b": 0.3}


@pytest.mark.parametrize("allocate", ["uniform", "slopes", "evolve"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_allocation_reaches_the_parameters_asked_for_within_one_unit(
    layout: str, allocate: str
) -> None:
    word: Any = {"evolve": {"evaluations": 6, "windows": 2}} if allocate == "evolve" else allocate
    model = noisy(tiny_model(layout))
    outcome = pruned(model, recipe(allocate=word), 0.3)
    groups = outcome.selection.groups
    largest = max(group.cost_of("parameters") for group in groups)
    wanted = 0.3 * outcome.selection.total("parameters")
    removed = outcome.selection.removed("parameters")
    # Uniform groups each round down.
    smallest = min(group.cost_of("parameters") for group in groups)
    slack = len(groups) * smallest if allocate == "uniform" else largest
    assert wanted - slack <= removed <= wanted


def test_steps_are_of_equal_cost_and_leave_what_has_to_stay() -> None:
    groups = [group_of("heads", 3, 100, least=1), group_of("mlp", 400, 1, least=50)]
    ladder = Ladder.of(groups, 0.3, "parameters", 16)
    # A head is the grain, and an MLP gives three and a half of it.
    assert ladder.grain == 100 and ladder.total == 2
    assert [list(one) for one in ladder.counts] == [[0, 1, 2], [0, 100, 200, 300]]
    with pytest.raises(SelectionError, match="cannot go in steps of 100"):
        Ladder.of(groups, 0.9, "parameters", 16)
    kept = Ladder.of([group_of("mlp", 96, 1, multiple_of=32, least=1)], 0.5, "parameters", 4)
    # A step of 24 would take none.
    assert kept.grain == 32 and [list(one) for one in kept.counts] == [[0, 32, 64]]
    odd = [group_of("mlp", 50, 1, multiple_of=32, least=1), group_of("heads", 2, 8, multiple_of=2)]
    kept = Ladder.of(odd, 0.2, "parameters", 16)
    assert kept.grain == 32 and [list(one) for one in kept.counts] == [[0, 18], [0]]


def test_the_cheapest_steps_are_those_that_a_search_of_all_finds() -> None:
    groups = [group_of(name, 5, 1, least=1) for name in "abc"]
    ladder = Ladder.of(groups, 0.4, "parameters", 5)
    curves = [np.array([0.0, 1, 4, 9, 16]), np.arange(5) * 1.5, np.arange(5) * 4.0]
    total = ladder.total

    def cost(taken: tuple[int, ...]) -> float:
        return float(sum(curve[steps] for curve, steps in zip(curves, taken, strict=True)))

    every = [(a, b, total - a - b) for a in range(5) for b in range(5) if 0 <= total - a - b < 5]
    assert cost(_cheapest(ladder, curves)) == min(map(cost, every))


def test_a_belief_is_drawn_to_what_was_measured() -> None:
    curves = [np.arange(5) * 1.0, np.arange(5) * 1.0]
    truth = np.array([1.0, 3.0])
    known: dict[tuple[int, ...], float] = {(a, 4 - a): float(truth @ [a, 4 - a]) for a in range(5)}
    belief = _Belief.of(curves, known)
    assert belief.mean[1] > 1.5 * belief.mean[0]


def test_trials_measure_what_pruning_measures_and_leave_no_trace() -> None:
    from prunezero.models.evaluation import dense_reference, evaluate

    chosen = recipe(update="refit")
    model = noisy(tiny_model("llama"))
    before = {linear.name: linear.weight.clone() for linear in find_linears(model.model)}
    groups = checked_groups(model, chosen, 0.3)
    reference = dense_reference(model, BATCHES)
    known = known_of(model, chosen)
    with Trials(model, chosen, groups, known, BATCHES) as trials:
        removed = {group.name: (group.units * 3) // 10 for group in groups}
        tried = trials.kl(removed, len(BATCHES))
        assert trials.kl({}, len(BATCHES)) == pytest.approx(0.0, abs=1e-9)
        assert trials.kl(removed, len(BATCHES)) == tried
    for linear in find_linears(model.model):
        assert torch.equal(linear.weight, before[linear.name])
    # What goes of neurons alone is a share that pruning takes by itself.
    neurons = recipe(unit="neuron", update="refit")
    prune(model, neurons, 0.3, statistics=known, windows=BATCHES)
    measured = evaluate(model, BATCHES, reference=reference).kl
    assert tried == pytest.approx(measured, rel=1e-5)


@pytest.mark.parametrize("word", ["slopes", {"evolve": {"evaluations": 2}}])
def test_trials_are_measured_on_text_that_statistics_have_not_seen(
    word: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    chosen, other = recipe(allocate=word, update="refit"), tiny_batches(6, 16, seed=11)
    looked_at: list[torch.Tensor] = []

    class Seen(Trials):
        def __init__(self, *things: Any) -> None:
            looked_at.append(things[-1])
            super().__init__(*things)

    monkeypatch.setattr(unit_allocation, "Trials", Seen)
    known = known_of(model, chosen)
    prune(model, chosen, 0.3, statistics=known, windows=BATCHES, held_out=other)
    prune(model, chosen, 0.3, statistics=known, windows=BATCHES)
    first, second = looked_at
    assert first.equal(other[: len(first)]) and second.equal(BATCHES[: len(second)])


def test_evolution_is_no_worse_than_its_beginning_on_the_text_that_it_saw() -> None:
    from prunezero.models.evaluation import dense_reference, evaluate

    reached = {}
    words: dict[str, Any] = {
        "slopes": {"slopes": {"windows": 6, "steps": 8}},
        "fitted": {"evolve": {"evaluations": 40, "windows": 6, "first_windows": 6, "steps": 8}},
    }
    for name, word in words.items():
        model = noisy(tiny_model("gpt2"))
        reference = dense_reference(model, BATCHES)
        pruned(model, recipe(unit="neuron", update="refit", allocate=word), 0.4)
        reached[name] = evaluate(model, BATCHES, reference=reference).kl
    assert reached["fitted"] is not None and reached["slopes"] is not None
    assert reached["fitted"] <= reached["slopes"] * (1 + 1e-6)


def test_the_same_seed_gives_the_same_units() -> None:
    word = {"evolve": {"evaluations": 10, "windows": 3}}
    kept = [
        pruned(noisy(tiny_model("llama")), recipe(allocate=word), 0.3).selection.kept
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))


def test_a_measured_allocation_needs_a_model_and_text_and_groups_that_do_not_compete() -> None:
    model = tiny_model("llama")
    layers = linears_of(checked_groups(model, recipe(), 0.3))
    with pytest.raises(RecipeError, match="needs the model and calibration text"):
        slopes(layers, 0.3, Slopes(), Evidence({}, None, None))
    with pytest.raises(RecipeError, match="compare: model lets all layers compete"):
        recipe(compare="model", allocate="slopes")
    with pytest.raises(RecipeError, match="allocate: evolve is for unit"):
        validated(Recipe, {"name": "it", "criterion": "abs(W)", "allocate": "evolve"}, "it.yaml")
    with pytest.raises(PruneZeroError, match="needs calibration text"):
        prune(model, recipe(allocate="slopes", criterion="row_norm(W)"), 0.3)


def test_steps_of_a_schedule_may_see_the_model_as_it_is_by_then() -> None:
    steps = {"iterative": {"steps": 3, "shape": "linear", "anew": True}}
    chosen = recipe(schedule=steps, compare="model", criterion="M2/PARAMS")
    once = pruned(noisy(tiny_model("llama")), recipe(compare="model", criterion="M2/PARAMS"), 0.3)
    model = noisy(tiny_model("llama"))
    outcome = pruned(model, chosen, 0.3)
    assert outcome.selection.removed("parameters") == pytest.approx(
        once.selection.removed("parameters"), abs=2000
    )
    # Nested: what a first step takes is gone in the end as well.
    first = pruned(noisy(tiny_model("llama")), recipe(compare="model", criterion="M2/PARAMS"), 0.1)
    for (_, early), (_, late) in zip(first.selection, outcome.selection, strict=True):
        assert not bool((~early & late).any())
    with pytest.raises(RecipeError, match="collected anew need calibration text"):
        prune(noisy(tiny_model("llama")), recipe(schedule=steps, criterion="row_norm(W)"), 0.3)


@pytest.mark.parametrize("measure", ["parameters", "flops", "kv bytes", "units"])
def test_a_share_may_be_of_whatever_units_cost(measure: str) -> None:
    chosen = recipe(unit={"kv_group": {"measure": measure}}, compare="model")
    outcome = pruned(noisy(tiny_model("gpt2")), chosen, 0.4)
    assert outcome.measure == measure
    assert outcome.selection.removed(measure) <= 0.4 * outcome.selection.total(measure)
    assert outcome.selection.removed() == 3
    with pytest.raises(SelectionError, match="saves no kv bytes"):
        pruned(tiny_model("llama"), recipe(unit={"width": {"measure": "kv bytes"}}), 0.2)


def test_steps_that_were_all_measured_stand_as_they_are_and_others_follow_the_loss() -> None:
    lost = np.array([0.0, 1.0, 3.0, 6.0, 10.0])
    assert _through({1: 0.2, 2: 0.5}, lost[:3]).tolist() == [0.0, 0.2, 0.5]
    curve = _through({1: 0.1, 3: 1.2}, lost)
    # The geometric mean of 0.1 and 0.2 for each unit of loss.
    assert curve == pytest.approx(lost * math.sqrt(0.1 * 0.2))
    # A second step that costs less than the first one waits for no other.
    assert _through({1: 0.4, 2: 0.5}, lost[:3]).tolist() == pytest.approx([0.0, 0.4, 0.8])
    assert _through({1: 0.3}, np.zeros(3)) == pytest.approx([0.0, 0.3, 0.6])


@pytest.mark.parametrize("update", ["none", "bias", "refit"])
def test_what_a_reader_loses_is_what_its_outputs_lack_after_the_update(update: str) -> None:
    chosen = recipe(update=update, allocate="slopes")
    model = noisy(tiny_model("llama"))
    groups = checked_groups(model, chosen, 0.3)
    if chosen.needs_biases:
        open_biases(model, linears_of(groups))
    with Trials(model, chosen, groups, known_of(model, chosen), BATCHES) as trials:
        for group in groups:
            seen: list[torch.Tensor] = []
            linear = group.reader.linear
            handle = linear.module.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0][0].double())
            )
            for ids in BATCHES:
                model.model(ids[None])
            handle.remove()
            inputs, dense = torch.cat(seen), linear.weight.detach().double()
            count = group.units // 2
            lost = trials.lost(group.name, count)
            trials.kl({group.name: count}, 1)
            lacking = inputs @ (dense - linear.weight.detach().double()).T
            if update == "bias":
                lacking = lacking - lacking.mean(0)
            assert lost == pytest.approx(float(lacking.square().sum()) / len(inputs), rel=1e-4)
            trials.kl({}, 1)
