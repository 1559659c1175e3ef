"""Channels of the residual stream are scored, chosen and counted as slow references say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError, RecipeError
from prunezero.models.anatomy.groups import Group, linears_of
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.slicing import sliced
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.costs import costs_without, model_costs
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.outcome import Outcome
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import checked_groups, dense_sums, refuse_unequal_widths
from tests.models.test_mlp import noisy
from tests.tiny_models import BLOCKS, HIDDEN, LAYOUTS, tiny_batches, tiny_model

CHANNEL = UNITS["channel"]
BATCHES = tiny_batches(4, 16)
SHARE = 0.2
# What hands the stream on to an attention or an MLP, by the ends of its names.
NORMS = {
    "gpt2": ("ln_1", "ln_2"),
    "opt": ("self_attn_layer_norm", "final_layer_norm"),
    "gemma3": ("input_layernorm", "pre_feedforward_layernorm"),
}
USUAL = ("input_layernorm", "post_attention_layernorm")


def recipe(**choices: object) -> Recipe:
    fields = {"name": "mine", "criterion": "A2", "unit": "channel", "compare": "group"}
    return validated(Recipe, {**fields, **choices}, "mine.yaml")


def pruned(model: LanguageModel, chosen: Recipe, share: float = SHARE) -> Outcome:
    layers = linears_of(checked_groups(model, chosen, share))
    known = calibrate(model, BATCHES, layers, dense_sums([chosen]))
    return prune(model, chosen, share, statistics=known, windows=BATCHES)


def scores_of(model: LanguageModel, chosen: Recipe) -> Tensor:
    (group,) = checked_groups(model, chosen, SHARE)
    known = calibrate(model, BATCHES, linears_of([group]), dense_sums([chosen]))
    return CHANNEL.scores(group, chosen.criterion, known, damping=0.01, options=chosen.unit.options)


def handed_on(model: LanguageModel, layout: str) -> list[np.ndarray[Any, Any]]:
    """What norms in front of attentions and MLPs give, float64 [sequences, tokens, channels]."""
    ends = NORMS.get(layout, USUAL)
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.setdefault(name, []).append(output)
        )
        for name, module in model.model.named_modules()
        if name.endswith(ends) and any(part.isdigit() for part in name.split("."))
    ]
    with torch.no_grad():
        for window in BATCHES:
            model.model(window[None])
    for handle in handles:
        handle.remove()
    assert len(seen) == 2 * BLOCKS
    return [torch.stack(one).reshape(4, 16, HIDDEN).double().numpy() for one in seen.values()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_minitron_removes_what_a_sum_over_norm_outputs_says(layout: str) -> None:
    model = noisy(tiny_model(layout))
    expected = sum(np.sqrt((np.abs(x).mean(1) ** 2).sum(0)) for x in handed_on(model, layout))
    found = scores_of(model, Recipe.load("minitron_channels"))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    dense = model_costs(model, BATCHES[:1])
    outcome = pruned(model, Recipe.load("minitron_channels"))
    (kept,) = outcome.selection.kept
    count = int(SHARE * HIDDEN)
    gone = np.argsort(expected, kind="stable")[:count]
    assert set((~kept).nonzero().flatten().tolist()) == set(gone.tolist())
    assert outcome.sparsity_reached == count / HIDDEN
    costs = costs_without(model, outcome.selection, BATCHES[:1])
    (group,) = outcome.selection.groups
    assert dense.parameters - costs.parameters == count * group.cost["parameters"]
    assert dense.flops - costs.flops == count * group.cost["flops"]
    assert dense.kv_bytes == costs.kv_bytes


def test_readers_and_writers_are_scored_by_their_parts() -> None:
    model = noisy(tiny_model("gpt2"))
    parts: dict[str, list[np.ndarray[Any, Any]]] = {"readers": [], "writers": []}
    for one in find_linears(model.model):
        is_reader = one.name.endswith(("c_attn", "c_fc"))
        weight = one.weight.double().numpy()
        norms = np.linalg.norm(weight, axis=0 if is_reader else 1)
        parts["readers" if is_reader else "writers"].append(norms)
    parts["all"] = [*parts["readers"], *parts["writers"]]
    how: dict[str, Any] = {"sum": np.sum, "mean": np.mean, "max": np.max, "product": np.prod}
    for members, values in parts.items():
        for combine, function in how.items():
            numbers = {"members": members, "combine": combine}
            chosen = recipe(criterion="row_norm(W)", unit={"channel": numbers})
            np.testing.assert_allclose(
                scores_of(model, chosen).numpy(), function(values, axis=0), rtol=1e-5
            )


def test_gradients_of_weights_are_those_of_all_matrices_on_the_stream() -> None:
    model = noisy(tiny_model("llama"))
    total = np.zeros(HIDDEN)
    linears = find_linears(model.model)
    for one in linears:
        one.module.weight.requires_grad_(True)
    for ids in BATCHES:
        logits = model.model(ids[None]).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, ids[1:]).backward()  # type: ignore[no-untyped-call]
    for one in linears:
        gradient = one.module.weight.grad
        assert isinstance(gradient, Tensor)
        products = np.abs((one.weight * gradient).double().numpy())
        total += products.sum(1 if one.name.endswith(("o_proj", "down_proj")) else 0)
        one.module.weight.grad = None
        one.module.weight.requires_grad_(False)
    chosen = recipe(criterion="row_sum(abs(W*S))", unit={"channel": {"members": "all"}})
    np.testing.assert_allclose(scores_of(model, chosen).numpy(), total, rtol=1e-3)


def test_formulas_may_hold_activations_and_weights_of_what_reads_the_stream() -> None:
    model = noisy(tiny_model("llama"))
    expected = np.zeros(HIDDEN)
    attention, mlp = (handed_on(model, "llama")[place::2] for place in (0, 1))
    for one in find_linears(model.model):
        if one.name.endswith(("o_proj", "down_proj")):
            continue
        x = (mlp if ".mlp." in one.name else attention)[one.block]
        scale = np.sqrt((x**2).sum((0, 1)) / len(BATCHES))
        expected += scale * np.abs(one.weight.double().numpy()).mean(0)
    readers = {"channel": {"members": "readers"}}
    found = scores_of(model, recipe(criterion="A*row_mean(abs(W))", unit=readers))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (
            {"criterion": "M2"},
            "feature M2 is for unit neuron, head, kv_group, width, expert, not for channel",
        ),
        ({"criterion": "row_norm(W)"}, "W has a value for each weight, but members: inputs"),
        (
            {"criterion": "A2*row_norm(W)", "unit": {"channel": {"members": "all"}}},
            "A2 is of what norms hand on, which matrices that write",
        ),
        ({"criterion": "Lr0"}, "feature Lr0 is for unit neuron, head, kv_group, width"),
        ({"compare": "model"}, "compare: model says nothing of unit: channel; known: group"),
        ({"update": "bias"}, "update: bias is for unit"),
        ({"update": "refit"}, "update: refit is for unit"),
        ({"schedule": "iterative"}, "schedule: iterative is for unit"),
        ({"unit": {"channel": {"protect_first": 1}}}, "'channel.protect_first' is not a known"),
    ],
)
def test_what_says_nothing_of_channels_is_refused_by_name(
    choices: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(**choices)


def test_channels_that_stay_are_a_multiple_and_at_least_as_many_as_asked_for() -> None:
    chosen = recipe(unit={"channel": {"multiple_of": 8}})
    outcome = pruned(noisy(tiny_model("llama")), chosen, 0.4)
    (kept,) = outcome.selection.kept
    assert int(kept.sum()) == 24
    assert math.isclose(outcome.sparsity_reached, 0.25)


def test_a_width_that_cannot_be_saved_is_refused_before_the_work() -> None:
    with pytest.raises(ModelError, match="no configuration of gpt2 has 26 channels"):
        refuse_unequal_widths(tiny_model("gpt2"), recipe(), SHARE)
    refuse_unequal_widths(tiny_model("llama"), recipe(), SHARE)


def test_what_is_measured_is_the_smaller_model() -> None:
    model = noisy(tiny_model("opt"))
    outcome = pruned(model, recipe())
    (group,) = outcome.selection.groups
    assert isinstance(group, Group)
    with sliced(model, outcome.selection), torch.no_grad():
        expected = model.model(BATCHES).logits
    with CHANNEL.edit.simulated(model, outcome.selection), torch.no_grad():
        assert torch.equal(model.model(BATCHES).logits, expected)
    assert not CHANNEL.edit.zeros_suffice and UNITS["neuron"].edit.zeros_suffice
