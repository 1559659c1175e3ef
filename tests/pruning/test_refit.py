"""Columns are refitted as a least-squares solver does it, and losses tell what is lost then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import FactorizationError, ScoreError, StatisticsError
from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.groups import Group, linears_of
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import checked_groups, dense_sums
from prunezero.pruning.rescoring import rescored
from prunezero.pruning.updates.refit import refit_columns
from prunezero.scoring.statistics import SUMS, Statistics
from tests.models.test_mlp import noisy
from tests.pruning.test_neurons import activations, group_of
from tests.tiny_models import tiny_batches, tiny_model

BATCHES = tiny_batches(4, 16)
OUT, IN, TOKENS = 7, 12, 60
DAMPING = 0.01

Array = np.ndarray[Any, Any]


def recipe(**choices: object) -> Recipe:
    fields = {"name": "mine", "criterion": "L00", "unit": "width", "compare": "group"}
    return validated(Recipe, {**fields, **choices}, "mine.yaml")


def correlated(seed: int = 0) -> tuple[Array, Array]:
    """A weight [out, in], and inputs [tokens, in] that lean on each other."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(4, IN)) + 0.3 * generator.normal(size=(4, IN))
    inputs = generator.normal(size=(TOKENS, 4)) @ mixing + 0.3 * generator.normal(size=(TOKENS, IN))
    return generator.normal(size=(OUT, IN)), inputs


def solved(weight: Array, inputs: Array, kept: Array) -> Array:
    """Least squares with the damping as further inputs, which asks all columns to stay."""
    damping = DAMPING * (inputs**2).sum(0).mean()
    rows = np.concatenate([inputs, np.sqrt(damping) * np.eye(IN)])
    found = np.zeros_like(weight)
    found[:, kept] = np.linalg.lstsq(rows[:, kept], rows @ weight.T, rcond=None)[0].T
    return found


def test_what_stays_is_what_a_least_squares_solver_finds() -> None:
    weight, inputs = correlated()
    kept = np.arange(IN) % 3 > 0
    gram = torch.from_numpy(inputs.T @ inputs)
    found = refit_columns(torch.from_numpy(weight), torch.from_numpy(kept), gram, damping=DAMPING)
    np.testing.assert_allclose(found.numpy(), solved(weight, inputs, kept), rtol=1e-9, atol=1e-12)
    everything = torch.ones(IN, dtype=torch.bool)
    assert torch.equal(
        refit_columns(torch.from_numpy(weight), everything, gram, damping=DAMPING),
        torch.from_numpy(weight),
    )


def test_a_gram_matrix_that_is_none_is_refused() -> None:
    with pytest.raises(FactorizationError, match="use more damping"):
        refit_columns(
            torch.ones(2, 3), torch.tensor([True, True, False]), -torch.eye(3), damping=0.01
        )


def statistics_of(inputs: Array) -> Statistics:
    statistics = Statistics.empty(SUMS, OUT, IN)
    statistics.add_inputs(torch.from_numpy(inputs))
    statistics.sums["gram"] = torch.from_numpy(inputs.T @ inputs)
    return statistics


def units_of(weight: Array, width: int) -> Group:
    group = group_of("mlp", IN, OUT)
    (member,) = group.members
    member.linear.module.weight.data = torch.from_numpy(weight.copy())
    from dataclasses import replace

    member = replace(member, units=IN // width, width=width)
    return replace(group, members=(member,), shape=(IN // width,))


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_units_that_go_one_by_one_go_in_the_order_of_a_brute_force_search(
    width: int, bias: bool
) -> None:
    weight, inputs = correlated(1)
    group, units = units_of(weight, width), IN // width
    seen = inputs - inputs.mean(0) if bias else inputs
    added = np.sqrt(DAMPING * (seen**2).sum(0).mean()) * np.eye(IN)

    def loss(gone: list[int]) -> float:
        """What is lost of all outputs when only the others are left, refitted."""
        kept = np.ones(IN, dtype=bool)
        for unit in gone:
            kept[unit * width : (unit + 1) * width] = False
        rows = np.concatenate([seen, added])
        target = rows @ weight.T
        fitted = np.linalg.lstsq(rows[:, kept], target, rcond=None)[0]
        return float(((target - rows[:, kept] @ fitted) ** 2).sum())

    order: list[int] = []
    costs: list[float] = []
    while len(order) < units - 1:
        left = [unit for unit in range(units) if unit not in order]
        before = loss(order) if order else 0.0
        best = min(left, key=lambda unit: loss([*order, unit]))
        costs.append(loss([*order, best]) - before)
        order.append(best)
    scores = rescored(
        group,
        Criterion.parse("Lrb" if bias else "Lr0"),
        {"mlp": statistics_of(inputs)},
        damping=DAMPING,
        at_once=1,
    )
    assert scores.argsort(stable=True).tolist()[: units - 1] == order
    np.testing.assert_allclose(scores.numpy()[order], np.maximum.accumulate(costs), rtol=1e-5)


def test_rescoring_loses_no_more_than_scores_of_the_beginning() -> None:
    """The order of single losses is wrong where channels lean on each other."""
    gains = []
    for seed in range(8):
        weight, inputs = correlated(seed)
        group = units_of(weight, 1)
        known = {"mlp": statistics_of(inputs)}
        criterion = Criterion.parse("Lr0")
        once = UNITS["neuron"].scores(
            group, criterion, known, damping=DAMPING, options=recipe(unit="neuron").unit.options
        )
        anew = rescored(group, criterion, known, damping=DAMPING, at_once=1)
        lost = []
        for scores in (once, anew):
            kept = np.ones(IN, dtype=bool)
            kept[scores.argsort(stable=True).numpy()[: IN // 2]] = False
            change = solved(weight, inputs, kept) - weight
            damping = DAMPING * (inputs**2).sum(0).mean()
            lost.append(float(((inputs @ change.T) ** 2).sum() + damping * (change**2).sum()))
        gains.append(lost[0] / lost[1])
    # A greedy choice may be beaten by a luckier one, but not by much.
    assert min(gains) > 0.97 and float(np.mean(gains)) > 1.2


def test_rescoring_speaks_of_refitted_columns_alone() -> None:
    weight, inputs = correlated()
    for text in ("L00", "Lr0 + Lrb"):
        with pytest.raises(ScoreError, match="has to hold one of Lr0 and Lrb"):
            rescored(
                units_of(weight, 1),
                Criterion.parse(text),
                {"mlp": statistics_of(inputs)},
                damping=DAMPING,
                at_once=1,
            )


def pruned(model: LanguageModel, chosen: Recipe, share: float) -> Any:
    layers = linears_of(checked_groups(model, chosen, share))
    known = calibrate(model, BATCHES, layers, dense_sums([chosen]))
    return prune(model, chosen, share, statistics=known, windows=BATCHES)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_a_pruned_model_holds_refitted_readers_and_no_other_change(layout: str) -> None:
    dense, model = noisy(tiny_model(layout)), noisy(tiny_model(layout))
    outcome = pruned(model, recipe(update="refit", criterion="L00"), 0.3)
    before = {linear.name: linear for linear in linears_of(outcome.selection.groups)}
    for group, kept in outcome.selection:
        reader = group.members[-1]
        old = next(
            one
            for one in linears_of(checked_groups(dense, recipe(), 0.0))
            if one.name == reader.linear.name
        )
        x, stays = activations(dense, old), reader.kept_rows(kept).numpy()
        weight = old.weight.double().numpy()
        damping = DAMPING * (x**2).sum(0).mean()
        rows = np.concatenate([x, np.sqrt(damping) * np.eye(x.shape[1])])
        fitted = np.linalg.lstsq(rows[:, stays], rows @ weight.T, rcond=None)[0].T
        new = before[reader.linear.name].weight
        assert not bool(new[:, ~torch.from_numpy(stays)].any())
        np.testing.assert_allclose(new[:, torch.from_numpy(stays)].numpy(), fitted, atol=2e-3)


def test_a_bias_takes_over_the_mean_of_what_refitted_columns_lose() -> None:
    dense, model = noisy(tiny_model("llama")), noisy(tiny_model("llama"))
    outcome = pruned(model, recipe(update=["refit", "bias"]), 0.3)
    for group, _ in outcome.selection:
        reader = group.members[-1].linear
        old = next(
            one
            for one in linears_of(checked_groups(dense, recipe(), 0.0))
            if one.name == reader.name
        )
        x = activations(dense, old)
        change = x @ (reader.weight.double().numpy() - old.weight.double().numpy()).T
        assert reader.bias is not None
        np.testing.assert_allclose(change.mean(0) + reader.bias.double().numpy(), 0.0, atol=1e-4)


def test_a_refit_without_its_sums_is_refused_by_name() -> None:
    model = noisy(tiny_model("llama"))
    with pytest.raises(StatisticsError, match="'gram' was not collected"):
        prune(model, recipe(update="refit", criterion="row_norm(W)"), 0.3, statistics={})


@pytest.mark.parametrize("word", ["zscore", "mean", "l2", "max"])
def test_scores_taken_anew_can_be_made_comparable(word: str) -> None:
    numbers = {"neuron": {"rescore": 4, "normalise": word}}
    chosen = recipe(unit=numbers, criterion="Lr0", update="refit", compare="model")
    kept = pruned(noisy(tiny_model("llama")), chosen, 0.5).selection.kept
    assert all(16 < int(one.sum()) < 48 for one in kept)


def test_steps_of_a_schedule_lose_no_more_than_was_asked_for() -> None:
    """Neurons that made up for a head in an early step would be missed once the head goes."""
    steps = {"iterative": {"steps": 4, "shape": "linear"}}
    for allocate in ("uniform", "slopes"):
        chosen = recipe(criterion="M2", schedule=steps, allocate=allocate)
        model = noisy(tiny_model("llama"))
        outcome = pruned(model, chosen, 0.5)
        for group, kept in outcome.selection:
            reader = group.members[-1]
            alive = reader.oriented(reader.linear.weight).any(1)
            assert torch.equal(alive, kept)
