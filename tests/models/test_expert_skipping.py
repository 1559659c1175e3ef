"""Tokens skip experts of small weight while the model runs, by the inequality of the source."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError, RecipeError
from prunezero.models.anatomy.expert_linears import experts_inside
from prunezero.models.anatomy.experts import find_moe_layers
from prunezero.models.editing.expert_skipping import (
    counting_calls,
    median_thresholds,
    skipping_experts,
)
from prunezero.models.editing.routing import without_experts
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import sliced
from prunezero.models.loading.load import LanguageModel, load_model
from prunezero.models.saving.save import save_model
from prunezero.models.unequal.mixtures import skipped_slots
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from tests.models.test_routing import state, without
from tests.models.test_routing_statistics import inputs_of
from tests.tiny_models import tiny_batches, tiny_model
from tests.tiny_moe import MIXTURES, TOP_K, moe_groups, moe_model, save_moe

SEEN, FRESH = tiny_batches(256, 48), tiny_batches(256, 48, seed=9)


def run_way(model: LanguageModel, way: str) -> None:
    model.model.set_experts_implementation(way)


def rows_run(model: LanguageModel, ids: Tensor) -> int:
    """For how many tokens experts were really run, all mixtures together."""
    rows: list[int] = []
    handles = [
        experts.act_fn.register_forward_hook(  # type: ignore[union-attr]
            lambda module, args, output: rows.append(len(args[0]))
        )
        for experts in experts_inside(model.model)
    ]
    with torch.no_grad():
        model.model(ids)
    for handle in handles:
        handle.remove()
    return sum(rows)


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_a_token_keeps_the_fewest_experts_beside_which_the_others_weigh_little(
    beta: float,
) -> None:
    weights = torch.rand(200, 4, generator=torch.Generator().manual_seed(3))
    skips = skipped_slots(weights, beta)
    for row, found in zip(weights.tolist(), skips.tolist(), strict=True):
        order = sorted(range(4), key=lambda at: -row[at])
        for count in range(1, 5):
            kept, others = order[:count], order[count:]
            if sum(row[at] for at in others) < beta * sum(row[at] for at in kept) or not others:
                break
        assert [at for at in range(4) if found[at]] == sorted(others)


def test_with_two_experts_the_second_is_skipped_below_its_share_of_the_first() -> None:
    weights = torch.tensor([[0.7, 0.3], [0.3, 0.7], [0.5, 0.5], [0.9, 0.1]])
    # Not at equality: 0.5 < 1.0 * 0.5 does not hold.
    assert skipped_slots(weights, 1.0).tolist() == [
        [False, True],
        [True, False],
        [False, False],
        [False, True],
    ]
    assert not skipped_slots(weights, 0.0).any()


@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", MIXTURES)
def test_nothing_is_skipped_at_zero_and_nothing_is_left_behind(family: str, way: str) -> None:
    model = moe_model(family)
    run_way(model, way)
    before, dense = state(model), model.model(FRESH[:2]).logits
    zero = dict.fromkeys(median_thresholds(model, SEEN[:2]), 0.0)
    with skipping_experts(model, zero) as calls:
        assert torch.equal(model.model(FRESH[:2]).logits, dense)
    assert calls.share == 0.0 and sum(calls.slots.values()) > 0
    with skipping_experts(model, dict.fromkeys(zero, 1.0)) as calls:
        assert not torch.equal(model.model(FRESH[:2]).logits, dense)
    # Weights of equal size aside, all but the first expert of each token go.
    assert calls.share == pytest.approx(1 - 1 / TOP_K)
    assert torch.equal(model.model(FRESH[:2]).logits, dense)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


@pytest.mark.parametrize("family", MIXTURES)
def test_half_of_fresh_tokens_skip_an_expert_at_the_median(family: str) -> None:
    model = moe_model(family)
    run_way(model, "eager")
    thresholds = median_thresholds(model, SEEN)
    ran = rows_run(model, FRESH)
    with skipping_experts(model, thresholds) as calls:
        ran_then = rows_run(model, FRESH)
    assert set(calls.tokens.values()) == {FRESH.numel()}
    # Later mixtures see a text that earlier ones have changed.
    first = next(iter(thresholds))
    assert calls.shortened[first] / calls.tokens[first] == pytest.approx(0.5, abs=0.02)
    assert ran == sum(calls.slots.values())
    assert ran - ran_then == sum(calls.skipped.values())


def slow_output(layer: Any, tokens: Tensor, beta: float, *, is_renormalised: bool) -> Tensor:
    """What routed experts make of tokens, one after another, without those skipped."""
    rows = []
    for token in tokens:
        _, weights, chosen = (one[0] for one in layer.router(token[None]))
        pairs = sorted(zip(weights.tolist(), chosen.tolist(), strict=True), reverse=True)
        kept = pairs[:1] if pairs[1][0] < beta * pairs[0][0] else pairs
        scale = sum(weights.tolist()) / sum(w for w, _ in kept) if is_renormalised else 1.0
        total = torch.zeros(32, dtype=torch.float64)
        for weight, expert in kept:
            gate, up = (layer.up[expert].double() @ token.double()).chunk(2)
            inner = gate * torch.sigmoid(gate) * up
            total += scale * weight * (layer.down[expert].double() @ inner)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("is_renormalised", [True, False])
def test_what_is_left_equals_a_loop_over_tokens(way: str, is_renormalised: bool) -> None:
    model = moe_model("qwen3_moe")
    run_way(model, way)
    layer = find_moe_layers(model.model)[0]
    tokens = inputs_of(model, layer, FRESH[:1])
    wanted = slow_output(layer, tokens, 0.6, is_renormalised=is_renormalised)
    chosen = {layer.name: 0.6}
    with torch.no_grad(), skipping_experts(model, chosen, is_renormalised=is_renormalised):
        found = layer.module(tokens[None])[0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_model_generates_while_experts_are_skipped() -> None:
    model = moe_model("mixtral")
    with skipping_experts(model, median_thresholds(model, SEEN[:8])) as calls:
        made = model.model.generate(FRESH[:1, :8], max_new_tokens=4, min_new_tokens=4)
    assert made.shape == (1, 12) and 0 < calls.share < 1


def test_what_cannot_skip_is_refused_in_one_sentence() -> None:
    with pytest.raises(ModelError, match="sends no token to several experts"):
        median_thresholds(tiny_model("llama"), SEEN[:8])
    model = moe_model("mixtral")
    for wrong in ({"model.layers.7.mlp": 0.5}, {"model.layers.0.mlp": -1.0}):
        with (
            pytest.raises(ModelError, match="thresholds are 0 or more, of model.layers.0.mlp"),
            skipping_experts(model, wrong),
        ):
            pass


def with_thresholds(choice: Selection, beta: float) -> Selection:
    groups = (replace(group, skip_below=beta) for group in choice.groups)
    return Selection(tuple(groups), choice.kept)


COUNTED = """
import sys, torch
from transformers import AutoModelForCausalLM
found = {}
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    for way in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(way)
        with torch.no_grad():
            found[folder, way] = model(ids).logits
    new = model.generate(ids[:1, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    rows = []
    for module in model.modules():
        if hasattr(module, "down_proj") and module.down_proj.__class__.__name__ == "Parameter":
            module.act_fn.register_forward_hook(lambda one, args, out: rows.append(len(args[0])))
    with torch.no_grad():
        model(ids)
    found[folder, "rows"], found[folder, "new"] = sum(rows), new
torch.save(found, sys.argv[1])
"""


def test_a_saved_folder_skips_experts_in_a_fresh_process(tmp_path: Path) -> None:
    ids, wanted = FRESH[:4], {}
    for family, gone in (("mixtral", ()), ("deepseek_v2", (0, 3)), ("qwen3_moe", (1,))):
        model = load_model(str(save_moe(family, tmp_path / f"{family}_dense")))
        run_way(model, "eager")
        choice = without(moe_groups(model), *gone)
        with without_experts(model, choice):
            ran = rows_run(model, ids)
        choice = with_thresholds(choice, 0.6)
        before, dense = state(model), model.model(ids).logits
        with without_experts(model, choice):
            expected, ran_then = model.model(ids).logits, rows_run(model, ids)
        with sliced(model, choice):
            assert torch.equal(model.model(ids).logits, expected)
        assert torch.equal(model.model(ids).logits, dense) and 0 < ran_then < ran
        assert all(torch.equal(value, before[name]) for name, value in state(model).items())
        folder = str(save_model(model, tmp_path / family, smaller=choice))
        wanted[folder] = expected, ran_then
        again = load_model(folder)
        run_way(again, "eager")
        assert torch.equal(again.model(ids).logits, expected)
        with pytest.raises(ModelError, match="tokens skip experts of 'model.layers.* already"):
            moe_groups(again)
    torch.save(ids, tmp_path / "ids.pt")
    words = [sys.executable, "-c", COUNTED, str(tmp_path / "ids.pt"), *wanted]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "ids.pt")
    for folder, (expected, ran) in wanted.items():
        assert torch.equal(found[folder, "eager"], expected), folder
        assert found[folder, "rows"] == ran and found[folder, "new"].shape == (1, 12)
        for way in ("grouped_mm", "batched_mm"):
            torch.testing.assert_close(found[folder, way], expected, rtol=1e-4, atol=1e-4)


def test_thresholds_are_measured_without_the_experts_that_went_and_skip_half() -> None:
    model = moe_model("mixtral")
    layers = find_moe_layers(model.model)
    outcome = prune(model, Recipe.load("dynamic_skipping"), 0.34, windows=SEEN[:16])
    plain = prune(model, Recipe.load("expert_sparsity"), 0.34, windows=SEEN[:16])
    for (group, kept), (_, other) in zip(outcome.selection, plain.selection, strict=True):
        assert torch.equal(kept, other) and group.skip_below is not None
    with without_experts(model, plain.selection):
        wanted = median_thresholds(model, SEEN[:16], layers)
        assert wanted != median_thresholds(model, SEEN[:8], layers)
    assert {group.name: group.skip_below for group in outcome.selection.groups} == wanted
    with (
        without_experts(model, outcome.selection),
        counting_calls(layers) as calls,
        torch.no_grad(),
    ):
        model.model(SEEN[:16])
    first = next(iter(wanted))
    assert calls.shortened[first] / calls.tokens[first] == pytest.approx(0.5, abs=0.02)


def test_recipes_that_skip_are_held_to_what_can_skip() -> None:
    chosen = Recipe.load("dynamic_skipping")
    with pytest.raises(RecipeError, match="calibration text"):
        prune(moe_model("mixtral"), chosen, 0.0)
    one = moe_model("mixtral", num_experts_per_tok=1)
    with pytest.raises(ModelError, match="sends no token to several experts"):
        prune(one, chosen, 0.0, windows=SEEN[:4])
    fields = chosen.model_dump(by_alias=True) | {
        "unit": {"expert": {"skip": "median", "instead": "mean"}},
        **{"criterion": "N", "schedule": "one-shot"},
    }
    with pytest.raises(RecipeError, match="needs instead: others"):
        validated(Recipe, fields, "it.yaml")
