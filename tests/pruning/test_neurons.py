"""Neurons are scored, chosen and removed as slow references in numpy say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import (
    CriterionError,
    ModelError,
    OutputError,
    PruneZeroError,
    RecipeError,
    ScoreError,
    SelectionError,
)
from prunezero.formula.criterion import Criterion
from prunezero.formula.domains import DOMAINS
from prunezero.models.anatomy.groups import Group, Member, linears_of, unit_cost
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.budget import Budget
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.outcome import Outcome
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe, published_of
from prunezero.pruning.requirements import checked_groups, dense_sums, refuse_unequal_widths
from prunezero.pruning.streamed import checked_sums
from prunezero.pruning.testbed import with_choices
from prunezero.report.export.kernel import kernel_page
from prunezero.report.runs.warm_start import rules_of
from prunezero.scoring.statistics import Statistics
from prunezero.searching.spaces.space import SearchSpace
from tests.models.test_depth import odd_model
from tests.models.test_mlp import MEMBERS, noisy
from tests.tiny_models import BLOCKS, LAYOUTS, tiny_batches, tiny_model

NEURON = UNITS["neuron"]
BATCHES = tiny_batches(4, 16)
# A share whose count rounds down: 12 of 64, 25 of 128.
SHARE = 0.2


def recipe(**choices: object) -> Recipe:
    fields = {"name": "mine", "criterion": "row_norm(W)", "unit": "neuron", "compare": "group"}
    return validated(Recipe, {**fields, **choices}, "mine.yaml")


def consumer(model: LanguageModel, layout: str, block: int) -> Linear:
    ending = f".{block}.{MEMBERS[layout][-1][0]}"
    (found,) = (one for one in find_linears(model.model) if one.name.endswith(ending))
    return found


def activations(model: LanguageModel, linear: Linear) -> np.ndarray[Any, Any]:
    """What a linear map reads for every calibration token, float64 [tokens, in]."""
    seen: list[Tensor] = []
    handle = linear.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for window in BATCHES:
            model.model(window[None])
    handle.remove()
    return np.concatenate([one.reshape(-1, one.shape[-1]).double().numpy() for one in seen])


def gone_of(scores: np.ndarray[Any, Any], count: int) -> set[int]:
    return set(np.argsort(scores, kind="stable")[:count].tolist())


def removed(outcome: Outcome) -> list[set[int]]:
    return [set((~kept).nonzero().flatten().tolist()) for kept in outcome.selection.kept]


def pruned(model: LanguageModel, chosen: Recipe, share: float = SHARE) -> Outcome:
    layers = linears_of(checked_groups(model, chosen, share))
    known = calibrate(model, BATCHES, layers, dense_sums([chosen]))
    return prune(model, chosen, share, statistics=known, windows=BATCHES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wanda_sp_removes_what_a_loop_over_pruned_blocks_removes(layout: str) -> None:
    outcome = pruned(noisy(tiny_model(layout)), Recipe.load("wanda_sp"))
    slow, expected = noisy(tiny_model(layout)), []
    for block in range(BLOCKS):
        reader = consumer(slow, layout, block)
        x, weight = activations(slow, reader), reader.weight.double().numpy()
        scores = np.sqrt((x**2).sum(0) / len(BATCHES)) * np.abs(weight).mean(0)
        gone = gone_of(scores, int(SHARE * len(scores)))
        reader.weight[:, sorted(gone)] = 0.0
        expected.append(gone)
    assert removed(outcome) == expected
    count = len(expected[0])
    assert outcome.sparsity_reached == count / outcome.selection.groups[0].units
    assert outcome.selection.removed() == BLOCKS * count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_magnitude_removes_the_smallest_columns_and_all_that_belongs_to_them(layout: str) -> None:
    model, dense = noisy(tiny_model(layout)), noisy(tiny_model(layout))
    outcome = pruned(model, Recipe.load("neuron_magnitude"))
    for block in range(BLOCKS):
        weight = consumer(dense, layout, block).weight.double().numpy()
        gone = gone_of(np.linalg.norm(weight, axis=0), int(SHARE * weight.shape[1]))
        assert removed(outcome)[block] == gone
    before = {one.name: one for one in find_linears(dense.model)}
    zeros = set()
    for group, kept in outcome.selection:
        for member in group.members:
            zeros.add(member.linear.name)
            part, old = (
                member.oriented(one.weight) for one in (member.linear, before[member.linear.name])
            )
            assert not part[~kept].any() and torch.equal(part[kept], old[kept])
            bias, old_bias = member.linear.bias, before[member.linear.name].bias
            if bias is not None and old_bias is not None:
                is_row = member.role == "producer"
                assert torch.equal(bias, old_bias * (kept if is_row else 1.0))
    for one in find_linears(model.model):
        if one.name not in zeros:
            assert torch.equal(one.weight, before[one.name].weight)


def test_flap_standardises_each_mlp_and_keeps_the_mean_in_a_bias() -> None:
    model, dense = noisy(tiny_model("llama")), noisy(tiny_model("llama"))
    outcome = pruned(model, Recipe.load("flap"))
    scores, means, weights = [], [], []
    for block in range(BLOCKS):
        reader = consumer(dense, "llama", block)
        x, weight = activations(dense, reader), reader.weight.double().numpy()
        fluctuation = x.var(0) * (weight**2).sum(0)
        scores.append((fluctuation - fluctuation.mean()) / fluctuation.std())
        means.append(x.mean(0))
        weights.append(weight)
    gone = gone_of(np.concatenate(scores), int(SHARE * 64 * BLOCKS))
    for block in range(BLOCKS):
        mine = sorted(place - 64 * block for place in gone if place // 64 == block)
        assert removed(outcome)[block] == set(mine)
        bias = consumer(model, "llama", block).bias
        assert bias is not None
        expected = weights[block][:, mine] @ means[block][mine]
        np.testing.assert_allclose(bias.numpy(), expected, rtol=1e-4, atol=1e-5)
    for group, kept in outcome.selection:
        for member in group.members[:-1]:
            assert member.linear.bias is not None and not member.linear.bias[~kept].any()
    assert len(removed(outcome)[0]) != len(removed(outcome)[1])


def test_members_are_scored_by_themselves_and_combined_as_the_recipe_says() -> None:
    model = noisy(tiny_model("phi3"))
    (group, *_) = checked_groups(model, recipe(), SHARE)
    fused = group.members[0].linear.weight.double().numpy()
    down = group.members[-1].linear.weight.double().numpy()
    parts = [np.linalg.norm(one, axis=1) for one in (fused[:64], fused[64:], down.T)]
    chosen = {"consumer": parts[2:], "producers": parts[:2], "all": parts}
    how: dict[str, Any] = {"sum": np.sum, "mean": np.mean, "max": np.max}
    for members, values in chosen.items():
        for combine, function in how.items():
            numbers = {"members": members, "combine": combine}
            one = recipe(unit={"neuron": numbers})
            found = NEURON.scores(group, one.criterion, {}, damping=0.01, options=one.unit.options)
            np.testing.assert_allclose(found.numpy(), function(values, axis=0), rtol=1e-5)
            assert validated(Recipe, {**one.model_dump(by_alias=True)}, "again") == one


def test_units_read_what_their_consumer_saw_whichever_member_is_scored() -> None:
    model = noisy(tiny_model("gpt2"))
    chosen = recipe(
        criterion="A_mean**2 + A_var + row_sum(abs(W))", unit={"neuron": {"members": "producers"}}
    )
    groups = checked_groups(model, chosen, SHARE)
    known = calibrate(model, BATCHES, linears_of(groups), dense_sums([chosen]))
    for group in groups:
        made, reader = group.members[0].linear, group.members[-1].linear
        x = activations(model, reader)
        expected = (x**2).mean(0) + np.abs(made.weight.double().numpy()).sum(1)
        found = NEURON.scores(
            group, chosen.criterion, known, damping=0.01, options=chosen.unit.options
        )
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def group_of(name: str, units: int, rest: int, **limits: Any) -> Group:
    """Units of `rest` weights each, in one matrix that reads them."""
    module = torch.nn.Linear(units, rest, bias=False)
    member = Member(Linear(name, module, 0, name), "consumer", units=units)
    return Group(name, 0, "neuron", (units,), (member,), cost=unit_cost([member]), **limits)


def chosen_of(
    groups: list[Group], scores: dict[str, list[float]], share: float, compare: str
) -> list[list[int]]:
    """Places of the units that go."""
    budget = Budget(share, measure="parameters")
    found = NEURON.select(
        groups, lambda group: torch.tensor(scores[group.name]), budget, compare=compare
    )
    return [(~kept).nonzero().flatten().tolist() for kept in found.kept]


def test_counts_are_exact_and_ties_go_to_the_lower_index() -> None:
    groups = [group_of("a", 10, 3), group_of("b", 4, 3)]
    scores = {"a": [5.0, 1.0, 1.0, 1.0, -0.0, 0.0, 7.0, 8.0, 9.0, 9.0], "b": [2.0, 2.0, 2.0, 2.0]}
    # 0.3 of 10 is 3, though not in binary.
    assert chosen_of(groups, scores, 0.3, "group") == [[1, 4, 5], [0]]
    assert chosen_of(groups, scores, 0.0, "group") == [[], []]
    # 0.5 of 14 units of one cost: the seven lowest of all.
    assert chosen_of(groups, scores, 0.5, "model") == [[1, 2, 3, 4, 5], [0, 1]]


def test_a_model_loses_what_units_cost_and_each_group_keeps_its_least() -> None:
    groups = [group_of("cheap", 8, 1), group_of("dear", 4, 10)]
    scores = {"cheap": [float(one) for one in range(10, 18)], "dear": [0.0, 1.0, 20.0, 30.0]}
    # A quarter of 48 parameters is 12: one dear unit, for a second one would be too much, and then
    # the cheap ones for which there is room.
    assert chosen_of(groups, scores, 0.25, "model") == [[0, 1], [0]]
    assert chosen_of(groups, scores, 0.46, "model") == [[0, 1], [0, 1]]
    limited = [group_of("cheap", 8, 1), group_of("dear", 4, 10, least=4)]
    assert chosen_of(limited, scores, 0.1, "model") == [[0, 1, 2, 3], []]
    with pytest.raises(SelectionError, match=r"at most 0\.1667 can"):
        chosen_of(limited, scores, 0.25, "model")
    # What the dear ones cannot lose the cheap ones do, as long as there are any.
    assert chosen_of(limited, scores, 0.1, "group") == [[0, 1, 2, 3], []]
    with pytest.raises(SelectionError, match=r"at most 0\.1667 can"):
        chosen_of(limited, scores, 0.5, "group")
    with pytest.raises(SelectionError, match="leaves 2, but at least 4 have to stay"):
        chosen_of(limited[1:], scores, 0.5, "group")


@pytest.mark.parametrize("compare", ["group", "model"])
def test_what_stays_is_a_multiple_of_what_kernels_want(compare: str) -> None:
    groups = [group_of("a", 16, 2, multiple_of=8), group_of("b", 12, 2, multiple_of=8)]
    scores = {"a": [float(one) for one in range(16)], "b": [100.0 + one for one in range(12)]}
    # 0.3 of them are 4 and 3, or 8 of all; what is no multiple rounds to more that stay.
    expected = {"group": [[], []], "model": [list(range(8)), []]}
    assert chosen_of(groups, scores, 0.3, compare) == expected[compare]
    assert chosen_of(groups, scores, 0.5, "group") == [list(range(8)), [0, 1, 2, 3]]


def test_scores_that_rank_nothing_are_refused_by_the_name_of_the_mlp() -> None:
    model = tiny_model("llama")
    for layer in find_linears(model.model, targets=["down_proj"]):
        layer.weight.fill_(1.0)
    with pytest.raises(ScoreError, match=r"gives every neuron of model\.layers\.0\.mlp the same"):
        pruned(model, recipe())
    with pytest.raises(PruneZeroError, match="model.layers.0.mlp: the sum 'input_square_sum' was"):
        prune(tiny_model("llama"), recipe(criterion="A"), SHARE, statistics={})


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (
            {"criterion": "abs(W)"},
            "one value per element of unit x part, but one per row is needed",
        ),
        ({"criterion": "row_sum(W*X)"}, "feature X says nothing of unit x part"),
        ({"criterion": "col_sum(abs(W))"}, "one value per column of unit x part"),
        ({"compare": "row"}, "compare: row says nothing of unit: neuron; known: group, model"),
        ({"pattern": "2:4"}, "pattern: 2:4 says nothing of unit: neuron"),
        ({"criteria": {"mlp": "row_sum(W)"}}, "unit: neuron has one criterion for all"),
        ({"allocate": "owl"}, "allocate: owl is for unit weight, not for neuron"),
        ({"allocate": "heavy_tail"}, "allocate: heavy_tail is for unit weight"),
        ({"update": "obs"}, "update: obs is for unit weight"),
        ({"update": "admm"}, "update: admm is for unit weight"),
        ({"update": "dsnot"}, "update: dsnot is for unit weight"),
        ({"permute": "heuristic"}, "permute: heuristic is for unit weight"),
        ({"unit": {"neuron": {"member": "all"}}}, "did you mean 'members'"),
        ({"unit": {"neuron": {"least": 0}}}, "greater than or equal to 1"),
        ({"unit": {"weight": {"least": 2}}}, "'weight.least' is not a known number"),
    ],
)
def test_what_says_nothing_of_neurons_is_refused_by_name(
    choices: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(**choices)


def test_features_of_units_say_nothing_of_weights() -> None:
    with pytest.raises(RecipeError, match="feature A says nothing of output x input"):
        validated(Recipe, {"name": "mine", "criterion": "abs(W)*A"}, "mine.yaml")
    with pytest.raises(CriterionError, match="feature A_var says nothing"):
        DOMAINS["matrix"].refuse(Criterion.parse("A_var"))
    fields = SearchSpace.load("formulas").model_dump(mode="json")
    with pytest.raises(RecipeError, match="feature A says nothing of output x input"):
        validated(SearchSpace, {**fields, "terminals": ["abs(W)", "A"]}, "space.yaml")


@pytest.mark.parametrize("chosen", published_of("neuron"), ids=lambda one: one.name)
def test_what_works_on_weights_alone_refuses_before_the_work(
    chosen: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="has unit: neuron, but a kernel file scores single"):
        kernel_page(chosen)
    with pytest.raises(RecipeError, match="unit neuron takes rows and columns out of several"):
        checked_sums(chosen, BATCHES)
    with pytest.raises(RecipeError, match="a search writes formulas of single weights"):
        rules_of(chosen.name, tmp_path)


def test_widths_that_differ_are_refused_where_no_class_can_have_them() -> None:
    for family in ("llama", "gpt_neox"):
        for choices in ({}, {"compare": "model"}, {"targets": [r"re:layers\.0\."]}):
            refuse_unequal_widths(tiny_model(family), recipe(**choices), SHARE)
    with pytest.raises(ModelError, match="no class of its own can be written for type 'falcon'"):
        refuse_unequal_widths(odd_model("Falcon"), recipe(compare="model"), SHARE)


def test_a_statistic_of_the_consumer_is_what_counts() -> None:
    model = tiny_model("llama")
    (group, *_) = checked_groups(model, recipe(), SHARE)
    reader = group.members[-1].linear
    statistics = Statistics.empty(["input_square_sum"], *reader.weight.shape)
    statistics.add_inputs(torch.arange(64.0)[None].flip(1))
    chosen = recipe(criterion="A")
    found = NEURON.scores(
        group,
        chosen.criterion,
        {reader.name: statistics},
        damping=0.01,
        options=chosen.unit.options,
    )
    assert found.tolist() == [float(63 - place) for place in range(64)]
    assert with_choices(chosen, statistics="sequential").statistics == "sequential"
