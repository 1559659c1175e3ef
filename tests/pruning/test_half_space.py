"""Units that are pulled to zero while weights take up the change of factors, against LoRAShear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import RecipeError, SelectionError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.slicing import sliced
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.pruning.knowledge import with_protected
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.word_options import Periods
from prunezero.pruning.recovery import training
from prunezero.pruning.recovery.periods import PeriodicRemoval
from prunezero.pruning.testbed import with_choices
from tests.models.test_depth import deep_model
from tests.pruning.test_periods import (
    LORA,
    PERIODS,
    STEPS,
    TUNE,
    chosen,
    same_again,
    slow_scores,
    unit_rows,
)
from tests.pruning.trained import TEXT, digest, knowing_model, logits_of
from tests.tiny_models import tiny_network, tiny_tokenizer

SHEAR = Recipe.load("lora_shear")
CHANGE: dict[str, Any] = {**PERIODS["periods"], "direction": "change"}
HALF = {"periods": {**CHANGE, "shrink": "half_space", "transfer": True}}


def parts_of(trained: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weight and change of every layer, by name."""
    return {
        name: tuple(one.double().numpy().copy() for one in trained.changing(name))
        for name in trained.modules
    }


@pytest.mark.parametrize("epsilon", [0.0, 0.6])
def test_units_leave_their_half_space_and_weights_take_up_the_change(
    epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, going, scores = [], [], [], []
    act, choose = PeriodicRemoval.act, PeriodicRemoval._choose

    def watched(self: PeriodicRemoval, trained: Any, done: int, total: int) -> None:
        before.append(parts_of(trained))
        going.append([one.numpy().copy() for one in self.going])
        act(self, trained, done, total)
        after.append(parts_of(trained))

    def watched_choose(self: PeriodicRemoval, moving: Any) -> None:
        found = self._scores(moving)
        scores.append({key: one.double().numpy().copy() for key, one in found.items()})
        choose(self, moving)

    monkeypatch.setattr(PeriodicRemoval, "act", watched)
    monkeypatch.setattr(PeriodicRemoval, "_choose", watched_choose)
    rules = chosen(
        recover={"lora": {**LORA["lora"], "learning_rate": 0.05}},
        schedule={"periods": {**HALF["periods"], "epsilon": epsilon}},
    )
    outcome = prune(knowing_model(), rules, 0.5, windows=TEXT)
    assert 0.5 - 3 * 32 / outcome.total < outcome.sparsity_reached <= 0.5
    early = 0
    for group, kept in outcome.selection:
        place = outcome.selection.groups.index(group)
        key = group.kind, group.block

        def rows(parts: Any, which: int, key: tuple[str, int] = key) -> np.ndarray:
            return unit_rows({name: pair[which] for name, pair in parts.items()}, *key)

        for done in range(1, STEPS + 1):
            x, change = rows(before[done - 1], 0), rows(before[done - 1], 1)
            now, left_change = rows(after[done - 1], 0), rows(after[done - 1], 1)
            end = next((stop for stop in (5, 8, 11) if done <= stop), STEPS)
            on_the_way = going[done - 1][place] if going[done - 1] else np.zeros(len(x), dtype=bool)
            for unit in range(len(x)):
                if not on_the_way[unit]:
                    # It takes the change up when a period ends, and is otherwise left alone.
                    taken = change[unit] * (done in (5, 8, 11))
                    np.testing.assert_allclose(now[unit], x[unit] + taken, atol=1e-6)
                    assert not left_change[unit].any() or done not in (5, 8, 11)
                    continue
                left = end - done + 1
                size = np.sqrt((x[unit] ** 2).sum())
                moved = x[unit] + change[unit] - size / left * x[unit] / size
                assert not left_change[unit].any()
                if done == end or moved @ x[unit] < epsilon * size**2:
                    assert not now[unit].any()
                    early += done < end
                else:
                    np.testing.assert_allclose(now[unit], moved, rtol=1e-4, atol=1e-6)
        assert np.array_equal(rows(after[-1], 0).any(1), kept.numpy())
    assert (early > 0) == (epsilon > 0)
    # When the first period begins, no unit has gone, and weights are compared with their change.
    groups = outcome.selection.groups
    free = {(one.kind, one.block): np.ones(one.units, dtype=bool) for one in groups}
    weights, changes = ({name: pair[at] for name, pair in before[1].items()} for at in (0, 1))
    expected = slow_scores(weights, changes, free)
    for group in groups:
        found = scores[0][group.key]
        np.testing.assert_allclose(found, expected[group.kind, group.block], rtol=1e-4)


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 9])
def test_a_killed_training_that_transfers_goes_on_to_the_same_bits(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 1)
    half = {"periods": {**HALF["periods"], "epsilon": 0.6, "protect": 0.25}}
    whole, model = same_again(chosen(recover=LORA, schedule=half), stop, tmp_path)
    assert digest(model) == digest(whole)


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_fused_and_turned_matrices_are_sheared_too(family: str) -> None:
    model = wrap_model(tiny_network(family), tiny_tokenizer(), name=family)
    outcome = prune(model, chosen(recover=LORA, schedule=HALF), 0.5, windows=TEXT)
    masks = outcome.selection.matrix_masks()
    for layer in find_linears(model.model):
        assert bool((layer.weight[~masks[layer.name]] == 0).all())
    zeroed = logits_of(model, TEXT)
    with sliced(model, outcome.selection):
        torch.testing.assert_close(logits_of(model, TEXT), zeroed, rtol=0, atol=1e-5)


def slow_growths(model: LanguageModel, shares: tuple[float, ...]) -> dict[tuple[str, int], float]:
    """How much the loss of the tiny Llama grows without the smallest units of each place."""
    layers = {layer.name: layer for layer in find_linears(model.model)}
    dense = {name: layer.weight.clone() for name, layer in layers.items()}
    values = {name: weight.double().numpy() for name, weight in dense.items()}

    def loss() -> float:
        found = [
            torch.nn.functional.cross_entropy(logits_of(model, ids[None])[0, :-1], ids[1:])
            for ids in TEXT[:3]
        ]
        return float(np.mean([float(one) for one in found]))

    whole, growths = loss(), {}
    for kind, units in (("neuron", 64), ("kv_group", 2)):
        for block in (0, 1):
            norms = (unit_rows(values, kind, block) ** 2).sum(1)
            grown = []
            for share in shares:
                for unit in np.argsort(norms, kind="stable")[: max(1, int(share * units))]:
                    for name, layer in layers.items():
                        if f"layers.{block}." not in name or ("mlp" in name) != (kind == "neuron"):
                            continue
                        turned = name.endswith(("down_proj", "o_proj"))
                        weight = layer.weight.T if turned else layer.weight
                        size = len(weight) // units
                        weight[unit * size : (unit + 1) * size] = 0.0
                grown.append(loss() - whole)
                for name, layer in layers.items():
                    layer.weight.copy_(dense[name])
            growths[kind, block] = float(np.mean(grown))
    return growths


def test_places_without_which_the_loss_grows_most_lose_nothing() -> None:
    numbers = {**CHANGE, "protect": 0.5, "probe": [0.25, 0.5], "probe_windows": 3}
    model = knowing_model()
    growths = slow_growths(model, (0.25, 0.5))
    rules = chosen(recover=LORA, schedule={"periods": numbers})
    outcome = prune(model, rules, 0.3, windows=TEXT)
    protected = {(one.kind, one.block) for one in outcome.selection.groups if one.is_protected}
    assert protected == set(sorted(growths, key=lambda key: growths[key])[2:])
    assert all(bool(kept.all()) for group, kept in outcome.selection if group.is_protected)


def test_probing_leaves_the_model_as_it_was_and_a_share_of_nothing_probes_nothing() -> None:
    model = knowing_model()
    before = digest(model)
    row = SHEAR.unit.row
    groups = row.groups(find_linears(model.model), model, SHEAR.unit.options)
    told: list[tuple[int, int]] = []
    found = with_protected(
        groups, model, TEXT, Periods(protect=0.25), lambda what, *place: told.append(place)
    )
    assert digest(model) == before
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sum(group.is_protected for group in found) == 1
    told.clear()
    assert with_protected(groups, model, TEXT, Periods(protect=0.2)) == groups and not told


def test_what_cannot_go_beside_protected_places_is_refused_before_the_training() -> None:
    model, what = knowing_model(), []
    before = digest(model)
    rules = chosen(recover=LORA, schedule={"periods": {**CHANGE, "protect": 0.75}})
    with pytest.raises(SelectionError, match=r"0\.8 of the parameters of all units cannot go"):
        prune(model, rules, 0.8, windows=TEXT, progress=lambda name, *place: what.append(name))
    assert digest(model) == before and not any("tuning" in name for name in what)


def test_lora_shear_takes_out_what_is_asked_for() -> None:
    numbers = {**SHEAR.recover.options.model_dump(), "steps": 20, "batch": 1}
    model = deep_model("llama", num_hidden_layers=6)
    outcome = prune(model, with_choices(SHEAR, recover={"lora": numbers}), 0.2, windows=TEXT)
    assert sum(group.is_protected for group in outcome.selection.groups) == 1
    assert 0.2 - 3 * 32 / outcome.total < outcome.sparsity_reached <= 0.2


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"direction": "change"}, "direction: change looks at the change that low-rank factors"),
        ({"shrink": "half_space"}, "shrink: half_space hands the change of low-rank factors to"),
        ({"transfer": True}, "with transfer hands the change .* so it needs recover: lora, or dis"),
    ],
)
def test_what_needs_factors_is_refused_where_weights_train(
    numbers: dict[str, Any], told: str
) -> None:
    for recover in (TUNE, {"distil": {"steps": 5}}):
        with pytest.raises(RecipeError, match=told):
            chosen(schedule={"periods": numbers}, recover=recover)
    assert chosen(schedule={"periods": numbers}, recover=LORA)
