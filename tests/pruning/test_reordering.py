"""Permutations through whole prunings: the function stays, and masks are N:M in memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError, RecipeError, SelectionError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning import reordering
from prunezero.pruning.compare import RecipeRunner
from prunezero.pruning.permutation import Orders, permute_block
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums, layer_sums
from prunezero.pruning.updates.mend import Work
from prunezero.scoring.score import score
from prunezero.scoring.statistics import Statistics
from tests.scoring.reference import keep_pattern
from tests.searching.testbed import tiny_testbed
from tests.tiny_models import BLOCKS, tiny_batches, tiny_model, tiny_network, tiny_tokenizer

BATCHES = tiny_batches(4, 16)
# Queries share keys and values in llama; the others have biases, gpt2 a fused layer.
FAMILIES = ("llama", "gpt2", "opt")
RIA = "(abs(W) / C1 + abs(W) / R1) * sqrt(X)"
# The last layer of each block, whose inputs any order can be folded into.
LAST = {"llama": "down_proj", "gpt2": "mlp.c_proj", "opt": "fc2"}
CONSUMERS = {
    "llama": ("o_proj", "down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("out_proj", "fc2"),
}


def recipe(criterion: str = RIA, **choices: object) -> Recipe:
    fields = {"name": "mine", "pattern": "2:4", "permute": "assignment", **choices}
    return Recipe.model_validate({"criterion": criterion, **fields})


def model_of(family: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A tiny model with strong and weak channels, and biases that are not zero."""
    network, generator = tiny_network(family), torch.Generator().manual_seed(7)
    for layer in find_linears(network):
        rows, columns = layer.weight.shape
        layer.weight.mul_(torch.randn(1, columns, generator=generator).exp())
        layer.weight.mul_(torch.randn(rows, 1, generator=generator).exp())
        if layer.bias is not None:
            layer.bias.normal_(std=0.1, generator=generator)
    return wrap_model(network.to(dtype), tiny_tokenizer(), name=family)


def statistics_of(model: LanguageModel, chosen: Recipe) -> dict[str, Statistics]:
    """All that the recipe looks at, gradients too, on the model as it is."""
    return calibrate(model, BATCHES, find_linears(model.model), layer_sums(chosen))


def logits_of(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.model(BATCHES).logits
    return logits


def pruned(model: LanguageModel, chosen: Recipe) -> LanguageModel:
    known = None
    if dense_sums([chosen]):
        known = calibrate(model, BATCHES, find_linears(model.model), dense_sums([chosen]))
    prune(model, chosen, statistics=known, windows=BATCHES)
    return model


def retained(scores: Tensor) -> float:
    values = scores.double().numpy()
    return float(values[keep_pattern(values, 2, 4)].sum())


def moved_only(
    model: LanguageModel, chosen: Recipe, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Statistics]:
    """A pruning that removes nothing; what it would have scored each layer by."""
    scored_by: dict[str, Statistics] = {}

    def noting(works: Sequence[Work]) -> None:
        scored_by.update({work.layer.name: work.statistics for work in works if work.statistics})

    with monkeypatch.context() as patch:
        patch.setattr("prunezero.pruning.prune.mend", noting)
        patch.setattr("prunezero.pruning.prune.check_reached", lambda *arguments: None)
        pruned(model, chosen)
    return scored_by


@pytest.mark.parametrize("word", ["heuristic", "assignment"])
@pytest.mark.parametrize("statistics", ["dense", "sequential"])
@pytest.mark.parametrize("criterion", [RIA, "abs(W) * X * Y + G1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_permuted_model_computes_the_same_and_would_keep_more(
    family: str, criterion: str, statistics: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, model = model_of(family), model_of(family)
    chosen = recipe(criterion, permute=word, statistics=statistics)
    scored_by = moved_only(model, chosen, monkeypatch)
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-4, atol=1e-5)

    # Statistics moved along with the channels: they are those that the moved model shows.
    seen = statistics_of(model, chosen)
    assert scored_by.keys() == seen.keys()
    for name, known in scored_by.items():
        assert known.sums.keys() == seen[name].sums.keys()
        for key, value in seen[name].sums.items():
            torch.testing.assert_close(known.sums[key], value, rtol=1e-3, atol=1e-5)

    before = statistics_of(dense, chosen)
    gained = {}
    for old, new in zip(find_linears(dense.model), find_linears(model.model), strict=True):
        kept_before = retained(score(chosen.criterion, old.weight, before[old.name]))
        kept_now = retained(score(chosen.criterion, new.weight, scored_by[new.name]))
        gained[new.block, new.kind] = kept_now / kept_before - 1
    consumers = {(block, kind) for block in range(BLOCKS) for kind in CONSUMERS[family]}
    assert {layer for layer, gain in gained.items() if gain > 1e-4} <= consumers
    assert min(gained.values()) > -1e-5
    assert all(gained[layer] > 1e-3 for layer in consumers)


@pytest.mark.parametrize(
    ("criterion", "choices"),
    [
        (RIA, {}),
        (RIA, {"statistics": "sequential"}),
        ("W**2 / U**2", {"statistics": "sequential", "update": "obs"}),
        ("abs(W) * X", {"update": ["swaps", "bias"]}),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_two_of_four_in_memory(
    dtype: torch.dtype, family: str, criterion: str, choices: dict[str, Any]
) -> None:
    model = pruned(model_of(family, dtype), recipe(criterion, **choices))
    for layer in find_linears(model.model):
        assert bool(((layer.weight.reshape(-1, 4) != 0).sum(1) == 2).all())
        assert not torch.signbit(layer.weight[layer.weight == 0]).any()


def is_two_of_four(weight: Tensor) -> bool:
    return bool(((weight.reshape(-1, 4) != 0).sum(1) == 2).all())


@pytest.mark.parametrize("statistics", ["dense", "sequential"])
@pytest.mark.parametrize("word", ["heuristic", "assignment"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_order_prunes_to_the_function_of_the_mask_put_back(
    family: str, word: str, statistics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: dict[str, Orders] = {}

    def permuting(*arguments: Any) -> dict[str, Orders]:
        found = permute_block(*arguments)
        moved.update(found)
        return found

    monkeypatch.setattr(reordering, "permute_block", permuting)
    masked = model_of(family)
    chosen = recipe(permute={word: {"layers": [LAST[family]]}}, statistics=statistics)
    folded = pruned(model_of(family), chosen)
    pairs = zip(find_linears(masked.model), find_linears(folded.model), strict=True)
    for before, after in pairs:
        assert is_two_of_four(after.weight)
        orders = moved.get(before.name, Orders(None, None))
        back = put_back(after.weight, orders)
        kept = back != 0
        assert torch.equal(before.weight[kept], back[kept])
        before.weight.mul_(kept)
        assert is_two_of_four(before.weight) == (orders.inputs is None)
    assert any(orders.inputs is not None for orders in moved.values())
    torch.testing.assert_close(logits_of(folded), logits_of(masked), rtol=1e-4, atol=1e-5)


def put_back(weight: Tensor, orders: Orders) -> Tensor:
    """A weight with its channels where they were before they moved."""
    found = weight.clone()
    if orders.outputs is not None:
        found[orders.outputs] = weight
    columns = found.clone()
    if orders.inputs is not None:
        columns[:, orders.inputs] = found
    return columns


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "q_proj"), ("llama", "gate_proj"), ("gpt2", "c_attn")]
)
def test_a_named_layer_that_cannot_move_is_refused_with_the_reason(family: str, kind: str) -> None:
    model = model_of(family)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    chosen = recipe("abs(W)", permute={"heuristic": {"layers": [LAST[family], kind]}})
    complaint = rf"input channels of '.*{kind}' cannot be permuted: .*residual.*leave it out"
    with pytest.raises(RecipeError, match=complaint):
        prune(model, chosen)
    after = model.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_names_that_no_pruned_layer_bears_are_refused() -> None:
    with pytest.raises(ModelError, match="'down_prj' matches no layer; did you mean 'down_proj'"):
        prune(model_of("llama"), recipe("abs(W)", permute={"assignment": {"layers": ["down_prj"]}}))
    options = {"layers": ["down_proj", "o_proj"]}
    chosen = recipe("abs(W)", permute={"assignment": options}, targets=["down_proj"])
    with pytest.raises(ModelError, match="'o_proj' matches no layer.*'.*down_proj'"):
        prune(model_of("llama"), chosen)


def test_a_recipe_none_of_whose_layers_can_move_is_refused() -> None:
    chosen = recipe("abs(W)", targets=["q_proj", "up_proj"])
    with pytest.raises(RecipeError, match=r"no layer's .* permuted in LlamaForCausalLM; use"):
        prune(model_of("llama"), chosen)


def test_a_pattern_wider_than_a_head_needs_the_other_layers_named() -> None:
    with pytest.raises(
        SelectionError, match=re.escape("o_proj' can be permuted within heads of 8")
    ):
        prune(model_of("llama"), recipe("abs(W)", pattern="8:16"))
    model = model_of("llama")
    prune(
        model, recipe("abs(W)", pattern="8:16", permute={"assignment": {"layers": [LAST["llama"]]}})
    )
    for layer in find_linears(model.model):
        assert bool(((layer.weight.reshape(-1, 16) != 0).sum(1) == 8).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_layers_that_are_not_pruned_follow(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, model = model_of(family), model_of(family)
    chosen = recipe(targets=list(CONSUMERS[family]))
    moved_only(model, chosen, monkeypatch)
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-4, atol=1e-5)
    pruned(model, recipe(targets=list(CONSUMERS[family])))
    for before, after in zip(find_linears(dense.model), find_linears(model.model), strict=True):
        if after.kind in CONSUMERS[family]:
            assert is_two_of_four(after.weight)
        else:
            rows = [sorted(map(tuple, layer.weight.tolist())) for layer in (before, after)]
            assert rows[0] == rows[1]


class StopError(Exception):
    """Ends a pruning from outside."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_measurement_brings_back_order_and_weights(family: str) -> None:
    testbed = tiny_testbed(family)
    model = testbed.language_model
    for layer in find_linears(model.model):
        if layer.bias is not None:
            layer.bias.copy_(torch.linspace(-1, 1, len(layer.bias)))
    before = {name: value.clone() for name, value in model.model.state_dict().items()}

    def is_dense() -> bool:
        after = model.model.state_dict()
        return all(torch.equal(after[name], value) for name, value in before.items())

    def stop(what: str, done: int, total: int) -> None:
        assert not is_dense()
        raise StopError

    for targets in ([], [LAST[family]]):
        chosen = recipe(targets=targets)
        runner = RecipeRunner(
            testbed, testbed.statistics(find_linears(model.model), dense_sums([chosen]))
        )
        first = runner.row(chosen, None, ["validation"])
        assert is_dense()
        with pytest.raises(StopError):
            runner.row(chosen, None, ["validation"], progress=stop)
        assert is_dense()
        assert runner.row(chosen, None, ["validation"])["kl"] == first["kl"] > 0


def test_the_order_is_that_of_the_weights_a_mask_is_chosen_on() -> None:
    # Strong and weak columns stand in different groups, so every order must mix them.
    model = tiny_model("llama")
    for layer in find_linears(model.model, targets=["down_proj"]):
        layer.weight[:, :32] = 1.0 + torch.arange(32.0) / 100
        layer.weight[:, 32:] = 0.01
    prune(model, recipe("abs(W)", permute={"heuristic": {"layers": ["down_proj"]}}))
    for layer in find_linears(model.model, targets=["down_proj"]):
        # All that is strong is kept: of every group of four exactly two.
        assert np.array_equal(
            np.sort(layer.weight[0][layer.weight[0] != 0].numpy()),
            np.float32(1.0) + np.arange(32, dtype=np.float32) / np.float32(100),
        )
