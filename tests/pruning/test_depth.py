"""Parts of the depth are scored, chosen and removed as loops over hooks and numpy say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError, RecipeError, ScoreError, SelectionError
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_blocks, find_linears
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.budget import Budget
from prunezero.pruning.compare import RecipeRunner
from prunezero.pruning.costs import costs_without, model_costs
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.outcome import Outcome
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import checked_groups, dense_sums, refuse_unequal_widths
from prunezero.pruning.speed import speed_beside
from prunezero.scoring.statistics import BLOCK_SUMS
from prunezero.scoring.unit_features import noise
from tests.models.test_depth import deep_model, groups_of, odd_model
from tests.searching.testbed import tiny_testbed
from tests.tiny_models import HIDDEN, LAYOUTS, tiny_batches

BATCHES = tiny_batches(3, 12)
Numbers = np.ndarray[Any, Any]
# By layout: the modules of a block whose outputs are added to the stream.
ADDED = {
    "gpt2": ("attn", "mlp"),
    "opt": ("self_attn", "fc2"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt_neox": ("attention", "mlp"),
}


def recipe(**choices: object) -> Recipe:
    fields = {"name": "mine", "criterion": "BI", "unit": "layer", "compare": "model"}
    return validated(Recipe, {**fields, **choices}, "mine.yaml")


def first_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def added_by(model: LanguageModel, layout: str, block: int) -> list[torch.nn.Module]:
    names = ADDED.get(layout, ("self_attn", "mlp"))
    return [find_blocks(model.model)[block].get_submodule(name) for name in names]


def streams(model: LanguageModel, layout: str, ids: Tensor) -> dict[tuple[str, int], list[Numbers]]:
    """The stream before and behind each part [tokens, hidden], by kind and block."""
    seen: dict[Any, Numbers] = {}
    handles = []
    for block, module in enumerate(find_blocks(model.model)):
        parts = [module, *added_by(model, layout, block)]
        for key, part in zip(("layer", "attention", "mlp"), parts, strict=True):

            def keep(module: Any, args: Any, output: Any, key: Any = (key, block)) -> None:
                # Some layouts lay all tokens of all sequences one after another.
                seen[key] = first_of(output).reshape(-1, HIDDEN).double().numpy()
                if key[0] == "layer":
                    seen["before", key[1]] = args[0][0].double().numpy()

            handles.append(part.register_forward_hook(keep))
    with torch.no_grad():
        model.model(ids[None])
    for handle in handles:
        handle.remove()
    found = {}
    for block in range(len(find_blocks(model.model))):
        start = seen["before", block]
        middle = start if layout == "gpt_neox" else start + seen["attention", block]
        found["layer", block] = [start, seen["layer", block]]
        found["attention", block] = [start, start + seen["attention", block]]
        found["mlp", block] = [middle, middle + seen["mlp", block]]
    return found


def cosines(before: Numbers, behind: Numbers) -> Numbers:
    sizes = np.linalg.norm(before, axis=1) * np.linalg.norm(behind, axis=1)
    found: Numbers = (before * behind).sum(1) / sizes
    return found


def statistics_of(model: LanguageModel, kind: str, features: Sequence[str]) -> dict[str, Numbers]:
    """Scores of all groups of a kind by formulas of one feature each."""
    groups = groups_of(model, kind)
    row = UNITS[kind]
    known = row.observe(model, groups, BATCHES, BLOCK_SUMS)
    found = {}
    for name in features:
        chosen = recipe(criterion=name, unit=kind)
        values = [
            row.scores(one, chosen.criterion, known, damping=0.01, options=chosen.unit.options)
            for one in groups
        ]
        found[name] = np.array([float(value) for value in values])
    return found


@pytest.mark.parametrize("kind", ["attention", "mlp", "layer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_part_does_to_the_stream_is_what_hooks_see(layout: str, kind: str) -> None:
    model = deep_model(layout)
    found = statistics_of(model, kind, ["BI", "ANG", "REL"])
    expected: dict[str, list[float]] = {"BI": [], "ANG": [], "REL": []}
    sequences = [streams(model, layout, ids) for ids in BATCHES]
    for block in range(3):
        pairs = [one[kind, block] for one in sequences]
        angles = [np.arccos(cosines(*pair)[-1]) / np.pi for pair in pairs]
        sizes = [
            np.linalg.norm(behind - before, axis=1) / np.linalg.norm(before, axis=1)
            for before, behind in pairs
        ]
        expected["BI"].append(1 - float(np.mean([cosines(*pair) for pair in pairs])))
        expected["ANG"].append(float(np.mean(angles)))
        expected["REL"].append(float(np.mean(sizes)))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)


@contextmanager
def adding_nothing(
    model: LanguageModel, layout: str, gone: Sequence[tuple[str, int]]
) -> Iterator[None]:
    """Within it, hooks let parts add nothing, by kind and block."""
    handles = []
    for kind, block in gone:
        for place, module in enumerate(added_by(model, layout, block)):
            if kind in ("layer", ("attention", "mlp")[place]):

                def zeros(module: Any, args: Any, output: Any) -> Any:
                    nothing = torch.zeros_like(first_of(output))
                    return nothing if isinstance(output, Tensor) else (nothing, *output[1:])

                handles.append(module.register_forward_hook(zeros))
    yield
    for handle in handles:
        handle.remove()


def chances(model: LanguageModel, ids: Tensor) -> Numbers:
    with torch.no_grad():
        logits = model.model(ids[None]).logits[0].double().numpy()
    shifted = logits - logits.max(1, keepdims=True)
    found: Numbers = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found[:-1]


def loss(model: LanguageModel, layout: str, gone: Sequence[tuple[str, int]]) -> float:
    """Nats per predicted token without some parts."""
    with adding_nothing(model, layout, gone):
        losses = [-chances(model, ids)[np.arange(11), ids[1:].numpy()].mean() for ids in BATCHES]
    return float(np.mean(losses))


@pytest.mark.parametrize("kind", ["attention", "mlp", "layer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_and_distance_without_a_part_are_those_of_a_run_without_it(
    layout: str, kind: str
) -> None:
    model = deep_model(layout)
    found = statistics_of(model, kind, ["NLL", "KL"])
    dense = [chances(model, ids) for ids in BATCHES]
    for block in range(3):
        with adding_nothing(model, layout, [(kind, block)]):
            here = [chances(model, ids) for ids in BATCHES]
        distances = [
            (np.exp(one) * (one - other)).sum(1).mean()
            for one, other in zip(dense, here, strict=True)
        ]
        np.testing.assert_allclose(found["NLL"][block], loss(model, layout, [(kind, block)]), 1e-5)
        np.testing.assert_allclose(found["KL"][block], np.mean(distances), rtol=1e-3, atol=1e-6)


def test_a_part_is_seen_on_the_model_without_those_that_are_gone() -> None:
    model = deep_model("llama")
    groups = groups_of(model, "block")
    gone = [groups[1], groups[2]]
    known = UNITS["block"].observe(model, groups, BATCHES, BLOCK_SUMS, gone=gone)
    off = [("mlp", 0), ("attention", 1)]
    chosen = recipe(unit="block", criterion="NLL")
    for group, part in zip(groups, itertools.product(range(3), ("attention", "mlp")), strict=True):
        found = UNITS["block"].scores(
            group, chosen.criterion, known, damping=0.01, options=chosen.unit.options
        )
        without = loss(model, "llama", [*off, (part[1], part[0])])
        np.testing.assert_allclose(float(found), without, rtol=1e-5)
        if group in gone:
            assert float(known[group.name].sums["relative_sum"]) == 0.0


def gone_of(outcome: Outcome) -> list[str]:
    return [group.name for group, kept in outcome.selection if not kept.all()]


def greedily(
    model: LanguageModel, layout: str, parts: dict[str, tuple[str, int]], steps: int
) -> list[str]:
    """Names of what goes, one after another, by brute force."""
    gone: list[str] = []
    for _ in range(steps):
        losses = {
            name: loss(model, layout, [parts[other] for other in [*gone, name]])
            for name in parts
            if name not in gone
        }
        gone.append(min(losses, key=lambda name: losses[name]))
    return gone


@pytest.mark.parametrize("layout", ["llama", "gpt_neox"])
def test_sleb_takes_layers_as_brute_force_does_but_for_the_first_and_last(layout: str) -> None:
    model = deep_model(layout, num_hidden_layers=6)
    names = [group.name for group in groups_of(model, "layer")]
    parts = {name: ("layer", block) for block, name in enumerate(names) if 0 < block < 5}
    expected = greedily(model, layout, parts, 3)
    outcome = prune(model, Recipe.load("sleb"), 0.5, windows=BATCHES)
    assert sorted(gone_of(outcome)) == sorted(expected)
    assert outcome.sparsity_reached == 0.5


def test_block_pruner_takes_sub_blocks_as_brute_force_does_until_the_next_is_too_much() -> None:
    model = deep_model("llama")
    groups = groups_of(model, "block")
    parts = {
        group.name: (kind, group.block)
        for group, kind in zip(groups, itertools.cycle(("attention", "mlp")), strict=False)
    }
    costs = {group.name: group.cost["parameters"] for group in groups}
    order = greedily(model, "llama", parts, 6)
    allowed = int(0.5 * sum(costs.values()))
    spent = np.cumsum([costs[name] for name in order])
    expected = order[: int((spent <= allowed).sum())]
    outcome = prune(model, Recipe.load("block_pruner"), 0.5, windows=BATCHES)
    assert sorted(gone_of(outcome)) == sorted(expected) and expected
    # Within one unit of what was asked for.
    assert allowed - max(costs.values()) < outcome.selection.removed("parameters") <= allowed
    for group, kept in outcome.selection:
        for member in group.members:
            assert bool(member.linear.weight.any()) == bool(kept)


def test_shortgpt_takes_the_layers_that_turn_the_stream_least() -> None:
    model = deep_model("llama", num_hidden_layers=6)
    influence = statistics_of(model, "layer", ["BI"])["BI"]
    expected = [f"model.layers.{block}" for block in sorted(np.argsort(influence)[:2])]
    assert gone_of(prune(model, Recipe.load("shortgpt"), 0.34, windows=BATCHES)) == expected


def test_shortened_llama_takes_the_layers_without_which_text_is_predicted_best() -> None:
    model = deep_model("llama", num_hidden_layers=6)
    losses = [loss(model, "llama", [("layer", block)]) for block in range(6)]
    expected = [f"model.layers.{block}" for block in sorted(np.argsort(losses)[:2])]
    outcome = prune(model, Recipe.load("shortened_llama"), 0.34, windows=BATCHES)
    assert gone_of(outcome) == expected


def test_gromov_takes_the_neighbours_behind_which_the_last_token_has_turned_least() -> None:
    model = deep_model("llama", num_hidden_layers=6)
    sequences = [streams(model, "llama", ids) for ids in BATCHES]
    for share, count in ((0.2, 1), (0.5, 3), (0.99, 5), (0.1, 0)):
        angles = []
        for start in range(6 - count + 1 if count else 0):
            ends = [
                (one["layer", start][0], one["layer", start + count - 1][1]) for one in sequences
            ]
            angles.append(np.mean([np.arccos(cosines(*pair)[-1]) for pair in ends]))
        first = int(np.argmin(angles)) if angles else 0
        expected = [f"model.layers.{block}" for block in range(first, first + count)]
        copied = deep_model("llama", num_hidden_layers=6)
        assert gone_of(prune(copied, Recipe.load("gromov"), share, windows=BATCHES)) == expected


def test_formulas_combine_features_and_costs() -> None:
    model = deep_model("gpt2")
    groups = groups_of(model, "block")
    values = statistics_of(model, "block", ["BI", "REL", "NLL"])
    costs = np.array([group.cost["parameters"] for group in groups])
    found = statistics_of(model, "block", ["BI*REL", "NLL/PARAMS", "NLL/FLOPS", "RND"])
    np.testing.assert_allclose(found["BI*REL"], values["BI"] * values["REL"], rtol=1e-5)
    np.testing.assert_allclose(found["NLL/PARAMS"], values["NLL"] / costs, rtol=1e-5)
    weights = [sum(one.linear.weight.numel() for one in group.members) for group in groups]
    np.testing.assert_allclose(
        found["NLL/FLOPS"], values["NLL"] / (2 * np.array(weights)), rtol=1e-5
    )
    assert len(set(found["RND"])) == 6 and 0 <= min(found["RND"]) and max(found["RND"]) < 1
    other = prune(deep_model("llama"), Recipe.load("random_layers"), 0.34)
    seeds = {
        tuple(
            gone_of(prune(deep_model("llama"), recipe(unit={"layer": {"seed": seed}}, **RND), 0.34))
        )
        for seed in range(6)
    }
    assert tuple(gone_of(other)) in seeds and len(seeds) > 1


RND: dict[str, Any] = {"criterion": "RND"}


def scored(values: dict[str, float]) -> Any:
    def scores_of(groups: Sequence[Group], gone: Sequence[Group]) -> list[float]:
        return [values[group.name] for group in groups]

    return scores_of


def test_scores_that_rank_nothing_are_refused_whichever_way_they_choose() -> None:
    for schedule in ("one-shot", "greedy", "span"):
        with pytest.raises(ScoreError, match=r"every layer has the same score .* ranks nothing"):
            prune(deep_model("llama"), recipe(criterion="PARAMS", schedule=schedule), 0.34)
    model = deep_model("llama")
    model.model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(Exception, match="the losses of model.layers.0 hold NaN or infinite"):
        prune(model, recipe(criterion="NLL"), 0.34, windows=BATCHES)


def test_a_budget_that_what_stays_does_not_leave_is_refused_before_the_work() -> None:
    model = deep_model("llama")
    kept = recipe(criterion="NLL", unit={"layer": {"protect_first": 1, "protect_last": 1}})
    with pytest.raises(SelectionError, match=r"at most 0\.3333 can"):
        checked_groups(model, kept, 0.5)
    with pytest.raises(RecipeError, match="recipe mine: criterion NLL needs calibration text"):
        prune(model, kept, 0.3)
    groups = groups_of(model, "layer")
    row = recipe(schedule="greedy").schedule.row
    chosen = row.choose(groups, scored({"": 0.0}), Budget(0.1, measure="parameters"))
    assert not any((~one).any() for one in chosen.kept)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"criterion": "row_norm(W)"}, "feature W says nothing of part of the depth x number"),
        ({"criterion": "BI/matrix_sum(BI)"}, "matrix_sum looks at more of part of the depth"),
        ({"compare": "row"}, "compare: row says nothing of unit: layer; known: model"),
        ({"pattern": "2:4"}, "pattern: 2:4 says nothing of unit: layer"),
        (
            {"update": "bias"},
            "update: bias is for unit head, kv_group, neuron, weight, width, not for layer",
        ),
        ({"schedule": "span", "unit": "mlp"}, "schedule: span is for unit layer, not for mlp"),
        (
            {"schedule": "iterative"},
            "schedule: iterative is for unit head, kv_group, neuron, weight, width",
        ),
        ({"unit": {"layer": {"keep": 1}}}, "'layer.keep' is not a known number"),
        ({"unit": "weight", "criterion": "abs(W)*BI"}, "feature BI says nothing of output x input"),
        (
            {"unit": "weight", "criterion": "abs(W)", "schedule": "greedy"},
            "schedule: greedy is for unit attention, block, layer, mlp, not for weight",
        ),
    ],
)
def test_what_says_nothing_of_the_depth_is_refused_by_name(
    choices: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(**choices)


def test_sequential_statistics_are_refused() -> None:
    with pytest.raises(RecipeError, match="ranks all layers before the first is pruned"):
        checked_groups(deep_model("llama"), recipe(statistics="sequential"), 0.34)


@pytest.mark.parametrize("unit", ["attention", "mlp", "block", "layer"])
def test_what_could_not_be_saved_is_refused_before_the_work(unit: str) -> None:
    ends = {"protect_first": 1} if unit == "layer" else {}
    chosen = recipe(unit={unit: ends})
    for family in ("llama", "gpt_neox"):
        refuse_unequal_widths(deep_model(family), chosen, 0.34)
    if unit != "layer":
        with pytest.raises(ModelError, match=r"no class of its own can .*\(--padded\)"):
            refuse_unequal_widths(odd_model("Falcon"), chosen, 0.34)


def test_a_testbed_measures_a_shorter_model_and_is_dense_again() -> None:
    testbed = tiny_testbed("llama")
    dense = [one.weight.clone() for one in find_linears(testbed.language_model.model)]
    chosen = recipe(schedule="greedy", criterion="NLL")
    runner = RecipeRunner(testbed, testbed.statistics([], dense_sums([chosen])))
    before = runner.dense_row(("test",))
    row = runner.row(chosen, 0.5, ("test",))
    assert (row["units"], row["units_removed"], row["removed"]) == (2, 1, 0.5)
    assert row["removed_of"] == "parameters of layers" and row["signal"] == "oracle"
    assert row["test_perplexity"] != before["test_perplexity"]
    after = find_linears(testbed.language_model.model)
    assert all(torch.equal(one.weight, old) for one, old in zip(after, dense, strict=True))


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("layout", ["llama", "gpt_neox", "opt"])
@pytest.mark.parametrize("unit", ["attention", "block", "layer"])
def test_costs_and_speed_are_those_of_the_model_without_what_goes(layout: str, unit: str) -> None:
    model, ids = deep_model(layout), BATCHES[:1]
    groups = groups_of(model, unit)
    gone = groups[:2] if unit == "block" else groups[:1]
    kept = tuple(torch.zeros(1, dtype=torch.bool) for _ in gone)
    selection = Selection(tuple(gone), kept)
    dense, found = model_costs(model, ids), costs_without(model, selection, ids)
    weights = sum(member.rest for group in gone for member in group.members)
    # Attention also multiplies queries, keys and values of 12 tokens.
    products = 2 * 2 * HIDDEN * 12
    assert dense.flops - found.flops == 2 * weights + products
    less = dense.parameters - found.parameters
    assert weights <= less <= selection.removed("parameters")
    assert found.kv_bytes < dense.kv_bytes
    assert model_costs(model, ids) == dense
    for speed in speed_beside(model, selection, ids, turns=1):
        assert speed.read > 0 and speed.written > 0


def test_a_number_of_chance_is_of_the_place_and_the_seed_for_units_of_every_kind() -> None:
    model = deep_model("llama")
    for unit in ("layer", "neuron"):
        (group, *_) = UNITS[unit].groups(find_linears(model.model), model)
        drawn = []
        for seed in (0, 0, 1):
            chosen = recipe(criterion="RND", unit={unit: {"seed": seed}})
            drawn.append(
                UNITS[unit].scores(
                    group, chosen.criterion, {}, damping=0.01, options=chosen.unit.options
                )
            )
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        expected = [noise(group.name, group.units, seed) for seed in (0, 0, 1)]
        assert all(torch.equal(*pair) for pair in zip(drawn, expected, strict=True))
