"""Low-rank factors: the mask holds in training as in what is merged, whatever the layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunezero.errors import ModelError, RecipeError
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.models.loading.load import load_model
from prunezero.models.saving.save import count_sparsity, save_model, stored_layers
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.training_options import Lora
from prunezero.pruning.recovery.factors import train_factors
from prunezero.pruning.recovery.words import lora
from tests.pruning.trained import digest
from tests.tiny_models import FAMILIES, tiny_batches, tiny_network, tiny_tokenizer


def pruned(family: str = "llama", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A tiny model of which every second weight of every layer is zero."""
    network = tiny_network(family).to(dtype)
    for layer in find_linears(network):
        layer.weight[:, ::2] = 0.0
    return wrap_model(network, tiny_tokenizer(), name=family)


def layers_of(model: LanguageModel) -> list[Linear]:
    return find_linears(model.model)


def options(**changes: Any) -> Lora:
    return Lora.model_validate({"learning_rate": 0.02, "steps": 4, "batch": 2, "rank": 2} | changes)


def logits_of(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        return model.model(tiny_batches(1, 12)).logits


def test_a_layer_in_training_computes_with_the_masked_product_of_its_factors() -> None:
    for family in ("llama", "gpt2"):
        model = pruned(family)
        layer = find_linears(model.model, targets=["re:mlp"])[0]
        weight, inputs = layer.weight.clone(), torch.randn(3, layer.weight.shape[1])
        with train_factors(model.model, [layer], options(rank=2, alpha=6.0)) as factors:
            first, second = factors.masters
            assert first.shape == (2, weight.shape[1]) and second.shape == (weight.shape[0], 2)
            second.detach().copy_(torch.randn(second.shape))
            change = torch.where(weight == 0, 0.0, 3.0 * second @ first)
            bias = 0.0 if layer.bias is None else layer.bias
            found = model.model.get_submodule(layer.name)(inputs)
            torch.testing.assert_close(found, inputs @ (weight + change).T + bias)
            assert model.model.get_submodule(layer.name) is not layer.module
        assert model.model.get_submodule(layer.name) is layer.module


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensors of a shape, turned or not, that operations make, views aside."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes, self.count = (shape, shape[::-1]), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at what it gives."""
        found = func(*args, **(kwargs or {}))
        given = [one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)]
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, Tensor) and tuple(one.shape) in self.shapes:
                self.count += one.untyped_storage().data_ptr() not in given
        return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("removed", ["nothing", "rows", "columns", "rows and columns", "weights"])
def test_no_matrix_of_the_size_of_a_weight_is_made_where_units_are_gone(
    removed: str, family: str
) -> None:
    model = wrap_model(tiny_network(family), tiny_tokenizer(), name=family)
    layer = find_linears(model.model, targets=["re:mlp"])[0]
    if "rows" in removed:
        layer.weight[1::3] = 0.0
    if "columns" in removed:
        layer.weight[:, :5] = 0.0
    if removed == "weights":
        layer.weight[1, 2] = 0.0
    generator = torch.Generator().manual_seed(0)
    weight = layer.weight.clone()
    inputs = torch.randn(7, weight.shape[1], generator=generator)
    with train_factors(model.model, [layer], options(rank=2, alpha=6.0)) as factors:
        masters = factors.masters
        for master in masters:
            master.detach().copy_(torch.randn(master.shape, generator=generator))
        with torch.enable_grad(), Made(tuple(weight.shape)) as made:
            found = model.model.get_submodule(layer.name)(inputs)
            found.square().sum().backward()
        first, second = (master.detach().clone().requires_grad_(True) for master in masters)
        with torch.enable_grad():
            merged = weight + torch.where(weight == 0, 0.0, 3.0 * second @ first)
            bias = 0.0 if layer.bias is None else layer.bias
            expected = inputs @ merged.T + bias
            expected.square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    for master, own in zip(masters, (first, second), strict=True):
        torch.testing.assert_close(master.grad, own.grad, rtol=1e-4, atol=1e-3)
    assert (made.count == 0) == (removed != "weights")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_and_all_other_weights_may_move(family: str, dtype: torch.dtype) -> None:
    model = pruned(family, dtype)
    before = {layer.name: layer.weight.clone() for layer in layers_of(model)}
    lora(model, layers_of(model), tiny_batches(4, 10), options(learning_rate=0.1))
    for layer in layers_of(model):
        was_zero = before[layer.name] == 0
        held = layer.weight[was_zero]
        assert bool((held == 0).all()) and not bool(torch.signbit(held).any())
        assert bool((layer.weight[~was_zero] != before[layer.name][~was_zero]).any())
        assert layer.weight.dtype == dtype


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_merged_model_is_the_trained_one(family: str) -> None:
    model = pruned(family)
    before = logits_of(model)
    with train_factors(model.model, layers_of(model), options()) as factors:
        for place, master in enumerate(factors.masters):
            generator = torch.Generator().manual_seed(place)
            master.detach().copy_(0.1 * torch.randn(master.shape, generator=generator))
        trained = logits_of(model)
        factors.merge()
    assert float((trained - before).abs().max()) > 1e-2
    torch.testing.assert_close(logits_of(model), trained, rtol=0, atol=1e-5)


def test_names_and_attributes_of_the_model_are_those_it_came_with() -> None:
    model = pruned()
    names, attributes = list(model.model.state_dict()), set(vars(model.model))
    lora(model, layers_of(model), tiny_batches(), options())
    assert list(model.model.state_dict()) == names
    assert set(vars(model.model)) == attributes
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


class StopError(Exception):
    """Ends a training from outside."""


def test_what_ends_it_early_leaves_the_model_as_it_was() -> None:
    model = pruned()
    before, modules = digest(model), dict(model.model.named_modules())

    def stop(what: str, done: int, total: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        lora(model, layers_of(model), tiny_batches(), options(), progress=stop)
    assert digest(model) == before
    assert dict(model.model.named_modules()) == modules


def test_dropout_is_noise_of_training_alone() -> None:
    model = pruned()
    with train_factors(model.model, layers_of(model), options(dropout=0.5)) as factors:
        for master in factors.masters:
            master.detach().fill_(0.1)
        assert not torch.equal(logits_of(model), logits_of(model))
        with factors.measuring():
            quiet = logits_of(model)
            assert torch.equal(quiet, logits_of(model))
        factors.merge()
    torch.testing.assert_close(logits_of(model), quiet, rtol=0, atol=1e-5)


def test_the_seed_decides_the_first_factors_and_no_other_draw() -> None:
    digests: list[str] = []
    for seed in (0, 0, 1):
        model = pruned()
        state = torch.get_rng_state()
        # One window, so that its order is the same under every seed.
        lora(model, layers_of(model), tiny_batches(1), options(), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(len(digests))
        digests.append(digest(model))
    assert digests[0] == digests[1] != digests[2]


def test_a_weight_of_several_modules_is_refused() -> None:
    model = pruned()
    first, second = find_linears(model.model, targets=["gate_proj"])
    second.module.weight = first.module.weight
    with pytest.raises(ModelError, match="several modules share the weight of .*gate_proj"):
        lora(model, [first], tiny_batches(), options())


def recipe(**choices: Any) -> Recipe:
    fields: dict[str, Any] = {"name": "mine", "criterion": "abs(W)"}
    return validated(Recipe, fields | choices, "mine.yaml")


WORDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"steps": 3, "batch": 2, "learning_rate": 0.05}},
    "distil": {"distil": {"steps": 3, "batch": 2, "learning_rate": 0.05}},
    "distil through lora": {
        "distil": {"steps": 3, "batch": 2, "learning_rate": 0.05, "through": "lora"}
    },
}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("pattern", ["free", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_counted_from_the_saved_file_are_those_of_the_mask(
    word: str, pattern: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = tmp_path / "dense"
    tiny_network("llama").to(dtype).save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    plain, model = load_model(str(folder)), load_model(str(folder))
    choices: dict[str, Any] = {"pattern": pattern}
    prune(plain, recipe(**choices), 0.5)
    outcome = prune(model, recipe(recover=WORDS[word], **choices), 0.5, windows=tiny_batches(4, 10))
    assert len(outcome.trainings) == 1 and len(outcome.trainings[0].losses) == 3
    save_model(model, tmp_path / "pruned")
    layers = find_linears(model.model)
    saved = count_sparsity(tmp_path / "pruned", stored_layers(model, layers, tmp_path / "pruned"))
    assert saved.total == sum(layer.weight.numel() for layer in layers)
    assert saved.zeros >= saved.total // 2 and saved.negative_zeros == 0
    again = load_model(str(tmp_path / "pruned"))
    for layer, read, masked in zip(
        layers, find_linears(again.model), find_linears(plain.model), strict=True
    ):
        assert torch.equal(read.weight, layer.weight)
        assert bool((read.weight[masked.weight == 0] == 0).all())
        assert bool((read.weight != masked.weight).any())
        if pattern == "2:4":
            kept = (read.weight != 0).reshape(-1, 4).sum(1)
            assert int(kept.max()) == 2
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"rank": 0}, "rank: .*greater than or equal to 1"),
        ({"alpha": 0}, "alpha: .*greater than 0"),
        ({"dropout": 1.0}, "dropout: .*less than 1"),
        ({"steps": 0}, "steps: .*greater than or equal to 1"),
        ({"learning_rate": math.inf}, "learning_rate: .*finite number"),
        ({"warm_up": 1.5}, "warm_up: .*less than or equal to 1"),
        ({"ranks": 4}, "did you mean 'rank'"),
        ({"targets": ["re:("]}, "targets"),
    ],
)
def test_bad_numbers_are_refused_when_the_recipe_is_read(
    numbers: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(recover={"lora": numbers})


def test_targets_say_what_is_trained_and_others_are_refused_before_the_work() -> None:
    model = pruned()
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    # What is trained need not be pruned.
    chosen = recipe(targets=["up_proj"], recover={"lora": {"targets": ["q_proj"], "steps": 1}})
    prune(model, chosen, 0.75, windows=tiny_batches())
    changed = {
        name for name, value in model.model.state_dict().items() if not value.equal(before[name])
    }
    assert {name.split(".")[-2] for name in changed} == {"up_proj", "q_proj"}
    told: list[str] = []
    wrong = recipe(recover={"lora": {"targets": ["qq_proj"]}})
    with pytest.raises(ModelError, match="'qq_proj' matches no layer"):
        prune(model, wrong, 0.8, windows=tiny_batches(), progress=lambda *step: told.append("any"))
    assert not told


def test_layers_that_lose_nothing_are_trained_too() -> None:
    model = pruned()
    kept = [layer for layer in layers_of(model) if "down_proj" not in layer.name]
    before = {layer.name: layer.weight.clone() for layer in kept}
    prune(
        model,
        recipe(targets=["down_proj"], recover={"lora": {"steps": 2}}),
        0.75,
        windows=tiny_batches(),
    )
    assert all(bool((layer.weight != before[layer.name]).any()) for layer in kept)
    assert all(isinstance(layer.module, nn.Linear) for layer in layers_of(model))
