from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing.permuting import (
    CHANGED,
    STREAM,
    UNREACHED,
    Heads,
    PermutableChannels,
    consumer_order,
    find_permutables,
    permute_channels,
    producer_order,
    refusals,
)
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from tests.tiny_models import BLOCKS, FAMILIES, tiny_batches, tiny_model, tiny_tokenizer

Found = dict[str, tuple[dict[str, int], Heads | None]]
GROUPED: Found = {
    "o_proj": ({"v_proj": 0}, Heads(2, 2, 8)),
    "down_proj": ({"gate_proj": 0, "up_proj": 0}, None),
}
EXPECTED: dict[str, Found] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen3": GROUPED,
    "gemma3": GROUPED,
    "gpt2": {"attn.c_proj": ({"c_attn": 64}, Heads(4, 1, 8)), "mlp.c_proj": ({"c_fc": 0}, None)},
    "opt": {"out_proj": ({"v_proj": 0}, Heads(4, 1, 8)), "fc2": ({"fc1": 0}, None)},
}


def layers_of(model: LanguageModel, block: int) -> list[Linear]:
    return [layer for layer in find_linears(model.model) if layer.block == block]


def with_random_biases(model: LanguageModel) -> LanguageModel:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=generator)
    return model


def described(permutables: list[PermutableChannels]) -> Found:
    return {
        each.consumer.kind: ({layer.kind: start for layer, start in each.producers}, each.heads)
        for each in permutables
    }


def random_order(permutable: PermutableChannels, seed: int = 1) -> Tensor:
    groups, queries, size = permutable.heads or (1, 1, permutable.channels)
    generator = torch.Generator().manual_seed(seed)
    within = torch.rand(groups, 1, size, generator=generator).argsort(-1)
    heads = torch.arange(groups * queries).view(groups, queries, 1)
    return (within + size * heads).flatten()


def logits_of(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.model(tiny_batches()).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_channels_inside_mlp_and_heads_are_found_in_every_block(family: str) -> None:
    model = with_random_biases(tiny_model(family))
    for block in range(BLOCKS):
        assert described(find_permutables(model, layers_of(model, block))) == EXPECTED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_when_every_folding_gets_a_random_order(family: str) -> None:
    model = with_random_biases(tiny_model(family))
    dense = logits_of(model)
    for block in range(BLOCKS):
        for permutable in find_permutables(model, layers_of(model, block)):
            before = permutable.consumer.weight.clone()
            permute_channels(permutable, random_order(permutable))
            assert not torch.equal(permutable.consumer.weight, before)
    torch.testing.assert_close(logits_of(model), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_foldings_are_found_and_hold_in_bfloat16(family: str) -> None:
    network = tiny_model(family).model.to(torch.bfloat16)
    model = wrap_model(network, tiny_tokenizer(), name=family)
    dense = logits_of(model)
    permutables = find_permutables(model, layers_of(model, 0))
    assert described(permutables) == EXPECTED[family]
    for permutable in permutables:
        permute_channels(permutable, random_order(permutable))
    change = (logits_of(model) - dense).float().norm() / dense.float().norm()
    assert float(change) < 0.02


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({"num_key_value_heads": 1}, Heads(1, 4, 8)),
        ({"num_key_value_heads": 4}, Heads(4, 1, 8)),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24}, Heads(3, 1, 8)),
        ({"num_attention_heads": 1, "num_key_value_heads": 1}, None),
        ({"head_dim": 6}, Heads(2, 2, 6)),
    ],
)
def test_heads_of_any_number_and_size_are_told_apart(
    changes: dict[str, Any], heads: Heads | None
) -> None:
    model = tiny_model("llama", **changes)
    found = described(find_permutables(model, layers_of(model, 1)))
    assert found["o_proj"] == ({"v_proj": 0}, heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_for_foldings_leaves_the_model_as_it_was(family: str) -> None:
    model = with_random_biases(tiny_model(family))
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    find_permutables(model, layers_of(model, 0))
    after = model.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_pre_hooks for module in model.model.modules())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_moves_numbers_bit_for_bit_and_can_be_undone(family: str) -> None:
    model = with_random_biases(tiny_model(family))
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    places = {name: value.data_ptr() for name, value in model.model.state_dict().items()}
    for permutable in find_permutables(model, layers_of(model, 0)):
        order = random_order(permutable)
        columns = permutable.consumer.weight.clone()
        permute_channels(permutable, order)
        assert torch.equal(permutable.consumer.weight, columns[:, order])
        permute_channels(permutable, order.argsort())
    after = model.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: value.data_ptr() for name, value in after.items()} == places


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_biases_move_with_their_rows_and_other_rows_stay(family: str) -> None:
    model = with_random_biases(tiny_model(family))
    for permutable in find_permutables(model, layers_of(model, 0)):
        ((layer, start),) = permutable.producers
        weight, bias = layer.weight.clone(), layer.module.bias.clone()  # type: ignore[operator]
        order = random_order(permutable)
        permute_channels(permutable, order)
        rows = torch.arange(len(weight))
        rows[start : start + permutable.channels] = order + start
        assert torch.equal(layer.weight, weight[rows])
        assert torch.equal(layer.module.bias.detach(), bias[rows])  # type: ignore[operator]


def test_producers_are_found_where_only_the_consumer_is_given() -> None:
    model = tiny_model("llama")
    consumer = find_linears(model.model, targets=["layers.1.mlp.down_proj"])
    (permutable,) = find_permutables(model, consumer)
    assert [layer.name for layer, _ in permutable.producers] == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert find_permutables(model, []) == []


def test_layers_that_read_the_residual_stream_are_refused_with_the_reason() -> None:
    model = tiny_model("opt")
    reasons = refusals(model, layers_of(model, 0))
    assert reasons == {
        f"model.decoder.layers.0.{name}": STREAM
        for name in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "fc1")
    }


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 97}
REST = {"num_hidden_layers": 1, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}


def model_from(configuration: Any) -> LanguageModel:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_config(configuration, dtype=torch.float32)
    return wrap_model(network, tiny_tokenizer(), name="another layout")


def test_rows_that_are_fused_in_one_layer_are_found() -> None:
    from transformers import Phi3Config

    model = model_from(Phi3Config(**SIZES, **REST, num_key_value_heads=2, pad_token_id=0))
    dense = logits_of(model)
    attention, mlp = find_permutables(model, layers_of(model, 0))
    assert described([attention]) == {"o_proj": ({"qkv_proj": 48}, Heads(2, 2, 8))}
    starts = [(layer.kind, start) for layer, start in mlp.producers]
    assert starts == [("gate_up_proj", 0), ("gate_up_proj", 48)]
    for permutable in (attention, mlp):
        permute_channels(permutable, random_order(permutable))
    torch.testing.assert_close(logits_of(model), dense, rtol=1e-4, atol=1e-5)


def test_heads_whose_queries_keys_and_values_alternate_are_refused() -> None:
    from transformers import GPTNeoXConfig

    model = model_from(GPTNeoXConfig(**SIZES, **REST))
    layers = layers_of(model, 0)
    found = described(find_permutables(model, layers))
    assert found == {"dense_4h_to_h": ({"dense_h_to_4h": 0}, None)}
    assert refusals(model, layers)["gpt_neox.layers.0.attention.dense"] == CHANGED


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_channels_and_heads_that_are_dead_are_found_like_any_other(family: str) -> None:
    model = tiny_model(family)
    for layer in layers_of(model, 0):
        layer.weight[: len(layer.weight) // 2] = 0.0
    assert described(find_permutables(model, layers_of(model, 0))) == EXPECTED[family]


def test_a_layer_that_does_not_run_is_refused() -> None:
    model = tiny_model("llama")
    for block in model.model.model.layers:
        block.spare = nn.Linear(32, 32)
    layers = layers_of(model, 0)
    assert described(find_permutables(model, layers)) == GROUPED
    assert refusals(model, layers)["model.layers.0.spare"] == UNREACHED


class ScaledActivation(nn.Module):
    """An activation with a factor of its own for every channel."""

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.silu(values) * torch.linspace(0.5, 1.5, values.shape[-1])


def test_a_channel_that_is_treated_by_its_place_is_refused() -> None:
    model = tiny_model("llama")
    model.model.model.layers[0].mlp.act_fn = ScaledActivation()
    layers = layers_of(model, 0)
    assert list(described(find_permutables(model, layers))) == ["o_proj"]
    assert refusals(model, layers)["model.layers.0.mlp.down_proj"] == CHANGED


def test_a_channel_that_another_block_reads_too_is_refused() -> None:
    model = tiny_model("llama")
    seen: list[Tensor] = []
    first, second = model.model.model.layers

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen[:] = [output.detach()]

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + seen[0][..., : output.shape[-1]]

    first.mlp.up_proj.register_forward_hook(keep)
    second.mlp.down_proj.register_forward_hook(add)
    assert list(described(find_permutables(model, layers_of(model, 0)))) == ["o_proj"]


def test_the_order_of_grouped_heads_goes_to_the_rows_and_back() -> None:
    model = tiny_model("llama")
    permutable = find_permutables(model, layers_of(model, 0))[0]
    order = random_order(permutable)
    rows = producer_order(permutable, order)
    # Two query heads of 8 channels read each key-value head.
    assert rows.tolist() == [*order[:8].tolist(), *(order[16:24] - 8).tolist()]
    assert torch.equal(consumer_order(permutable, rows), order)


def swapped(count: int, left: int, right: int) -> Tensor:
    order = torch.arange(count)
    order[[left, right]] = order[[right, left]]
    return order


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.zeros(32, dtype=torch.int64), "each of 0 to 31 once"),
        (torch.arange(31), "each of 0 to 31 once"),
        (swapped(32, 0, 31), "within heads of 8 channels"),
        (swapped(32, 0, 1), "the same for all query heads"),
    ],
    ids=["doubled", "short", "across heads", "one query head only"],
)
def test_an_order_that_would_change_the_model_is_refused(order: Tensor, message: str) -> None:
    model = tiny_model("llama")
    permutable = find_permutables(model, layers_of(model, 0))[0]
    before = permutable.consumer.weight.clone()
    with pytest.raises(ModelError, match=message):
        permute_channels(permutable, order)
    assert torch.equal(permutable.consumer.weight, before)
