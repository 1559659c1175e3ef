"""What is seen of experts equals a plain loop over tokens and experts, written from equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import StatisticsError
from prunezero.models.anatomy.experts import MoeLayer
from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.routing import without_experts
from prunezero.models.loading.load import LanguageModel
from prunezero.models.observing.routing import routing_statistics
from prunezero.models.observing.subset_losses import mixture_of
from prunezero.scoring.statistics import ROUTING_SUMS, Statistics
from tests.models.test_routing import state, without
from tests.tiny_models import tiny_batches
from tests.tiny_moe import EXPERTS, GROUPED, MIXTURES, TOP_K, moe_groups, moe_model

WINDOWS = tiny_batches(3, 12)
NAMES = [*ROUTING_SUMS, "mask_gradients"]
# Nothing can go by itself where a router chooses among groups of three.
FREE = [name for name in NAMES if name != "loss_without_expert"]


def names_of(family: str) -> list[str]:
    return FREE if family in GROUPED else NAMES


def observed(model: LanguageModel, family: str) -> dict[str, Statistics]:
    return routing_statistics(model, moe_groups(model), WINDOWS, names_of(family))


def inputs_of(model: LanguageModel, layer: MoeLayer, ids: Tensor) -> Tensor:
    """What the router of a layer is given, [tokens, hidden]."""
    seen: list[Tensor] = []
    handle = layer.router.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.model(ids)
    handle.remove()
    return seen[0].reshape(-1, 32)


def stream_behind(model: LanguageModel, block: int, ids: Tensor) -> Tensor:
    """The residual stream behind a block [tokens, hidden]."""
    seen: list[Tensor] = []
    module = model.model.model.layers[block]
    handle = module.register_forward_hook(lambda *call: seen.append(call[-1][0].double()))
    model.model(ids[None])
    handle.remove()
    return seen[0]


def output_of(layer: MoeLayer, token: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """What an expert makes of one token, and what its second matrix reads."""
    gate, up = (layer.up[expert].double() @ token.double()).chunk(2)
    inner = gate * torch.sigmoid(gate) * up
    return layer.down[expert].double() @ inner, inner


def slowly(model: LanguageModel, group: Group, family: str) -> dict[str, Any]:
    """The sums of a mixture, one token and expert after another."""
    layer = mixture_of(group)
    sums: dict[str, Any] = {name: np.zeros(EXPERTS) for name in ROUTING_SUMS}
    sums["expert_output_sum"] = np.zeros((EXPERTS, 32))
    sums["together_count"] = np.zeros((EXPERTS, EXPERTS))
    sums["largest_activations"] = []
    for ids in WINDOWS:
        largest = np.zeros(EXPERTS)
        for token in inputs_of(model, layer, ids[None]):
            logits, weights, chosen = (one[0] for one in layer.router(token[None]))
            scores = logits.sigmoid() if family == "deepseek_v3" else logits.softmax(0)
            sums["soft_sum"] += scores.double().numpy()
            for expert, weight in zip(chosen.tolist(), weights.double().tolist(), strict=True):
                output, inner = output_of(layer, token, expert)
                norm = float(output.norm())
                sums["routed_count"][expert] += 1
                sums["gate_sum"][expert] += weight
                sums["gate_square_sum"][expert] += weight**2
                sums["norm_sum"][expert] += norm
                sums["norm_square_sum"][expert] += norm**2
                sums["gated_norm_sum"][expert] += weight * norm
                sums["gated_norm_square_sum"][expert] += (weight * norm) ** 2
                sums["expert_output_sum"][expert] += output.numpy()
                largest[expert] = max(largest[expert], float(inner.abs().max()))
                for other in chosen.tolist():
                    sums["together_count"][expert, other] += 1
        sums["largest_activations"].append(largest)
    return sums


SLOW = ("turned_gated_norm_sum", "loss_without_expert")


@pytest.mark.parametrize("family", MIXTURES)
def test_sums_equal_a_loop_over_tokens_and_experts(family: str) -> None:
    model = moe_model(family)
    before = state(model)
    found = observed(model, family)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    for group in moe_groups(model):
        wanted, have = slowly(model, group, family), found[group.name]
        assert (have.tokens, have.sequences) == (WINDOWS.numel(), len(WINDOWS))
        for name in ROUTING_SUMS.keys() - set(SLOW):
            np.testing.assert_allclose(
                have.sums[name].numpy(), wanted[name], rtol=2e-5, atol=1e-6, err_msg=name
            )
        assert float(have.sums["routed_count"].sum()) == TOP_K * WINDOWS.numel()
        # No token is counted for an expert twice.
        assert torch.equal(have.sums["together_count"].diagonal(), have.sums["routed_count"])


@pytest.mark.parametrize(("family", "is_one"), [("mixtral", True), ("qwen3_moe", False)])
def test_weights_add_up_to_one_where_the_configuration_says_so(family: str, is_one: bool) -> None:
    model = moe_model(family)
    for one in observed(model, family).values():
        assert (abs(float(one.sums["gate_sum"].sum()) - WINDOWS.numel()) < 1e-3) is is_one
    model = moe_model("qwen3_moe", norm_topk_prob=True)
    for one in observed(model, family).values():
        assert float(one.sums["gate_sum"].sum()) == pytest.approx(WINDOWS.numel(), rel=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_tokens_count_by_how_much_routed_experts_turn_the_stream(family: str) -> None:
    model = moe_model(family)
    group = moe_groups(model)[-1]
    layer, found = mixture_of(group), observed(model, family)[group.name]
    wanted = np.zeros(EXPERTS)
    down = model.model.get_parameter(f"{layer.experts_name}.down_proj")
    for ids in WINDOWS:
        tokens = inputs_of(model, layer, ids[None])
        with_them = stream_behind(model, group.block, ids)
        whole = down.detach().clone()
        down.data.zero_()
        without_them = stream_behind(model, group.block, ids)
        down.data.copy_(whole)
        for place, token in enumerate(tokens):
            turn = 1 - float(torch.cosine_similarity(with_them[place], without_them[place], dim=0))
            _, weights, chosen = (one[0] for one in layer.router(token[None]))
            for expert, weight in zip(chosen.tolist(), weights.double().tolist(), strict=True):
                output, _ = output_of(layer, token, expert)
                wanted[expert] += turn * weight * float(output.norm())
    np.testing.assert_allclose(found.sums["turned_gated_norm_sum"].numpy(), wanted, rtol=1e-4)


def test_mask_gradients_are_finite_differences_of_a_factor_on_an_expert() -> None:
    model = moe_model("mixtral")
    for group in moe_groups(model):
        layer, found = mixture_of(group), observed(model, "mixtral")[group.name]
        whole, step = layer.down.clone(), 1e-2
        for sequence, ids in enumerate(WINDOWS):
            for expert in range(EXPERTS):
                losses = []
                for factor in (1 + step, 1 - step):
                    layer.down[expert] *= factor
                    logits = model.model(ids[None]).logits[0, :-1].double()
                    losses.append(float(torch.nn.functional.cross_entropy(logits, ids[1:])))
                    layer.down.copy_(whole)
                slope = (losses[0] - losses[1]) / (2 * step)
                have = float(found.sums["mask_gradients"][sequence, expert])
                assert have == pytest.approx(slope, rel=5e-2, abs=1e-4)


def test_the_loss_without_an_expert_is_that_of_the_layer_really_run_without_it() -> None:
    model = moe_model("qwen3_moe")
    groups = moe_groups(model)
    found = observed(model, "qwen3_moe")
    for group in groups:
        layer, wanted = mixture_of(group), []
        for expert in range(EXPERTS):
            total = 0.0
            for ids in WINDOWS:
                tokens = inputs_of(model, layer, ids[None])
                dense = layer.module(tokens[None])[0].double()
                with without_experts(model, without([group], expert)):
                    total += float((layer.module(tokens[None])[0].double() - dense).norm())
            wanted.append(total)
        have = found[group.name].sums["loss_without_expert"]
        np.testing.assert_allclose(have.numpy(), wanted, rtol=1e-5)


def test_a_router_that_chooses_among_groups_has_no_loss_without_one_expert() -> None:
    model = moe_model("deepseek_v3")
    with pytest.raises(StatisticsError, match=r"no expert of .* can go by itself"):
        routing_statistics(model, moe_groups(model), WINDOWS, ["loss_without_expert"])


def test_batches_of_other_length_and_only_some_sums_change_nothing() -> None:
    model = moe_model("mixtral")
    groups = moe_groups(model)
    every = routing_statistics(model, groups, WINDOWS, NAMES)
    for name in NAMES:
        alone = routing_statistics(model, groups, WINDOWS, [name])
        for group in groups:
            assert torch.equal(alone[group.name].sums[name], every[group.name].sums[name]), name
