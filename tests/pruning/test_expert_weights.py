"""Weights inside the experts of a mixture are pruned as those of a twin with a module for each."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError, PruneZeroWarning
from prunezero.models.anatomy.expert_linears import DOWN, UP
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.models.observing import walk
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.prune import prune, prune_layers
from prunezero.pruning.recipes.recipe import Recipe, published_of
from prunezero.pruning.requirements import dense_sums
from tests.tiny_models import tiny_batches, tiny_tokenizer
from tests.tiny_moe import MOE_FAMILIES, STACKED, stacked_model, stacked_network, unfused_twin

# So many that no expert sees fewer than two tokens for each column.
WINDOWS = tiny_batches(24, 32)


def pair() -> tuple[LanguageModel, LanguageModel]:
    network = stacked_network("mixtral")
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
    assert len(inside) == 2 * 2 * STACKED
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
    model = stacked_model(family)
    before = {name: one.clone() for name, one in model.model.state_dict().items()}
    pruned(model, Recipe.load("sparsegpt"), 0.5)
    linear = {f"{layer.name}.weight" for layer in find_linears(model.model)}
    for name, tensor in model.model.state_dict().items():
        is_stack = name.endswith((UP, DOWN)) and tensor.dim() == 3
        assert torch.equal(tensor, before[name]) == (name not in linear and not is_stack), name
        if is_stack:
            assert ((tensor == 0).float().mean((1, 2)) == 0.5).all()


def test_low_rank_factors_for_experts_are_refused_before_the_work() -> None:
    model = stacked_model()
    recipe = Recipe.model_validate({"name": "mine", "criterion": "abs(W)", "recover": "lora"})
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.mlp\.experts\.0\.gate_up_proj' is"):
        prune(model, recipe, 0.5, windows=WINDOWS)
    others = {"lora": {"targets": ["self_attn.q_proj"], "steps": 2, "batch": 1}}
    allowed = recipe.model_validate({**recipe.model_dump(by_alias=True), "recover": others})
    prune(model, allowed, 0.5, windows=WINDOWS)


def error_on(held_out: Tensor, seed: int, windows: Tensor, *, fills_up: bool) -> float:
    """How much of the outputs of experts a mended mask loses on other text, as a mean."""
    model = stacked_model("mixtral", seed=seed, hidden_size=64, intermediate_size=64)
    layers = find_linears(model.model, targets=["re:layers.0.*experts"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruneZeroWarning)
        seen = calibrate(model, held_out, layers, ["gram"])
        with pytest.MonkeyPatch.context() as patch:
            if not fills_up:
                patch.setattr(walk, "fill_up", lambda collected, layers: [])
            known = calibrate(model, windows, layers, ["gram"])
    before = {layer.name: layer.weight.clone() for layer in layers}
    ratios = dict.fromkeys(before, 0.5)
    prune_layers(Recipe.load("sparsegpt"), layers, known, ratios)
    errors = []
    for layer in layers:
        gram, dense = seen[layer.name].sums["gram"].double(), before[layer.name].double()
        change = layer.weight.double() - dense
        errors.append(float(((change @ gram) * change).sum() / ((dense @ gram) * dense).sum()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_experts_with_few_tokens_lose_less_on_other_text_when_filled_up(
    seed: int, count: int
) -> None:
    held_out, windows = (
        tiny_batches(32, 32, seed=100 + seed),
        tiny_batches(2 * count, 32, seed=seed),
    )
    alone = error_on(held_out, seed, windows, fills_up=False)
    assert error_on(held_out, seed, windows, fills_up=True) < 0.9 * alone
