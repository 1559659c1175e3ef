"""A stack of experts is a list of linear maps, which are called one by one while somebody looks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import ModelError, PruneZeroWarning, StatisticsError
from prunezero.models.anatomy.expert_linears import ExpertLinear, expert_linears, linear_at
from prunezero.models.anatomy.linears import Linear, find_linears, matching
from prunezero.models.loading.language_model import wrap_model
from prunezero.models.observing.calibration import BlockWalk, calibrate
from prunezero.models.observing.expert_calls import calling_experts, fill_up, own_weights
from prunezero.scoring.statistics import SUMS, Statistics
from tests.tiny_models import HIDDEN, tiny_batches, tiny_tokenizer
from tests.tiny_moe import (
    INNER,
    MOE_FAMILIES,
    OTHER_LAYOUTS,
    STACKED,
    stacked_model,
    stacked_network,
    unfused_twin,
)

IDS = tiny_batches(24, 32)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_matrix_of_every_expert_is_found_and_no_router(family: str) -> None:
    layers = find_linears(stacked_network(family))
    inside = [layer for layer in layers if isinstance(layer.module, ExpertLinear)]
    assert len(inside) == MOE_FAMILIES[family] * STACKED * 2
    assert {tuple(layer.weight.shape) for layer in inside} == {
        (2 * INNER, HIDDEN),
        (HIDDEN, INNER),
    }
    assert not any(layer.name.endswith((".gate", ".router", "_gate")) for layer in layers)
    # Kinds are unique within a block.
    assert len({(layer.block, layer.kind) for layer in layers}) == len(layers)


@pytest.mark.parametrize("family", OTHER_LAYOUTS)
def test_experts_of_another_layout_are_refused_by_name(family: str) -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.0.* this layout is not supported"):
        find_linears(stacked_network(family))


def test_a_shared_expert_is_pruned_like_any_mlp_and_its_gate_is_left_alone() -> None:
    names = {layer.name for layer in find_linears(stacked_network("qwen2_moe"))}
    assert "model.layers.0.mlp.shared_expert.down_proj" in names
    assert "model.layers.0.mlp.shared_expert_gate" not in names


def test_writing_to_a_weight_changes_the_stack_at_its_index_alone() -> None:
    network = stacked_network("mixtral")
    (layer,) = find_linears(network, targets=["layers.1.mlp.experts.3.down_proj"])
    stack = network.get_parameter("model.layers.1.mlp.experts.down_proj").detach()
    before = stack.clone()
    layer.weight.zero_()
    assert not stack[3].any()
    assert torch.equal(stack[:3], before[:3])
    assert layer.kind == "experts.3.down_proj"
    assert layer.bias is None


def test_patterns_reach_experts_as_they_reach_other_layers() -> None:
    network = stacked_network("mixtral")
    layers = find_linears(network)
    assert len(matching("down_proj", layers)) == 2 * STACKED
    assert len(matching("experts.3.down_proj", layers)) == 2
    assert len(find_linears(network, targets=["re:experts"])) == 4 * STACKED
    assert len(find_linears(network, ignore=["re:experts"])) == 8
    assert len(find_linears(network, ignore=["experts.0.gate_up_proj"])) == len(layers) - 2
    with pytest.raises(ModelError, match=r"'experts\.7\.down_proj' matches no layer"):
        find_linears(network, targets=["experts.7.down_proj"])


def test_a_model_is_found_the_same_linear_maps_in_again_and_its_copy_has_its_own() -> None:
    network = stacked_network("mixtral")
    first, again = find_linears(network)[5], find_linears(network)[5]
    assert first.module is again.module
    twin = copy.deepcopy(network)
    (theirs,) = find_linears(twin, targets=[first.name])
    theirs.weight.zero_()
    assert theirs.module is not first.module
    assert first.weight.any()
    block = network.model.layers[0]
    assert linear_at(block, "mlp.experts.0.down_proj") is find_linears(network)[5].module
    assert linear_at(block, "self_attn.q_proj") is block.self_attn.q_proj


def test_a_network_has_no_more_modules_and_tensors_than_before() -> None:
    network = stacked_network("mixtral")
    modules, tensors = dict(network.named_modules()), list(network.state_dict())
    find_linears(network)
    assert dict(network.named_modules()) == modules
    assert list(network.state_dict()) == tensors


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_that_call_their_linear_maps_compute_what_the_eager_ones_do(family: str) -> None:
    network = stacked_network(family)
    network.set_experts_implementation("eager")
    layers = find_linears(network)
    calls: list[int] = []
    inside = next(layer.module for layer in layers if isinstance(layer.module, ExpertLinear))
    handle = inside.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    with torch.no_grad():
        expected = network(IDS).logits
        assert not calls
        with calling_experts(layers):
            found = network(IDS).logits
        assert len(calls) == 1
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(network(IDS).logits, expected)
    handle.remove()
    assert len(calls) == 1


def test_what_experts_call_is_as_before_after_an_error_too() -> None:
    network = stacked_network("mixtral")
    experts = network.model.layers[0].mlp.experts
    layers = find_linears(network)
    with pytest.raises(KeyError), calling_experts(layers):
        assert "forward" in vars(experts)
        raise KeyError
    assert "forward" not in vars(experts)
    assert network.config._experts_implementation != "eager"
    with calling_experts(layers), calling_experts(layers):
        pass
    assert "forward" not in vars(experts)


def test_a_sum_does_not_depend_on_how_tokens_are_grouped() -> None:
    network = stacked_network("mixtral")
    experts = network.model.layers[0].mlp.experts
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(0))
    indices = torch.arange(40)[:, None].expand(40, 2) % STACKED
    indices = torch.stack([indices[:, 0], (indices[:, 0] + 1) % STACKED], dim=1)
    seen: list[torch.Tensor] = []
    linear = expert_linears(experts)["2.gate_up_proj"]
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with calling_experts(find_linears(network)), torch.no_grad():
        experts(hidden, indices, torch.ones(40, 2))
        experts(hidden, indices.flip(1), torch.ones(40, 2))
    handle.remove()
    assert torch.equal(seen[0], hidden[(indices == 2).any(1)])
    assert torch.equal(seen[0], seen[1])


def test_every_sum_equals_that_of_a_twin_without_stacks() -> None:
    network = stacked_network("mixtral")
    models = [
        wrap_model(one, tiny_tokenizer(), name="mixtral")
        for one in (network, unfused_twin(network))
    ]
    sums = [name for name in SUMS if not SUMS[name].by_sequence]
    found, expected = (calibrate(one, IDS, find_linears(one.model), sums) for one in models)
    assert list(found) == list(expected)
    for name, known in found.items():
        assert known.tokens == expected[name].tokens
        assert known.sequences == expected[name].sequences == len(IDS)
        for key, value in known.sums.items():
            torch.testing.assert_close(value, expected[name].sums[key], rtol=1e-5, atol=1e-6)
    routed = [known.tokens for name, known in found.items() if name.endswith("3.down_proj")]
    assert all(0 < tokens < IDS.numel() for tokens in routed)
    tokens = [known.tokens for name, known in found.items() if ".0.mlp" in name and "down" in name]
    assert sum(tokens) == 2 * IDS.numel()


def test_gradients_reach_each_expert_apart_and_none_stays() -> None:
    network = stacked_network("mixtral").requires_grad_(False)
    layers = find_linears(network, targets=["re:experts"])
    stack = network.get_parameter("model.layers.0.mlp.experts.down_proj")
    with own_weights(layers) as leaves:
        for leaf in leaves.values():
            assert leaf.is_leaf and leaf.requires_grad
        network(IDS[:1]).logits.square().sum().backward()
        first = leaves["model.layers.0.mlp.experts.1.down_proj"]
        assert first.grad is not None and first.grad.shape == stack.shape[1:]
        assert first.data_ptr() == stack[1].data_ptr()
    assert stack.grad is None and not stack.requires_grad
    assert not layers[0].module.weight.requires_grad


REFERENCE: dict[str, Callable[[Any], Any]] = {
    "gram": lambda x: x.T @ x,
    "input_sum": lambda x: x.sum(0),
    "input_square_sum": lambda x: np.square(x).sum(0),
}


def known(tokens: int, seed: int, columns: int = 8, rows: int = 6) -> tuple[Any, Statistics]:
    """Inputs of so many tokens, and their sums."""
    inputs = np.random.default_rng(seed).normal(size=(tokens, columns)).astype(np.float32)
    statistics = Statistics.empty(REFERENCE, rows, columns)
    if tokens:
        statistics.add_inputs(torch.from_numpy(inputs))
    return inputs, statistics


def experts_of(columns: int) -> list[Linear]:
    network = stacked_network("mixtral", hidden_size=columns, head_dim=2)
    return find_linears(network, targets=["re:layers.0.*experts.*gate_up"])


def test_an_expert_with_too_few_tokens_is_filled_up_with_average_ones() -> None:
    layers = experts_of(8)
    inputs, statistics = zip(*(known(n, n) for n in (30, 3, 0, 16)), strict=True)
    collected = {layer.name: one for layer, one in zip(layers, statistics, strict=True)}
    before = dict(collected)
    assert fill_up(collected, layers) == [layers[1].name, layers[2].name]
    # Who has two tokens for each column is left alone.
    assert collected[layers[0].name] is before[layers[0].name]
    assert collected[layers[3].name] is before[layers[3].name]
    every = np.concatenate(inputs).astype(np.float64)
    for place, tokens in ((1, 3), (2, 0)):
        filled, own = collected[layers[place].name], inputs[place].astype(np.float64)
        share = (16 - tokens) / 49
        assert filled.tokens == 16
        for name, of in REFERENCE.items():
            expected = of(own) + share * of(every)
            np.testing.assert_allclose(filled.sums[name].numpy(), expected, rtol=1e-4, atol=1e-4)
        # Three tokens span three directions, and the filled Gram matrix all eight.
        assert np.linalg.matrix_rank(filled.sums["gram"].double().numpy()) == 8


def test_where_no_expert_saw_a_token_nothing_is_filled_up() -> None:
    layers = experts_of(8)
    collected = {layer.name: known(0, 0)[1] for layer in layers}
    assert fill_up(collected, layers) == []


def test_experts_with_few_tokens_are_named_in_one_warning() -> None:
    model = stacked_model("mixtral")
    layers = find_linears(model.model)
    with pytest.warns(PruneZeroWarning) as told:
        found = calibrate(model, IDS[:1], layers, ["gram", "gradient_square_sum"])
    (message,) = [str(one.message) for one in told]
    # 32 tokens go to two of four experts each, and the matrices have 32 and 48 columns.
    assert message.startswith("16 matrices of experts saw fewer than 2 calibration tokens for")
    assert "'model.layers.0.mlp.experts.0.gate_up_proj'" in message
    for name, one in found.items():
        assert one.tokens == (2 * one.sums["gram"].shape[0] if "experts" in name else 32)


def test_sums_from_the_cache_repeat_the_warning_about_experts_with_few_tokens(
    tmp_path: Path,
) -> None:
    model, told = stacked_model("mixtral"), []
    layers = find_linears(model.model)
    for sums in (["gram"], ["gram"], ["gram", "input_sum"]):
        with pytest.warns(PruneZeroWarning) as heard:
            found = calibrate(model, IDS[:1], layers, sums, cache=tmp_path)
        told.append([str(one.message) for one in heard])
        assert {name for name, one in found.items() if one.is_filled} == {
            layer.name for layer in layers if "experts" in layer.name
        }
    assert len(told[0]) == 1 and told[0] == told[1] == told[2]


def test_an_expert_alone_that_saw_no_token_is_refused() -> None:
    model = stacked_model("mixtral")
    layers = find_linears(model.model, targets=["layers.0.mlp.experts.3.down_proj"])
    experts = model.model.model.layers[0].mlp.experts
    # No token goes to the last expert.
    experts.register_forward_pre_hook(lambda module, args: (args[0], args[1].clamp(max=2), args[2]))
    with pytest.raises(StatisticsError, match="saw no calibration token"):
        BlockWalk(model, IDS[:1]).observe(0, layers, ["gram"])
