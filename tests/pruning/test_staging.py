"""Stages give what their recipes give by hand, and a model that is sliced once by all of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError, RecipeError, SelectionError
from prunezero.models.anatomy.groups import linears_of
from prunezero.models.anatomy.linears import find_blocks, find_linears
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import sliced, slices_of
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.load import load_model
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning import prune as single
from prunezero.pruning.compare import RecipeRunner, compare
from prunezero.pruning.outcome import Outcome
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.staged import StagedRecipe, load_recipe, recipes_of
from prunezero.pruning.requirements import checked_groups, dense_sums
from prunezero.pruning.staging import (
    check_recipe,
    edit_of,
    prune,
    refuse_unequal_widths,
    staging_of,
)
from prunezero.pruning.testbed import Testbed, with_choices
from prunezero.report.export.saved_model import save_smaller
from tests.models.test_depth import deep_model, groups_of, without
from tests.report.test_smaller import bench
from tests.searching.testbed import tiny_testbed
from tests.tiny_models import HIDDEN, tiny_batches

BATCHES = tiny_batches(4, 16)
NEURONS: dict[str, Any] = {"unit": "neuron", "criterion": "A1", "compare": "group"}
CHANNELS: dict[str, Any] = {"unit": "channel", "criterion": "A2", "compare": "group"}
LAYERS: dict[str, Any] = {"unit": "layer", "criterion": "BI", "compare": "model"}
ATTENTIONS: dict[str, Any] = {**LAYERS, "unit": "attention"}


def staged(*stages: dict[str, Any], name: str = "mine") -> StagedRecipe:
    return validated(StagedRecipe, {"name": name, "stages": list(stages)}, f"{name}.yaml")


def published(name: str) -> StagedRecipe:
    found = load_recipe(name)
    assert isinstance(found, StagedRecipe)
    return found


def sums_of(model: LanguageModel, chosen: Recipe, share: float) -> dict[str, Any]:
    layers = linears_of(checked_groups(model, chosen, share))
    sums = dense_sums([chosen])
    return dict(calibrate(model, BATCHES, layers, sums)) if sums else {}


def by_stages(model: LanguageModel, chosen: StagedRecipe, share: float) -> Outcome:
    first = sums_of(model, chosen.recipes[0], 0.0)
    return prune(model, chosen, share, statistics=first, windows=BATCHES)


def kept_of(selection: Selection) -> dict[tuple[str, int], Tensor]:
    return {(group.kind, group.block): kept for group, kept in selection}


MASKED = {**NEURONS, "criterion": "M2"}
GRADIENTS = staged(MASKED, {**MASKED, "unit": "kv_group"})


@pytest.mark.parametrize(
    "chosen",
    [published("two_ssp"), published("minitron_width"), GRADIENTS],
    ids=["two_ssp", "minitron_width", "gradients"],
)
def test_stages_are_their_recipes_one_after_another_bit_for_bit(chosen: StagedRecipe) -> None:
    model, by_hand = (deep_model("llama", num_attention_heads=8) for _ in range(2))
    outcome = by_stages(model, chosen, 0.5)
    shares = staging_of(by_hand, chosen, 0.5).plan.shares
    found = Selection()
    for one, share in zip(chosen.recipes, shares, strict=True):
        # Of the model as it is by then, gradients too.
        seen = sums_of(by_hand, one, share)
        found |= single.prune(by_hand, one, share, statistics=seen, windows=BATCHES).selection
    expected, masks = kept_of(found), kept_of(outcome.selection)
    assert masks.keys() == expected.keys() and len(masks) > len(chosen.stages)
    assert all(torch.equal(masks[key], expected[key]) for key in masks)
    assert {kind for (kind, _), kept in masks.items() if not kept.all()} == {
        one.unit.word for one in chosen.recipes
    }
    for mine, other in zip(find_linears(model.model), find_linears(by_hand.model), strict=True):
        assert torch.equal(mine.weight, other.weight)


def test_two_ssp_removes_what_its_equations_say() -> None:
    model = deep_model("llama")
    outcome = by_stages(model, published("two_ssp"), 0.5)
    network = deep_model("llama").model
    # Neurons of the lowest mean magnitude: what the last matrix of each MLP reads.
    seen: dict[int, list[Tensor]] = {block: [] for block in range(3)}
    blocks: Any = find_blocks(network)
    for place, block in enumerate(blocks):
        block.mlp.down_proj.register_forward_pre_hook(
            lambda module, args, place=place: seen[place].append(args[0].abs().mean((0, 1)))
        )
    loss_of(network)
    kept = kept_of(outcome.selection)
    gone = {int((~kept["neuron", block]).sum()) for block in range(3)}
    assert len(gone) == 1
    for place, block in enumerate(blocks):
        values = torch.stack(seen[place][: len(BATCHES)]).double().mean(0).numpy()
        lowest = np.argsort(values, kind="stable")[: gone.copy().pop()]
        assert set(np.flatnonzero(~kept["neuron", place].numpy())) == set(lowest)
        block.mlp.down_proj.weight.data[:, lowest] = 0
    # Then attentions, those without which the model predicts best.
    left = [0, 1, 2]
    away: list[int] = []
    count = round(3 * 0.5 ** ((3 * 64 * 32) / (2 * 32 * 32 + 2 * 32 * 16) / 1.5))
    for _ in range(count):
        losses = {block: loss_of(without_attentions(network, [*away, block])) for block in left}
        lowest_block = min(left, key=lambda block: losses[block])
        away.append(lowest_block)
        left.remove(lowest_block)
    assert 0 < count < 3
    assert {block for block in range(3) if not bool(kept["attention", block])} == set(away)


def loss_of(network: Any) -> float:
    with torch.no_grad():
        losses = [float(network(ids[None], labels=ids[None]).loss) for ids in BATCHES]
    return sum(losses) / len(losses)


def without_attentions(network: Any, places: Sequence[int]) -> Any:
    other = copy.deepcopy(network)
    blocks: Any = find_blocks(other)
    for place in places:
        blocks[place].self_attn.o_proj.weight.data.zero_()
    return other


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.5, 0.8])
def test_two_ssp_shares_parameters_by_the_power_that_its_source_found(share: float) -> None:
    model, chosen = deep_model("llama", num_hidden_layers=8), published("two_ssp")
    plan = staging_of(model, chosen, share).plan
    mlp, attention = 3 * 64 * 32, 2 * 32 * 32 + 2 * 32 * 16
    total = 8 * (mlp + attention)
    attentions = round(8 * share ** (mlp / attention / 1.5)) if share else 0
    neurons = int((share * total - attentions * attention) / (8 * 3 * 32))
    counts = [int((~kept).sum()) for _, kept in plan.selection]
    assert (counts[:8], sum(counts[8:])) == ([neurons] * 8, attentions)
    assert plan.total == total
    assert plan.removed == attentions * attention + 8 * neurons * 3 * 32
    # One neuron of each MLP is the smallest step.
    assert 0 <= share * total - plan.removed < 8 * 3 * 32


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7])
def test_width_loses_one_share_of_every_axis_and_reaches_what_is_asked_for(share: float) -> None:
    model, chosen = deep_model("llama", num_attention_heads=8), published("minitron_width")
    outcome = by_stages(model, chosen, share)

    def left(neurons: int, pairs: int, channels: int) -> int:
        """Parameters of a block; heads of four numbers go by pairs, one of each of two keys."""
        return (32 - channels) * (3 * (64 - neurons) + 2 * 4 * 2 * (4 - pairs) + 2 * 4 * 2)

    enough = (1 - share) * left(0, 0, 0)
    # Heads have the largest steps, neurons the smallest.
    ratios = sorted({place / size for size in (64, 32, 4) for place in range(size)})
    pairs = max(int(r * 4) for r in ratios if left(int(r * 64), int(r * 4), int(r * 32)) >= enough)
    channels = max(int(r * 32) for r in ratios if left(int(r * 64), pairs, int(r * 32)) >= enough)
    neurons = max(int(r * 64) for r in ratios if left(int(r * 64), pairs, channels) >= enough)
    gone = {key: int((~one).sum()) for key, one in kept_of(outcome.selection).items()}
    assert gone["channel", 0] == channels
    for block in range(3):
        assert (gone["neuron", block], gone["head", block]) == (neurons, 2 * pairs)
    reached = 1 - left(neurons, pairs, channels) / left(0, 0, 0)
    assert outcome.sparsity_reached == pytest.approx(reached)
    # A neuron more of each MLP would be too many.
    assert 0 <= share - reached < 3 * (32 - channels) / left(0, 0, 0)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "opt", "phi3", "gpt_neox"])
def test_a_model_sliced_by_two_kinds_computes_what_zeros_do(layout: str) -> None:
    model, chosen = deep_model(layout), published("two_ssp")
    dense = model.model(BATCHES).logits
    outcome = by_stages(model, chosen, 0.5)
    simulated = model.model(BATCHES).logits
    before = sum(one.numel() for one in model.model.parameters())
    with sliced(model, outcome.selection):
        found = model.model(BATCHES).logits
        left = sum(one.numel() for one in model.model.parameters())
    torch.testing.assert_close(found, simulated, rtol=1e-5, atol=1e-5)
    assert float((simulated - dense).abs().max()) > 1e-2
    assert torch.equal(model.model(BATCHES).logits, simulated)
    assert sum(one.numel() for one in model.model.parameters()) == before
    # Norms of attentions stay where a folder has them, or leave with them.
    linear = staging_of(deep_model(layout), chosen, 0.5).plan.total
    gone = round(outcome.sparsity_reached * linear)
    assert 0 <= before - left - gone < 3 * 2 * HIDDEN


def test_a_narrower_model_is_one_of_its_configuration_with_the_numbers_that_stay() -> None:
    from transformers import AutoModelForCausalLM

    model, chosen = deep_model("llama", num_attention_heads=8), published("minitron_width")
    outcome = by_stages(model, chosen, 0.5)
    kept = kept_of(outcome.selection)
    stream = kept["channel", 0].nonzero().flatten()
    with edit_of(chosen).simulated(model, outcome.selection):
        simulated = model.model(BATCHES).logits
    configuration = copy.deepcopy(model.model.config)
    neurons = {block: kept["neuron", block].nonzero().flatten() for block in range(3)}
    rows = {
        block: kept["head", block].repeat_interleave(4).nonzero().flatten() for block in range(3)
    }
    assert 0 < len(rows[0]) < HIDDEN
    # Llama's own classes refuse a width that is no multiple of the heads; its modules do not mind.
    sizes = {"intermediate_size": len(neurons[0]), "num_attention_heads": len(rows[0]) // 4}
    for key, value in (sizes | {"hidden_size": len(stream), "head_dim": 4}).items():
        setattr(configuration, key, value)
    smaller = AutoModelForCausalLM.from_config(configuration).eval()
    tensors = {}
    for name, tensor in model.model.state_dict().items():
        block = int(name.split(".")[2]) if ".layers." in name else 0
        match name.rpartition(".weight")[0].rpartition(".")[2]:
            case "gate_proj" | "up_proj":
                tensors[name] = tensor[neurons[block]][:, stream]
            case "down_proj":
                tensors[name] = tensor[stream][:, neurons[block]]
            case "q_proj":
                tensors[name] = tensor[rows[block]][:, stream]
            case "o_proj":
                tensors[name] = tensor[stream][:, rows[block]]
            case _:
                tensors[name] = tensor[..., stream]
    smaller.load_state_dict(tensors)
    torch.testing.assert_close(smaller(BATCHES).logits, simulated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [[LAYERS, NEURONS], [NEURONS, LAYERS]], ids=["first", "last"])
def test_whole_layers_go_beside_neurons_of_those_that_stay(order: list[dict[str, Any]]) -> None:
    chosen = staged(*(one | {"share": {"part": {"of": 0.5}}} for one in order))
    model = deep_model("llama")
    refuse_unequal_widths(model, chosen, 0.7)
    outcome = by_stages(model, chosen, 0.7)
    simulated = model.model(BATCHES).logits
    kept = kept_of(outcome.selection)
    (gone,) = (block for block in range(3) if not bool(kept["layer", block]))
    # Of a layer that is gone nothing is chosen any more.
    assert (("neuron", gone) in kept) == (order[0] is NEURONS)
    with sliced(model, outcome.selection) as slices:
        assert slices.setting["num_hidden_layers"] == 2
        assert slices.setting["intermediate_size"] == int(kept["neuron", (gone + 1) % 3].sum())
        torch.testing.assert_close(model.model(BATCHES).logits, simulated, rtol=1e-5, atol=1e-5)
    left = sum(int((linear.weight != 0).sum()) for linear in find_linears(model.model))
    assert outcome.sparsity_reached == pytest.approx(
        1 - left / staging_of(deep_model("llama"), chosen, 0.7).plan.total
    )


@pytest.mark.parametrize("name", ["two_ssp", "minitron_width"])
def test_a_saved_folder_is_read_again_and_says_how_it_was_made(name: str, tmp_path: Path) -> None:
    chosen = published(name)
    # Heads that Llama's own configuration takes beside no width that is left.
    dense = deep_model("llama", num_attention_heads=8)
    dense.model.save_pretrained(tmp_path / "dense")
    tiny_testbed().language_model.tokenizer.save_pretrained(tmp_path / "dense")
    testbed = bench(load_model(str(tmp_path / "dense"), device="cpu"))
    model = testbed.language_model
    rows, selection = kept_on(testbed, chosen)
    told = save_smaller(testbed, chosen, rows, selection, tmp_path / "out")
    with sliced(model, selection):
        expected = model.model(BATCHES).logits
        parameters = sum(one.numel() for one in model.model.parameters())
    again = load_model(str(tmp_path / "out"), device="cpu")
    torch.testing.assert_close(again.model(BATCHES).logits, expected, rtol=1e-5, atol=1e-5)
    assert (told.costs.parameters, told.form.largest_difference) == (parameters, 0.0)
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == chosen
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"`{one.text}`" in card for one in chosen.formulas)
    assert f"Then the {chosen.recipes[-1].unit.several} with" in card


def kept_on(testbed: Testbed, chosen: StagedRecipe) -> tuple[list[dict[str, Any]], Selection]:
    layers = check_recipe(testbed.language_model, chosen, 0.5)
    runner = RecipeRunner(testbed, testbed.statistics(layers, dense_sums(chosen.recipes[:1])))
    rows = [runner.dense_row(("test",)), runner.row(chosen, 0.5, ("test",), keep=True)]
    assert runner.outcome is not None
    return rows, runner.outcome.selection


def test_a_table_holds_recipes_of_one_stage_and_of_several() -> None:
    testbed = tiny_testbed()
    names = ("minitron_neurons", "minitron_width", "two_ssp")
    recipes = [load_recipe(name) for name in names]
    layers = find_linears(testbed.language_model.model)
    before = [layer.weight.clone() for layer in layers]
    dense, one, width, ssp = compare(testbed, recipes, 0.4)
    assert one["unit"] == "neuron" and one["removed_of"] == "parameters of neurons"
    assert width["unit"] == "neuron+head+channel" and ssp["unit"] == "neuron+attention"
    assert ssp["formula"] == "neuron: A1; then attention: NLL"
    assert (ssp["compare"], ssp["statistics"]) == ("group, then model", "dense")
    assert ssp["signal"] == "oracle"
    for row in (width, ssp):
        assert row["removed_of"] == "parameters of all blocks" and 0.3 < row["removed"] <= 0.4
        assert row["parameters_without_embeddings"] < dense["parameters_without_embeddings"]
        assert math.isfinite(row["test_perplexity"])
    # The model is dense again behind each.
    assert all(torch.equal(one.weight, old) for one, old in zip(layers, before, strict=True))


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        (
            [NEURONS, {"criterion": "abs(W)"}],
            "stages remove whole units, and one of these has unit",
        ),
        ([NEURONS, NEURONS], "two stages have unit: neuron; one recipe of it with schedule"),
        ([CHANNELS, NEURONS], "unit: channel has to be the last stage, since no zeros stand"),
        ([LAYERS, ATTENTIONS], "unit: layer and unit: attention cannot be stages of one recipe"),
        ([ATTENTIONS, CHANNELS], "unit: attention and unit: channel cannot be stages"),
        ([NEURONS, {**NEURONS, "unit": "width"}], "unit: neuron and unit: width cannot be"),
        ([{**NEURONS, "compare": "model"}, CHANNELS], "use compare: group and allocate: uniform"),
        ([{**NEURONS, "unit": {"neuron": {"measure": "flops"}}}, ATTENTIONS], "counts flops"),
        ([NEURONS, {**ATTENTIONS, "share": "half"}], "'half' is no share"),
        ([{**NEURONS, "share": "power"}, {**ATTENTIONS, "share": "power"}], "takes the rest"),
        ([{**NEURONS, "share": {"part": {"of": 1.5}}}, ATTENTIONS], "less than 1"),
        ([NEURONS, {"recipe": "wandasp"}], "'wandasp' is no published recipe; did you mean"),
        ([NEURONS, {"recipe": "two_ssp"}], "two_ssp has stages of its own; list those"),
        ([NEURONS, {"recipe": "shortgpt", "unit": "mlp"}], "but not both, and beside recipe"),
        ([NEURONS, {**ATTENTIONS, "criterion": "BII"}], "stage attention, criterion: 'BII'"),
        ([NEURONS, {"stages": []}], "a stage has no stages of its own"),
        ([NEURONS], "a recipe has two stages or more, but got 1"),
    ],
)
def test_stages_that_cannot_be_composed_are_refused(
    stages: list[dict[str, Any]], sentence: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        staged(*stages)
    assert sentence in str(refused.value)


def test_where_one_recipe_is_needed_stages_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"two_ssp\.yaml is a recipe of several stages"):
        Recipe.load("two_ssp")
    with pytest.raises(RecipeError, match="pattern: 2:4 says nothing of unit: neuron"):
        with_choices(published("two_ssp"), pattern="2:4")
    walked = recipes_of(with_choices(published("two_ssp"), statistics="sequential"))
    assert [one.statistics for one in walked] == ["sequential", "sequential"]


def test_without_text_or_with_too_much_asked_nothing_begins() -> None:
    model = deep_model("llama")
    dense = model.model.state_dict()
    before = {name: one.clone() for name, one in dense.items()}
    later = staged({**NEURONS, "criterion": "row_sum(abs(W))"}, {**NEURONS, "unit": "kv_group"})
    with pytest.raises(RecipeError, match="its stage of unit kv_group looks at the model as"):
        prune(model, later, 0.3)
    least = {**NEURONS, "unit": {"neuron": {"least": 60}}}
    few = ATTENTIONS | {"share": {"part": {"of": 0.2}}}
    with pytest.raises(SelectionError, match=r"0\.6 of the parameters of all blocks cannot go by"):
        prune(model, staged(least, few), 0.6, windows=BATCHES)
    assert all(torch.equal(one, before[name]) for name, one in model.model.state_dict().items())


def test_edits_that_do_not_go_together_are_refused_in_memory_too() -> None:
    model = deep_model("llama")
    layers, attentions = (without(groups_of(model, kind), 0) for kind in ("layer", "attention"))
    with pytest.raises(ModelError, match="layer and attention do not leave one model together"):
        slices_of(model, layers | attentions)
    neurons = groups_of(model, "neuron")
    uneven = Selection(
        tuple(neurons), tuple(torch.arange(64) >= 3 * group.block for group in neurons)
    )
    with pytest.raises(ModelError, match="layers keep different numbers of some, which no"):
        slices_of(model, uneven | layers)
    # Beside attentions they may differ.
    assert slices_of(model, uneven | attentions).layers == {
        0: {"skip": ["attention"]},
        1: {"intermediate_size": 61},
        2: {"intermediate_size": 58},
    }
