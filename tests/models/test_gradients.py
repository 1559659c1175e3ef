from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prunezero.errors import StatisticsError
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.observing.calibration import calibrate
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model

GRADIENT_SUMS = [
    "gradient_square_sum",
    "gradient_absolute_sum",
    "output_gradient_square_sum",
    "token_gradient_square_sum",
]


def reference(network: Any, layers: list[Linear], ids: Tensor) -> dict[str, list[Tensor]]:
    """The gradient sums of every layer by plain autograd."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            inputs[name], outputs[name] = args[0], output

        return hook

    for layer in layers:
        layer.module.register_forward_hook(keep(layer.name))
    network.requires_grad_(True)
    sums: dict[str, list[Tensor]] = {layer.name: [torch.zeros(())] * 4 for layer in layers}
    for sequence in ids:
        logits = network(sequence[None]).logits[0]
        loss = cross_entropy(logits[:-1], sequence[1:])
        weights = [layer.module.weight for layer in layers]
        wanted = [*weights, *(outputs[layer.name] for layer in layers)]
        gradients = torch.autograd.grad(loss, wanted)  # type: ignore[arg-type]
        for place, layer in enumerate(layers):
            weight, output = gradients[place], gradients[place + len(layers)]
            weight = weight if isinstance(layer.module, nn.Linear) else weight.T
            square, absolute, outer, tokens = sums[layer.name]
            rows = output.reshape(-1, output.shape[-1])
            seen = inputs[layer.name].reshape(-1, inputs[layer.name].shape[-1])
            outer = outer + rows.square().sum(0)
            for row, column in zip(rows, seen, strict=True):
                tokens = tokens + torch.outer(row, column).square()
            sums[layer.name] = [square + weight.square(), absolute + weight.abs(), outer, tokens]
    return sums


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_sums_equal_those_of_plain_autograd(family: str) -> None:
    model, ids = tiny_model(family), tiny_batches(3, 12)
    layers = find_linears(model.model)
    collected = calibrate(model, ids, layers, GRADIENT_SUMS)
    other = tiny_model(family).model
    for name, expected in reference(other, find_linears(other), ids).items():
        for sum_name, value in zip(GRADIENT_SUMS, expected, strict=True):
            have = collected[name].sums[sum_name].float()
            torch.testing.assert_close(have, value.detach(), rtol=1e-3, atol=1e-12)
        assert (collected[name].tokens, collected[name].sequences) == (36, 3)


@pytest.mark.parametrize("sum_name", GRADIENT_SUMS)
def test_a_gradient_sum_alone_equals_itself_among_others(sum_name: str) -> None:
    model, ids = tiny_model(), tiny_batches()
    layers = find_linears(model.model, targets=["o_proj"])
    alone = calibrate(model, ids, layers, [sum_name])
    among = calibrate(model, ids, find_linears(model.model), [*GRADIENT_SUMS, "input_sum"])
    for layer in layers:
        assert set(alone[layer.name].sums) == {sum_name}
        left, right = (found[layer.name].sums[sum_name] for found in (alone, among))
        torch.testing.assert_close(left, right)


def test_no_gradient_and_no_hook_is_left_behind() -> None:
    model = tiny_model()
    first = next(model.model.parameters())
    first.requires_grad_(True)
    calibrate(model, tiny_batches(), find_linears(model.model), GRADIENT_SUMS)
    assert [p.requires_grad for p in model.model.parameters()].count(True) == 1
    assert first.requires_grad
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert not any(module._forward_hooks for module in model.model.modules())
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_everything_is_restored_after_an_error_too() -> None:
    model = tiny_model()
    layers = find_linears(model.model)
    layers[0].weight.fill_(float("nan"))
    with pytest.raises(StatisticsError, match="the loss of 'llama' on calibration sequence 0 is"):
        calibrate(model, tiny_batches(), layers, GRADIENT_SUMS)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert not any(module._forward_hooks for module in model.model.modules())


def test_a_layer_whose_gradients_are_all_zero_is_refused_by_name() -> None:
    model = tiny_model()
    layers = find_linears(model.model)
    o_proj = next(layer for layer in layers if layer.name.endswith("0.self_attn.o_proj"))
    o_proj.weight.zero_()
    with pytest.raises(StatisticsError, match="layer 'model.layers.0.self_attn.q_proj' are zero"):
        calibrate(model, tiny_batches(), layers, GRADIENT_SUMS)


def test_many_zero_gradients_are_reported_once() -> None:
    model = tiny_model(hidden_act="relu")
    layers = find_linears(model.model, targets=["down_proj"])
    for layer in find_linears(model.model, targets=["gate_proj"]):
        layer.weight[:40] = 0.0
    with pytest.warns(UserWarning, match="62% of the gradient sums are exactly zero") as caught:
        calibrate(model, tiny_batches(), layers, ["gradient_square_sum"])
    assert len(caught) == 1
