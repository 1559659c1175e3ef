"""Weights inside the experts of a mixture are pruned as those of a twin with a module for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError
from prunezero.models.anatomy.expert_linears import DOWN, UP
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe, published_of
from prunezero.pruning.requirements import dense_sums
from tests.tiny_models import tiny_batches, tiny_tokenizer
from tests.tiny_moe import EXPERTS, MOE_FAMILIES, moe_model, moe_network, unfused_twin

# So many that no expert sees fewer tokens than its matrices have columns.
WINDOWS = tiny_batches(16, 32)


def pair() -> tuple[LanguageModel, LanguageModel]:
    network = moe_network("mixtral")
    twin = unfused_twin(network)
    return (
        wrap_model(network, tiny_tokenizer(), name="mixtral"),
        wrap_model(twin, tiny_tokenizer(), name="twin"),
    )


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {layer.name: layer.weight for layer in find_linears(model.model)}


def pruned(model: LanguageModel, recipe: Recipe, sparsity: float | None) -> dict[str, Tensor]:
    layers = find_linears(model.model, targets=recipe.targets, ignore=recipe.ignore)
    sums = dense_sums([recipe])
    statistics = calibrate(model, WINDOWS, layers, sums) if sums else None
    prune(model, recipe, sparsity, statistics=statistics, windows=WINDOWS)
    return weights(model)


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, weight in found.items():
        assert torch.equal(weight == 0, expected[key] == 0), key
        assert torch.allclose(weight, expected[key], atol=1e-5), key


@pytest.mark.parametrize("recipe", published_of("weight"), ids=lambda recipe: recipe.name)
def test_every_recipe_prunes_experts_as_those_of_a_twin_without_stacks(recipe: Recipe) -> None:
    stacked, twin = pair()
    found = pruned(stacked, recipe, 0.5)
    check_equal(found, pruned(twin, recipe, 0.5))
    inside = [weight for name, weight in found.items() if "experts" in name]
    assert len(inside) == 2 * 2 * EXPERTS
    for weight in inside:
        assert 0.25 < float((weight == 0).float().mean()) < 0.75


FOUND = "abs(W) * sqrt(X) + 0.1 * row_mean(abs(W)) * Y"
CHOICES: dict[str, dict[str, Any]] = {
    "a formula of its own": {"criterion": FOUND},
    "dense statistics": {"criterion": FOUND, "statistics": "dense", "compare": "model"},
    "a pattern": {"criterion": FOUND, "pattern": "2:4"},
    "a pattern in a sweep": {"criterion": "W**2 / U**2", "pattern": "2:4", "update": "obs"},
    "a formula for experts": {"criterion": "abs(W)", "criteria": {"re:experts": "abs(W) * X"}},
    "some experts": {"criterion": "abs(W) * X", "targets": ["re:experts\\.[12]"]},
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_of_a_recipe_reach_experts_as_those_of_a_twin(name: str) -> None:
    recipe = Recipe.model_validate({"name": "mine", **CHOICES[name]})
    stacked, twin = pair()
    before = {key: value.clone() for key, value in weights(stacked).items()}
    sparsity = None if recipe.pattern != "free" else 0.5
    found = pruned(stacked, recipe, sparsity)
    check_equal(found, pruned(twin, recipe, sparsity))
    chosen = {one.name for one in find_linears(stacked.model, targets=recipe.targets)}
    for key, weight in found.items():
        assert torch.equal(weight, before[key]) == (key not in chosen)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_family_is_pruned_and_its_routers_are_left_alone(family: str) -> None:
    model = moe_model(family)
    before = {name: one.clone() for name, one in model.model.state_dict().items()}
    pruned(model, Recipe.load("sparsegpt"), 0.5)
    linear = {f"{layer.name}.weight" for layer in find_linears(model.model)}
    for name, tensor in model.model.state_dict().items():
        is_stack = name.endswith((UP, DOWN)) and tensor.dim() == 3
        assert torch.equal(tensor, before[name]) == (name not in linear and not is_stack), name
        if is_stack:
            assert ((tensor == 0).float().mean((1, 2)) == 0.5).all()


def test_low_rank_factors_for_experts_are_refused_before_the_work() -> None:
    model = moe_model()
    recipe = Recipe.model_validate({"name": "mine", "criterion": "abs(W)", "recover": "lora"})
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.mlp\.experts\.0\.gate_up_proj' is"):
        prune(model, recipe, 0.5, windows=WINDOWS)
    others = {"lora": {"targets": ["self_attn.q_proj"], "steps": 2, "batch": 1}}
    allowed = recipe.model_validate({**recipe.model_dump(by_alias=True), "recover": others})
    prune(model, allowed, 0.5, windows=WINDOWS)
