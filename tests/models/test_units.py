from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.linears import (
    Linear,
    find_blocks,
    find_linears,
    note_calls,
    uncalled_linears,
)
from prunezero.models.loading.language_model import wrap_model
from prunezero.models.streaming.streamed_model import StreamedModel
from tests.tiny_models import BLOCKS, FAMILIES, tiny_network, tiny_tokenizer

LAYERS_PER_BLOCK = {"llama": 7, "mistral": 7, "qwen3": 7, "gemma3": 7, "gpt2": 4, "opt": 6}


def names(layers: list[Linear]) -> list[str]:
    return [layer.name for layer in layers]


def bias_of(layer: Linear) -> Tensor:
    bias = layer.module.bias
    return bias.detach() if isinstance(bias, Tensor) else torch.zeros(layer.weight.shape[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_maps_of_all_blocks_are_found_and_nothing_else(family: str) -> None:
    network = tiny_network(family)
    layers = find_linears(network)
    assert len(find_blocks(network)) == BLOCKS
    assert len(layers) == BLOCKS * LAYERS_PER_BLOCK[family]
    assert not any("head" in name or "embed" in name for name in names(layers))
    assert [layer.block for layer in layers] == sorted(layer.block for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_turns_inputs_into_outputs_by_its_weight(family: str) -> None:
    for layer in find_linears(tiny_network(family)):
        inputs = torch.randn(5, layer.weight.shape[1])
        expected = inputs @ layer.weight.T + bias_of(layer)
        torch.testing.assert_close(layer.module(inputs).detach(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_the_weight_of_a_layer_changes_the_model(family: str) -> None:
    layer = find_linears(tiny_network(family))[0]
    layer.weight[1, 0] = 7.0
    inputs = torch.zeros(layer.weight.shape[1])
    inputs[0] = 1.0
    output = layer.module(inputs).detach()
    assert float(output[1]) == pytest.approx(7.0 + float(bias_of(layer)[1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_are_the_same_in_every_block_and_unique_within(family: str) -> None:
    layers = find_linears(tiny_network(family))
    by_block = [[layer.kind for layer in layers if layer.block == block] for block in range(BLOCKS)]
    assert by_block[0] == by_block[1]
    assert len(set(by_block[0])) == LAYERS_PER_BLOCK[family]


def test_the_two_projections_of_gpt2_with_one_name_have_two_kinds() -> None:
    kinds = [layer.kind for layer in find_linears(tiny_network("gpt2"))[:4]]
    assert kinds == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]


def test_targets_and_ignore_take_names_endings_and_expressions() -> None:
    network = tiny_network("llama")
    assert names(find_linears(network, targets=["model.layers.1.mlp.up_proj"])) == [
        "model.layers.1.mlp.up_proj"
    ]
    assert len(find_linears(network, targets=["q_proj", "mlp.down_proj"])) == 4
    assert len(find_linears(network, targets=[r"re:layers\.0\."])) == 7
    assert len(find_linears(network, targets=["re:mlp"], ignore=["up_proj", "lm_head"])) == 4


@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_refused_with_real_names(argument: str) -> None:
    with pytest.raises(ModelError, match="did you mean 'q_proj'.*model.layers.0.self_attn.q_proj"):
        find_linears(tiny_network("llama"), **{argument: ["qproj"]})


def test_a_pattern_that_is_no_expression_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'re:\(' is not a regular expression"):
        find_linears(tiny_network("llama"), targets=["re:("])


def test_patterns_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ModelError, match="no layer is left"):
        find_linears(tiny_network("llama"), targets=["q_proj"], ignore=["re:self_attn"])


def test_the_head_cannot_be_a_target() -> None:
    with pytest.raises(ModelError, match="'lm_head' matches no layer"):
        find_linears(tiny_network("llama"), targets=["lm_head"])


def test_a_weight_shared_by_two_layers_appears_once() -> None:
    network = tiny_network("llama")
    first, second = find_blocks(network)
    second.mlp.up_proj.weight = first.mlp.up_proj.weight  # type: ignore[union-attr]
    assert len(find_linears(network)) == 13


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)


class RoutedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 9)
        self.experts = nn.ModuleList([Expert() for _ in range(9)])


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([RoutedBlock(), RoutedBlock()])


def test_routers_are_left_alone_and_a_list_of_experts_is_no_list_of_blocks() -> None:
    layers = find_linears(Routed())
    assert len(find_blocks(Routed())) == 2
    assert len(layers) == 18
    assert not any("gate" in name for name in names(layers))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="has no list of equal decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    configuration = T5Config(
        vocab_size=97, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
    )
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        find_blocks(T5ForConditionalGeneration(configuration))


def test_offloaded_weights_are_refused_by_name() -> None:
    network = tiny_network("llama").to("meta")
    with pytest.raises(ModelError, match="'model.layers.0.self_attn.q_proj' is offloaded"):
        find_linears(network)


def test_packed_weights_are_refused_by_dtype_and_shape() -> None:
    network = tiny_network("llama")
    packed = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    find_blocks(network)[1].mlp.up_proj.weight = packed  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj' is torch.uint8 .*quantized"):
        find_linears(network)


def tiny_mamba() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, MambaConfig

    sizes = {"vocab_size": 97, "hidden_size": 32, "state_size": 8, "time_step_rank": 4}
    configuration = MambaConfig(num_hidden_layers=2, **sizes)
    network: torch.nn.Module = AutoModelForCausalLM.from_config(configuration, dtype=torch.float32)
    return network.eval()


def test_layers_that_the_forward_pass_never_calls_are_named_and_left_alone(tmp_path: Path) -> None:
    network = tiny_mamba()
    network.save_pretrained(tmp_path)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path)
    # Its weight is read, and the module passed over.
    never = tuple(f"backbone.layers.{block}.mixer.dt_proj" for block in (0, 1))
    streamed = StreamedModel(tmp_path, device="cpu")
    for model in (wrap_model(network, tiny_tokenizer(), name="mamba"), streamed.language_model):
        assert uncalled_linears(model.model) == never
        with streamed.outlined():
            layers = find_linears(model.model, ignore=["dt_proj"])
            with pytest.raises(ModelError, match="'dt_proj' matches only layers that the forward"):
                find_linears(model.model, targets=["dt_proj"])
        assert [layer.name.split(".")[-1] for layer in layers[:3]] == [
            "in_proj",
            "x_proj",
            "out_proj",
        ]
        assert len(layers) == 6


def test_of_a_forward_pass_that_fails_nothing_is_concluded() -> None:
    network = tiny_mamba()
    note_calls(network, lambda: network(torch.full((1, 2), 10**6)))
    assert uncalled_linears(network) == () and len(find_linears(network)) == 8
