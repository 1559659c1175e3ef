"""Directions of the residual stream are scored, chosen and counted as slow references say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError, PruneZeroError, RecipeError
from prunezero.models.anatomy.groups import Group, linears_of
from prunezero.models.editing.slicing import sliced
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.costs import costs_without, model_costs
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.staged import StagedRecipe
from prunezero.pruning.requirements import checked_groups, dense_sums, refuse_unequal_widths
from prunezero.scoring.unit_features import noise
from prunezero.searching.spaces.space import SearchSpace
from tests.models.test_stream import shaken
from tests.tiny_models import BLOCKS, HIDDEN, VOCABULARY, tiny_batches, tiny_model

BATCHES = tiny_batches(4, 16)
SHARE = 0.25
LEFT = 24
SLICE_GPT = Recipe.load("slice_gpt")


def recipe(**choices: object) -> Recipe:
    fields = {"name": "mine", "criterion": "A", "unit": "direction", "compare": "group"}
    return validated(Recipe, {**fields, **choices}, "mine.yaml")


def llama() -> LanguageModel:
    return shaken(tiny_model("llama"))


def behind_norms(model: LanguageModel) -> list[np.ndarray[Any, Any]]:
    """What norms of the dense model make of the stream without factors, [sequences, tokens, D]."""
    network: Any = model.model
    norms = [
        norm
        for layer in network.model.layers
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    seen: dict[int, list[Tensor]] = {id(norm): [] for norm in norms}
    handles = [
        norm.register_forward_pre_hook(lambda module, args: seen[id(module)].append(args[0]))
        for norm in norms
    ]
    with torch.no_grad():
        network(BATCHES)
    for handle in handles:
        handle.remove()
    found = [seen[id(norm)][0].double().numpy() for norm in norms]
    return [x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) for x in found]


def scores_of(chosen: Recipe, model: LanguageModel) -> tuple[list[Tensor], list[Group]]:
    """The scores of each place, and its group with its basis."""
    seen: list[Tensor] = []
    kind = chosen.unit.row
    groups = checked_groups(model, chosen, SHARE)

    def choose(group: Group, statistics: Any) -> Tensor:
        seen.append(
            kind.scores(
                group,
                chosen.criterion,
                {group.name: statistics},
                damping=0.01,
                options=chosen.unit.options,
            )
        )
        return torch.ones(group.units, dtype=torch.bool)

    sums = {"input_square_sum", "input_sum", "input_magnitudes"}
    selection = kind.walk(model, groups, BATCHES, sums, choose, damping=0.01, is_sequential=False)
    return seen, list(selection.groups)


def test_the_square_of_a_is_the_eigenvalue_of_a_sequence() -> None:
    model = llama()
    found, groups = scores_of(SLICE_GPT, model)
    assert [group.name for group in groups] == [
        f"model.layers.{index}.{norm}"
        for index in range(BLOCKS)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    for scores, x in zip(found, behind_norms(model), strict=True):
        rows = x.reshape(-1, HIDDEN)
        values = np.linalg.eigvalsh(rows.T @ rows)[::-1] / len(BATCHES)
        np.testing.assert_allclose(scores.numpy(), values, rtol=1e-4, atol=1e-4)
        assert bool((scores.diff() <= 1e-4).all())


@pytest.mark.parametrize(
    ("criterion", "of"),
    [
        ("A1", lambda x: np.abs(x).mean((0, 1))),
        ("A2", lambda x: np.sqrt((np.abs(x).mean(1) ** 2).sum(0))),
        ("A_var", lambda x: x.reshape(-1, HIDDEN).var(0)),
        ("abs(A_mean)", lambda x: np.abs(x.mean((0, 1)))),
    ],
)
def test_formulas_see_what_norms_hand_on_along_each_direction(criterion: str, of: Any) -> None:
    model = llama()
    found, groups = scores_of(recipe(criterion=criterion), model)
    for scores, group, x in zip(found, groups, behind_norms(model), strict=True):
        assert group.basis is not None
        expected = of(x @ group.basis.numpy())
        ratio = scores.double().numpy() / expected
        # Of sums over sequences or means over them: the same order.
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)


def test_slice_gpt_takes_the_smallest_eigenvalues_and_leaves_the_weights() -> None:
    model = llama()
    before = {name: one.clone() for name, one in model.model.state_dict().items()}
    outcome = prune(model, SLICE_GPT, SHARE, windows=BATCHES)
    assert all(torch.equal(one, before[name]) for name, one in model.model.state_dict().items())
    assert outcome.sparsity_reached == 1 - LEFT / HIDDEN and outcome.measure == "units"
    for group, kept in outcome.selection:
        assert kept.tolist() == [place < LEFT for place in range(HIDDEN)]
        assert group.basis is not None
    again = prune(model, SLICE_GPT, SHARE, windows=BATCHES)
    pairs = zip(outcome.selection.groups, again.selection.groups, strict=True)
    for one, other in pairs:
        assert one.basis is not None and other.basis is not None
        assert torch.equal(one.basis, other.basis)


def test_directions_may_go_by_lot() -> None:
    outcome = prune(llama(), recipe(criterion="RND"), SHARE, windows=BATCHES)
    for group, kept in outcome.selection:
        lowest = noise(group.name, HIDDEN, 0).argsort()[: HIDDEN - LEFT]
        assert sorted((~kept).nonzero().flatten().tolist()) == sorted(lowest.tolist())


def test_what_it_takes_is_counted_with_the_matrices_between_bases() -> None:
    model = llama()
    outcome = prune(model, SLICE_GPT, SHARE, windows=BATCHES)
    dense = model_costs(model, BATCHES[:1])
    costs = costs_without(model, outcome.selection, BATCHES[:1])
    d, gone = LEFT, HIDDEN - LEFT
    # Queries, keys, values, outputs, gate, up and down; the last down writes as before.
    matrices = BLOCKS * gone * (2 * 32 + 2 * 16 + 3 * 64) - gone * 64
    between = (2 * BLOCKS - 1) * d * d + d * HIDDEN
    norms = 2 * BLOCKS * gone
    # The table of embeddings was the head's too, which keeps it.
    assert dense.parameters - costs.parameters == matrices + norms - between - VOCABULARY * d
    assert dense.flops - costs.flops == 2 * (matrices - between)
    assert dense.kv_bytes == costs.kv_bytes


def test_directions_that_stay_are_a_multiple_and_at_least_as_many_as_asked_for() -> None:
    chosen = recipe(unit={"direction": {"multiple_of": 8}}, statistics="sequential")
    outcome = prune(llama(), chosen, 0.4, windows=BATCHES)
    assert {int(kept.sum()) for kept in outcome.selection.kept} == {24}


def test_no_sums_of_matrices_are_collected_and_text_is_asked_for() -> None:
    for statistics in ("dense", "sequential"):
        assert not dense_sums([recipe(statistics=statistics)])
        with pytest.raises(RecipeError, match="unit direction needs calibration text"):
            prune(llama(), recipe(statistics=statistics), SHARE)


def test_what_cannot_be_saved_is_refused_before_the_work() -> None:
    model = llama()
    refuse_unequal_widths(model, SLICE_GPT, SHARE)
    layers = linears_of(checked_groups(model, SLICE_GPT, SHARE))
    assert {one.name.rpartition(".")[2] for one in layers} == {
        *("q_proj", "k_proj", "v_proj"),
        *("gate_proj", "up_proj"),
    }
    with pytest.raises(ModelError, match="is a LayerNorm and no RMSNorm"):
        refuse_unequal_widths(tiny_model("opt"), SLICE_GPT, SHARE)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (
            {"criterion": "M2"},
            "feature M2 is for unit neuron, .*expert, not for direction",
        ),
        ({"criterion": "row_norm(W)"}, "of a direction is known what norms hand on along it"),
        ({"compare": "model"}, "compare: model says nothing of unit: direction; known: group"),
        ({"update": "bias"}, "update: bias is for unit"),
        ({"schedule": "iterative"}, "schedule: iterative is for unit"),
        ({"allocate": "slopes"}, "allocate: slopes is for unit"),
        ({"recover": "tune"}, "recover: tune is for unit"),
    ],
)
def test_what_says_nothing_of_directions_is_refused_by_name(
    choices: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(**choices)


def test_directions_are_no_stage_and_no_space_of_a_search() -> None:
    for word in ("neuron", "head", "channel", "attention", "mlp"):
        compare = "model" if word in ("attention", "mlp") else "group"
        other = {"unit": word, "criterion": "RND", "compare": compare}
        stages = [other, {"unit": "direction", "criterion": "A", "compare": "group"}]
        with pytest.raises(RecipeError, match="and unit: direction cannot be stages of one"):
            validated(StagedRecipe, {"name": "both", "stages": stages}, "both.yaml")
    with pytest.raises(PruneZeroError, match="known only on a walk through the model"):
        validated(SearchSpace, {"name": "mine", "unit": "direction"}, "mine.yaml")


def test_the_model_in_memory_is_measured_without_its_directions() -> None:
    model = llama()
    outcome = prune(model, SLICE_GPT, SHARE, windows=BATCHES)
    edit = SLICE_GPT.unit.row.edit
    with sliced(model, outcome.selection), torch.no_grad():
        expected = model.model(BATCHES).logits
    with edit.simulated(model, outcome.selection), torch.no_grad():
        assert torch.equal(model.model(BATCHES).logits, expected)
    with torch.no_grad():
        assert not torch.allclose(model.model(BATCHES).logits, expected, atol=1e-2)
    assert not edit.zeros_suffice
