from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunezero.errors import ModelError, StatisticsError, TextError
from prunezero.models.anatomy.linears import find_blocks, find_linears
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing import hooks as observing
from prunezero.models.observing.calibration import BlockWalk
from prunezero.models.observing.hooks import StopForwardError, Visits
from prunezero.models.observing.walk import hidden_of
from prunezero.scoring import statistics
from tests.tiny_models import BLOCKS, FAMILIES, LONGEST, VOCABULARY, tiny_batches, tiny_model


def body_outputs(model: LanguageModel, ids: Tensor) -> list[Tensor]:
    """What every block returns for all sequences together: [block][count, length, hidden]."""
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: outputs.append(hidden_of(output)))
        for block in find_blocks(model.model)
    ]
    with torch.no_grad():
        model.model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_walking_the_blocks_gives_what_the_models_own_forward_gives(family: str) -> None:
    model, ids = tiny_model(family), tiny_batches(3, 24)
    walk = BlockWalk(model, ids)
    for index, expected in enumerate(body_outputs(model, ids)):
        walk.advance(index)
        torch.testing.assert_close(torch.cat(walk.states), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_sees_the_inputs_and_outputs_of_the_models_own_forward(family: str) -> None:
    model, ids = tiny_model(family), tiny_batches(3, 24)
    layers = find_linears(model.model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (args[0].double(), output.double())

        return hook

    handles = [layer.module.register_forward_hook(remember(layer.name)) for layer in layers]
    with torch.no_grad():
        model.model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    walk = BlockWalk(model, ids)
    names = ["input_sum", "input_square_sum", "output_square_sum", "gram"]
    for index in range(BLOCKS):
        for name, collected in walk.observe_and_advance(index, layers, names).items():
            inputs, outputs = (value.reshape(-1, value.shape[-1]) for value in seen[name])
            expected = [inputs.sum(0), inputs.square().sum(0), outputs.square().sum(0)]
            for sum_name, value in zip(names, [*expected, inputs.T @ inputs], strict=True):
                have = collected.sums[sum_name].double()
                torch.testing.assert_close(have, value, rtol=1e-4, atol=1e-4)
            assert (collected.tokens, collected.sequences) == (72, 3)


def test_observe_leaves_the_walk_where_it_is() -> None:
    model = tiny_model()
    walk = BlockWalk(model, tiny_batches())
    before = walk.states
    first = walk.observe(0, find_linears(model.model), ["gram"])
    second = walk.observe(0, find_linears(model.model), ["gram"])
    assert all(left is right for left, right in zip(before, walk.states, strict=True))
    assert first.keys() == second.keys() and len(first) == 7
    for name, collected in first.items():
        assert torch.equal(collected.sums["gram"], second[name].sums["gram"])


def test_advancing_uses_the_weights_as_they_are_now() -> None:
    model, ids = tiny_model(), tiny_batches()
    walk = BlockWalk(model, ids)
    for layer in find_linears(model.model, targets=["re:layers.0"]):
        layer.weight.zero_()
    walk.advance(0)
    with torch.no_grad():
        embedded = model.model.get_input_embeddings()(ids)
    torch.testing.assert_close(torch.cat(walk.states), embedded)


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_inputs_alone_gives_the_same_sums_without_the_last_product(family: str) -> None:
    model = tiny_model(family)
    layers = [layer for layer in find_linears(model.model) if layer.block == 0]
    products: list[str] = []
    for layer in layers:
        layer.module.register_forward_hook(
            lambda module, args, output, name=layer.name: products.append(name)
        )
    walk = BlockWalk(model, tiny_batches(3))
    products.clear()
    seen = walk.observe(0, layers, ["gram", "input_sum"])
    # The first sequence runs whole, to see that each layer is reached once.
    assert len(products) == 3 * len(layers) - 2
    for name, wanted in walk.observe_and_advance(0, layers, ["gram", "input_sum"]).items():
        assert (seen[name].tokens, seen[name].sequences) == (wanted.tokens, wanted.sequences)
        assert all(torch.equal(seen[name].sums[key], wanted.sums[key]) for key in wanted.sums)


def test_a_sequence_is_stopped_only_behind_one_that_reached_each_layer_once() -> None:
    layers = find_linears(tiny_model().model)[:2]
    first, second = (layer.name for layer in layers)
    for before in ([], [first], [first, first], [first, first, second]):
        visits = Visits(layers, stop_early=True)
        for name in before:
            visits.add(name)
        visits.end_sequence()
        visits.add(first)
        visits.add(second)
        visits.end_sequence()
        visits.add(second)
        with pytest.raises(StopForwardError):
            visits.add(first)


def test_outputs_are_never_cut_off() -> None:
    model = tiny_model()
    layers = find_linears(model.model)
    walk = BlockWalk(model, tiny_batches(3))
    seen = walk.observe(0, layers, ["input_sum", "output_square_sum"])
    assert {(row.tokens, row.sequences) for row in seen.values()} == {(48, 3)}
    wanted = walk.observe_and_advance(0, layers, ["output_square_sum"])
    for name, row in wanted.items():
        key = "output_square_sum"
        assert torch.equal(seen[name].sums[key], row.sums[key])


@pytest.mark.parametrize("family", FAMILIES)
def test_behind_the_last_block_the_model_answers_from_the_walks_states(family: str) -> None:
    model, ids = tiny_model(family), tiny_batches(3, 24)
    with torch.no_grad():
        expected = model.model(ids, use_cache=False).logits
    walk = BlockWalk(model, ids)
    for index in range(BLOCKS):
        walk.advance(index)
    for layer in find_linears(model.model):
        layer.weight.fill_(float("nan"))
    for length in (24, 5):
        with torch.no_grad(), walk.replaying(1):
            logits = model.model(ids[1:2, :length], use_cache=False).logits
        torch.testing.assert_close(logits[0], expected[1, :length], rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(block) for block in walk.blocks)


def test_blocks_that_return_tuples_are_replayed_as_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), tiny_batches(1)
    blocks = find_blocks(model.model)
    returned: list[Any] = []

    def tupled(usual: Any, *args: Any, **kwargs: Any) -> Any:
        return (usual(*args, **kwargs), "more")

    for block in blocks:
        monkeypatch.setattr(block, "forward", partial(tupled, block.forward))
    # A body of the kind that takes the first of what its blocks return.
    rotary = model.model.base_model.rotary_emb

    def forward(ids: Tensor, **named: Any) -> Any:
        states = model.model.get_input_embeddings()(ids)
        positions = rotary(states, torch.arange(ids.shape[1])[None])
        for block in blocks:
            output = block(states, position_embeddings=positions)
            returned.append(output)
            states = output[0]
        return states

    monkeypatch.setattr(model.model.base_model, "forward", forward)
    walk = BlockWalk(model, ids)
    walk.advance(0)
    with walk.replaying(0):
        answered = model.model.base_model(ids)
    assert torch.equal(answered, walk.states[0])
    assert returned[-1][1:] == ("more",)


def test_layers_that_share_an_input_compute_its_gram_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    usual = statistics.contribution

    def counted(source: str, values: Tensor, names: Any, *, layer: str) -> Any:
        calls.append(layer.rsplit(".", 1)[-1])
        return usual(source, values, names, layer=layer)

    monkeypatch.setattr(observing, "contribution", counted)
    model = tiny_model()
    BlockWalk(model, tiny_batches(1)).observe(0, find_linears(model.model), ["gram"])
    assert calls == ["q_proj", "o_proj", "gate_proj", "down_proj"]


def test_hooks_are_gone_after_an_error_in_the_middle() -> None:
    model = tiny_model()
    layers = find_linears(model.model)
    layers[3].weight[0, 0] = float("nan")
    with pytest.raises(StatisticsError, match="inputs of model.layers.0.mlp.gate_proj hold NaN"):
        BlockWalk(model, tiny_batches()).observe(0, layers, ["input_square_sum"])
    assert not any(module._forward_hooks for module in model.model.modules())
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_blocks_out_of_order_are_refused() -> None:
    walk = BlockWalk(tiny_model(), tiny_batches())
    with pytest.raises(StatisticsError, match="in front of block 0 but was asked for block 1"):
        walk.advance(1)


def test_gradient_sums_are_refused_by_name() -> None:
    model = tiny_model()
    with pytest.raises(StatisticsError, match="gradient_square_sum needs gradients"):
        walk = BlockWalk(model, tiny_batches())
        walk.observe(0, find_linears(model.model), ["gradient_square_sum"])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros((0, 8), dtype=torch.int64), "0 windows"),
        (torch.zeros((3, 1), dtype=torch.int64), "a window of 1 tokens has no next token"),
        (torch.zeros((1, LONGEST + 1), dtype=torch.int64), "65 tokens are longer than the 64"),
        (torch.full((1, 8), VOCABULARY), r"token id 97 is outside .* \(0 to 96\)"),
        (torch.full((1, 8), -100), "token id -100 is outside"),
        (torch.zeros((1, 8)), "must be int64"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ids_that_the_model_cannot_take_are_refused_first(
    family: str, ids: Tensor, message: str
) -> None:
    with pytest.raises(TextError, match=message):
        BlockWalk(tiny_model(family), ids)


def test_a_model_that_changes_states_between_blocks_is_refused() -> None:
    model = tiny_model()
    first, second = find_blocks(model.model)

    def forward(ids: Tensor, **named: Any) -> Any:
        states = model.model.get_input_embeddings()(ids)
        rotary = model.model.base_model.rotary_emb(states, torch.arange(ids.shape[1])[None])
        states = first(states, position_embeddings=rotary)
        return second(states + 1.0, position_embeddings=rotary)

    model.model.base_model.forward = forward
    with pytest.raises(ModelError, match="changes hidden states between its blocks"):
        BlockWalk(model, tiny_batches())


@pytest.mark.parametrize(("change", "is_refused"), [(1e-6, False), (0.1, True)])
def test_arguments_that_depend_on_the_text_are_refused_and_their_last_bits_are_not(
    change: float, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model("llama"), tiny_batches(3, 24)
    rotary = model.model.model.rotary_emb
    usual, calls = rotary.forward, []

    def drifting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return tuple(part + change * len(calls) for part in usual(*args, **kwargs))

    monkeypatch.setattr(rotary, "forward", drifting)
    if is_refused:
        with pytest.raises(ModelError, match="depend on the text"):
            BlockWalk(model, ids)
    else:
        assert len(BlockWalk(model, ids).states) == 3


def test_a_tuple_and_a_tensor_are_read_and_anything_else_is_refused() -> None:
    state = torch.zeros(1, 2, 3)
    assert hidden_of(state) is state
    assert hidden_of((state, None)) is state
    with pytest.raises(ModelError, match="returned dict instead of hidden states"):
        hidden_of({"states": state})
