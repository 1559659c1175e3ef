from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing import semi_structured
from prunezero.models.editing.semi_structured import first_dense_group, to_semi_structured
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.load import wrap_model
from tests.tiny_models import tiny_batches, tiny_network, tiny_tokenizer
from tests.tiny_moe import stacked_model


def two_four(family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> LanguageModel:
    """A tiny model that keeps the 2nd and 3rd of every 4 weights of every layer."""
    network = tiny_network(family).to(dtype)
    for layer in find_linears(network):
        layer.weight[:, ::4] = 0.0
        layer.weight[:, 3::4] = -0.0
    return wrap_model(network, tiny_tokenizer(), name=family)


def layers_of(model: LanguageModel) -> list[Linear]:
    return find_linears(model.model)


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device passes for a GPU with sparse tensor cores."""
    monkeypatch.setattr(semi_structured, "check_gpu", lambda device: None)


def test_a_processor_is_refused() -> None:
    model = two_four()
    with pytest.raises(ModelError, match=r"capability 8\.0 or above, but the device is 'cpu'"):
        to_semi_structured(model, layers_of(model))


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    model = replace(two_four(), device=torch.device("cuda", 1))
    with pytest.raises(ModelError, match=r"8\.0 or above, but 'cuda:1' has 7\.5; keep the dense"):
        to_semi_structured(model, layers_of(model))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_newer_gpus_pass(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    semi_structured.check_gpu(torch.device("cuda"))


@pytest.mark.usefixtures("ampere")
def test_float32_is_refused() -> None:
    model = two_four(dtype=torch.float32)
    with pytest.raises(ModelError, match="q_proj' is in torch.float32 but 2:4 tensors are float16"):
        to_semi_structured(model, layers_of(model))


@pytest.mark.usefixtures("ampere")
def test_transposed_weights_are_refused() -> None:
    model = two_four("gpt2")
    with pytest.raises(ModelError, match="'transformer.h.0.attn.c_attn' is a Conv1D, whose"):
        to_semi_structured(model, layers_of(model))


@pytest.mark.usefixtures("ampere")
def test_matrices_of_a_stack_of_experts_are_refused() -> None:
    model = stacked_model("mixtral")
    (layer,) = find_linears(model.model, targets=["layers.0.mlp.experts.2.down_proj"])
    with pytest.raises(ModelError, match=r"experts\.2\.down_proj' is one matrix of a stack"):
        to_semi_structured(model, [layer])


@pytest.mark.usefixtures("ampere")
def test_a_shape_that_does_not_fit_the_tiles_is_refused() -> None:
    network = tiny_network("llama", intermediate_size=40).bfloat16()
    model = wrap_model(network, tiny_tokenizer(), name="odd")
    chosen = find_linears(network, targets=["down_proj"])
    with pytest.raises(ModelError, match=r"down_proj' has shape \[32, 40\] but .* tiles of 16"):
        to_semi_structured(model, chosen)


@pytest.mark.usefixtures("ampere")
def test_a_layer_that_is_not_2_4_is_refused_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_four()
    layers = layers_of(model)
    layers[-1].weight[5, 8] = 1.0
    made: list[Tensor] = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", made.append)
    with pytest.raises(ModelError, match=r"1.mlp.down_proj' is not 2:4: .* row 5, columns 8 to 11"):
        to_semi_structured(model, layers)
    assert not made


@pytest.mark.usefixtures("ampere")
def test_what_torch_refuses_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_four()
    layers = layers_of(model)
    weights = [layer.module.weight for layer in layers]
    made: list[Tensor] = []

    def failing(weight: Tensor) -> Tensor:
        if len(made) == 3:
            raise RuntimeError("cuSPARSELt not supported on your machine")
        made.append(weight)
        return weight.clone()

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", failing)
    with pytest.raises(ModelError, match=r"o_proj': torch .* of it \(cuSPARSELt not supported"):
        to_semi_structured(model, layers)
    assert all(layer.module.weight is weight for layer, weight in zip(layers, weights, strict=True))


@pytest.mark.usefixtures("ampere")
def test_every_layer_gets_what_torch_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_four()
    layers = layers_of(model)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: 2 * weight)
    doubled = [2 * layer.weight for layer in layers]
    assert to_semi_structured(model, layers) == len(layers)
    for layer, expected in zip(layers, doubled, strict=True):
        assert torch.equal(layer.weight, expected)
        assert not layer.module.weight.requires_grad


def groups_by_loop(weight: Tensor) -> tuple[int, int] | None:
    """The first group of 4 with more than 2 weights, one by one."""
    for row, values in enumerate(weight.tolist()):
        for column in range(0, len(values), 4):
            if sum(value != 0 for value in values[column : column + 4]) > 2:
                return row, column
    return None


@pytest.mark.parametrize("seed", range(8))
def test_the_first_dense_group_is_found_by_value(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 16, generator=generator)
    weight[torch.rand(6, 16, generator=generator) < 0.6] = -0.0
    assert first_dense_group(weight) == groups_by_loop(weight)


def test_groups_of_fewer_than_2_weights_are_2_4_too() -> None:
    assert first_dense_group(torch.zeros(4, 8)) is None
    assert first_dense_group(torch.tensor([[0.0, 1, 1, 0, 1, 0, 0, 0]])) is None
    # Two groups share the three weights in the middle.
    assert first_dense_group(torch.tensor([[0.0, 0, 1, 1, 1, 1, 0, 0]])) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_converted_model_computes_what_the_dense_one_does(
    family: str, dtype: torch.dtype
) -> None:
    # Wide enough for every kernel of torch.
    sizes: dict[str, Any] = {"hidden_size": 128}
    sizes |= {"word_embed_proj_dim": 128, "ffn_dim": 256} if family == "opt" else {}
    network = tiny_network(family, **sizes).to(dtype)
    for layer in find_linears(network):
        layer.weight[:, ::4] = 0.0
        layer.weight[:, 3::4] = 0.0
    model = wrap_model(network.cuda(), tiny_tokenizer(), name=family)
    ids = tiny_batches(1, 24).cuda()
    with torch.no_grad():
        dense = model.model(ids).logits.float()
        layers = layers_of(model)
        assert to_semi_structured(model, layers) == len(layers)
        torch.testing.assert_close(model.model(ids).logits.float(), dense, rtol=0.05, atol=0.02)
