"""Biases that layers get so that they can take over a mean, and what is left of them on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunezero.errors import ModelError, StatisticsError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.biases import compensate, open_biases
from prunezero.models.loading.load import load_model, save_model
from tests.tiny_models import tiny_batches, tiny_model

IDS = tiny_batches()


def test_opened_biases_survive_saving_and_loading(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        dense = model.model(IDS).logits
    layers = find_linears(model.model)
    added = open_biases(model, layers)
    assert added == sorted(f"{layer.name}.bias" for layer in layers)
    with torch.no_grad():
        assert torch.equal(model.model(IDS).logits, dense)
    for index, layer in enumerate(layers):
        compensate(layer, torch.full((layer.weight.shape[0],), 0.1 * (index + 1)))
    save_model(model, tmp_path / "saved")
    loaded = load_model(str(tmp_path / "saved"), dtype="float32", device="cpu")
    with torch.no_grad():
        mended = model.model(IDS).logits
        assert torch.equal(loaded.model(IDS).logits, mended)
    assert not torch.equal(mended, dense)


def test_a_switch_opens_only_its_own_layers() -> None:
    model = tiny_model("llama")
    added = open_biases(model, find_linears(model.model, targets=["q_proj"]))
    kinds = {name.split(".")[-2] for name in added}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert model.model.config.attention_bias and not model.model.config.mlp_bias
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_layers_that_have_a_bias_are_left_alone(family: str) -> None:
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    assert open_biases(model, find_linears(model.model)) == []
    assert before.keys() == model.model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.model.state_dict().items())


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3"])
def test_a_family_without_a_switch_is_refused_and_left_unchanged(family: str) -> None:
    model = tiny_model(family)
    settings, names = model.model.config.to_dict(), list(model.model.state_dict())
    with pytest.raises(ModelError, match=rf"layer '.*' has no bias.*{family}.*another update"):
        open_biases(model, find_linears(model.model))
    assert model.model.config.to_dict() == settings
    assert list(model.model.state_dict()) == names


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_family_with_a_switch_for_attention_opens_attention(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    layers = find_linears(model.model, targets=["re:self_attn"])
    assert open_biases(model, layers) == sorted(f"{layer.name}.bias" for layer in layers)
    compensate(layers[0], torch.ones(layers[0].weight.shape[0]))
    save_model(model, tmp_path / "saved")
    loaded = load_model(str(tmp_path / "saved"), dtype="float32", device="cpu")
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, model.model(IDS).logits)


def test_opening_again_changes_nothing() -> None:
    model = tiny_model("llama")
    layers = find_linears(model.model)
    open_biases(model, layers)
    compensate(layers[0], torch.ones(layers[0].weight.shape[0]))
    assert open_biases(model, layers) == []
    bias = layers[0].bias
    assert bias is not None and torch.equal(bias, torch.ones_like(bias))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_removed_part_with_constant_input_is_made_up_for(family: str) -> None:
    model = tiny_model(family)
    layer = find_linears(model.model)[0]
    open_biases(model, [layer])
    inputs = torch.linspace(-1, 1, layer.weight.shape[1])
    dense = layer.module(inputs[None])
    removed = layer.weight.clone()
    removed[:, ::2] = 0.0
    layer.weight[:, 1::2] = 0.0
    compensate(layer, removed.double() @ inputs.double())
    torch.testing.assert_close(layer.module(inputs[None]), dense)


def test_bfloat16_biases_are_rounded_once() -> None:
    model = tiny_model("llama")
    model.model.bfloat16()
    layer = find_linears(model.model)[0]
    open_biases(model, [layer])
    compensate(layer, torch.full((32,), 1.0))
    # A little more than half a step above one; rounded by itself it would be exactly half of one.
    compensate(layer, torch.full((32,), 2.0**-8 + 1e-5))
    bias = layer.bias
    assert bias is not None and bias.dtype == torch.bfloat16
    assert torch.equal(bias, torch.full((32,), 1 + 2.0**-7, dtype=torch.bfloat16))


def test_a_layer_without_a_bias_cannot_compensate() -> None:
    layer = find_linears(tiny_model("llama").model)[0]
    with pytest.raises(ModelError, match="has no bias"):
        compensate(layer, torch.zeros(32))


def test_a_mean_that_is_not_finite_is_refused() -> None:
    layer = find_linears(tiny_model("opt").model)[0]
    with pytest.raises(StatisticsError, match="NaN or infinite"):
        compensate(layer, torch.full((32,), float("nan")))
