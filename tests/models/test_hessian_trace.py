from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from prunezero.errors import StatisticsError, TextError
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.hessian_trace import curvatures, hessian_traces
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "head_dim": 4,
}


def exact_hessian(model: LanguageModel, layers: list[Linear], ids: Tensor) -> Tensor:
    """The Hessian [weights, weights] of one sequence's loss over all weights of the layers."""
    model.model.double()
    parameters = {name: value.detach() for name, value in model.model.named_parameters()}
    names = [f"{layer.name}.weight" for layer in layers]
    shapes = [parameters[name].shape for name in names]
    sizes = [shape.numel() for shape in shapes]

    def loss(flat: Tensor) -> Tensor:
        pieces = zip(names, torch.split(flat, sizes), shapes, strict=True)
        changed = parameters | {name: piece.view(shape) for name, piece, shape in pieces}
        logits = functional_call(model.model, changed, (ids[None],)).logits[0]
        return cross_entropy(logits[:-1], ids[1:])

    flat = torch.cat([parameters[name].flatten() for name in names])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, flat)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("targets", [["1.mlp.down_proj"], ["v_proj"]])
def test_estimates_are_the_exact_traces_within_their_standard_errors(targets: list[str]) -> None:
    samples = 400
    model, ids = tiny_model(**SMALL), tiny_batches(1, 8)
    layers = find_linears(model.model, targets=targets)
    traces = hessian_traces(model, ids, layers, sequences=1, samples=samples)
    hessian = exact_hessian(model, layers, ids[0])
    start = 0
    for layer in layers:
        own = slice(start, start + layer.weight.numel())
        start = own.stop
        # The variance over random signs: every coupling once, and those within the layer twice.
        within = hessian[own, own] - hessian[own, own].diagonal().diag()
        across = hessian[own].square().sum() - hessian[own, own].square().sum()
        error = float(((2 * within.square().sum() + across) / samples).sqrt())
        trace = float(hessian[own, own].diagonal().sum())
        assert error < 0.25 * abs(trace)
        assert abs(traces[layer.name] - trace) < 3 * error


def test_the_curvature_of_a_quadratic_is_known() -> None:
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = root @ root.T
    weights = [torch.ones(4, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    weights = [weight.requires_grad_() for weight in weights]
    joined = torch.cat(weights)
    gradients = torch.autograd.grad(joined @ matrix @ joined / 2, weights, create_graph=True)
    directions = [torch.tensor([1.0, -1, 1, 1]).double(), torch.tensor([-1.0, 1]).double()]
    along = torch.cat(directions)
    expected = along * (matrix @ along)
    found = curvatures(gradients, weights, directions)
    assert found == pytest.approx([float(expected[:4].sum()), float(expected[4:].sum())])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_family_has_a_trace(family: str) -> None:
    model, ids = tiny_model(family), tiny_batches(2, 12)
    layers = find_linears(model.model)
    traces = hessian_traces(model, ids, layers, sequences=2, samples=1)
    assert set(traces) == {layer.name for layer in layers}
    assert all(value != 0 for value in traces.values())


def test_a_seed_gives_the_same_traces_again_and_another_seed_others() -> None:
    model, ids = tiny_model(), tiny_batches(2, 8)
    layers = find_linears(model.model)
    first, again, other = (
        hessian_traces(model, ids, layers, sequences=2, samples=1, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_a_trace_is_the_mean_over_sequences_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([[1.0], [2.0], [4.0], [9.0]])
    place = "prunezero.models.observing.hessian_trace.curvatures"
    monkeypatch.setattr(place, lambda *given: next(values))
    told: list[tuple[int, int]] = []
    model = tiny_model()
    layers = find_linears(model.model, targets=["0.mlp.up_proj"])
    traces = hessian_traces(
        model,
        tiny_batches(3, 8),
        layers,
        sequences=2,
        samples=2,
        progress=lambda *step: told.append(step),
    )
    assert traces == {layers[0].name: 4.0}
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_half_precision_weights_are_differentiated_in_float32() -> None:
    half, ids = tiny_model(), tiny_batches(1, 8)
    for parameter in half.model.parameters():
        parameter.data = parameter.data.bfloat16()
    single = tiny_model()
    single.model.load_state_dict(half.model.state_dict())
    found, expected = (
        hessian_traces(model, ids, find_linears(model.model), sequences=1, samples=1)
        for model in (half, single)
    )
    assert found == pytest.approx(expected, rel=1e-5)
    assert half.model.lm_head.weight.dtype == torch.bfloat16


def test_the_model_is_left_as_it_was_after_success_and_after_an_error() -> None:
    model, ids = tiny_model(), tiny_batches(1, 8)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    first = next(model.model.parameters()).requires_grad_(True)
    layers = find_linears(model.model)
    hessian_traces(model, ids, layers, sequences=1, samples=1)
    assert [p.requires_grad for p in model.model.parameters()].count(True) == 1
    assert first.requires_grad
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, before[name])
    layers[0].weight.fill_(float("nan"))
    with pytest.raises(StatisticsError, match="the loss on calibration sequence 0 is nan"):
        hessian_traces(model, ids, layers, sequences=1, samples=1)
    assert [p.requires_grad for p in model.model.parameters()].count(True) == 1
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_a_trace_that_is_not_finite_is_refused_with_the_name_of_its_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = tiny_model(), tiny_batches(1, 8)
    layers = find_linears(model.model, targets=["v_proj"])
    place = "prunezero.models.observing.hessian_trace.curvatures"
    monkeypatch.setattr(place, lambda *given: [1.0, float("nan")])
    with pytest.raises(StatisticsError, match=f"layer '{layers[1].name}' is nan"):
        hessian_traces(model, ids, layers, sequences=1, samples=1)


def test_too_few_sequences_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(TextError, match="asked for over 4 sequences but there are only 2"):
        hessian_traces(model, tiny_batches(2), find_linears(model.model), sequences=4, samples=1)
