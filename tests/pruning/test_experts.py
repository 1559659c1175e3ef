"""Experts go by formulas and by subsets: what stays is what a slow reference says."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError, RecipeError, ScoreError, SelectionError
from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.routing import without_experts
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.load import LanguageModel
from prunezero.models.observing.routing import routing_statistics
from prunezero.models.observing.subset_losses import SubsetLosses, mixture_of
from prunezero.pruning.expert_subsets import best_subset, exchanged, one_by_one, subsets_of
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.outcome import Outcome
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe, published_of
from prunezero.pruning.recipes.word_options import Subsets
from prunezero.pruning.unit_scores import is_super
from tests.models.test_routing import state, without
from tests.models.test_routing_statistics import inputs_of, output_of
from tests.tiny_models import tiny_batches
from tests.tiny_moe import EXPERTS, MIXTURES, moe_groups, moe_model

WINDOWS = tiny_batches(3, 12)
NAMES = [recipe.name for recipe in published_of("expert")]


def recipe(criterion: str = "GF/N", **choices: object) -> Recipe:
    fields = {"name": "mine", "criterion": criterion, "unit": "expert", "compare": "group"}
    return validated(Recipe, {**fields, **choices}, "mine.yaml")


def pruned(model: LanguageModel, chosen: Recipe, sparsity: float = 0.34) -> Outcome:
    return prune(model, chosen, sparsity, windows=WINDOWS)


def gone(selection: Selection) -> list[list[int]]:
    return [(~kept).nonzero().flatten().tolist() for _, kept in selection]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_takes_a_share_of_experts_and_leaves_weights_alone(name: str) -> None:
    model, again = moe_model("mixtral"), moe_model("mixtral")
    before, chosen = state(model), Recipe.load(name)
    outcome = pruned(model, chosen)
    assert outcome.selection.removed() == 4 and outcome.sparsity_reached == pytest.approx(1 / 3)
    if chosen.compare == "group" and chosen.allocate.is_usual:
        assert [len(one) for one in gone(outcome.selection)] == [2, 2]
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert gone(pruned(again, chosen).selection) == gone(outcome.selection)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_lowest_of_each_mixture_go_as_many_of_each_group_of_its_router(family: str) -> None:
    model = moe_model(family)
    groups = moe_groups(model)
    known = routing_statistics(model, groups, WINDOWS, ["gated_norm_sum", "routed_count"])
    outcome = pruned(model, recipe())
    for group, kept in outcome.selection:
        sums = known[group.name].sums
        mean = (sums["gated_norm_sum"] / sums["routed_count"].clamp(min=1)).tolist()
        parts = [range(start, start + EXPERTS // group.strata) for start in (0, 3)]
        parts = parts[: group.strata] if group.strata > 1 else [range(EXPERTS)]
        lowest = [
            at for part in parts for at in sorted(part, key=mean.__getitem__)[: 2 // len(parts)]
        ]
        assert sorted(lowest) == (~kept).nonzero().flatten().tolist()


def test_experts_of_all_mixtures_compete_and_each_keeps_as_many_as_a_token_goes_to() -> None:
    model = moe_model("mixtral")
    groups = moe_groups(model)
    known = routing_statistics(model, groups, WINDOWS, ["soft_sum"])
    outcome = pruned(model, recipe("SOFT", compare="model"), 0.5)
    scores = torch.cat([known[group.name].sums["soft_sum"] for group in groups])
    order = scores.argsort(stable=True).tolist()
    left, wanted = [EXPERTS, EXPERTS], list[int]()
    for at in order:
        if len(wanted) < EXPERTS and left[at // EXPERTS] > 2:
            wanted.append(at)
            left[at // EXPERTS] -= 1
    found = torch.cat([~kept for _, kept in outcome.selection]).nonzero().flatten().tolist()
    assert found == sorted(wanted)


def test_later_mixtures_see_the_text_without_what_went_before_them() -> None:
    model = moe_model("mixtral")
    first, second = moe_groups(model)
    outcome = pruned(model, recipe("F1", statistics="sequential"))
    (_, kept), (_, later) = outcome.selection
    dense = routing_statistics(model, [first], WINDOWS, ["norm_sum"])[first.name]
    lowest = dense.sums["norm_sum"].argsort(stable=True)[:2]
    assert sorted(lowest.tolist()) == (~kept).nonzero().flatten().tolist()
    with without_experts(model, Selection((first,), (kept,))):
        seen = routing_statistics(model, [second], WINDOWS, ["norm_sum"])[second.name]
    lowest = seen.sums["norm_sum"].argsort(stable=True)[:2]
    assert sorted(lowest.tolist()) == (~later).nonzero().flatten().tolist()


def test_an_expert_that_no_token_goes_to_is_the_first_to_go() -> None:
    model, few = moe_model("mixtral"), WINDOWS[:1, :4]
    groups = moe_groups(model)
    known = routing_statistics(model, groups, few, ["routed_count"])
    unrouted = [known[one.name].sums["routed_count"] == 0 for one in groups]
    dead = [one.nonzero().flatten().tolist() for one in unrouted]
    assert any(dead)
    others = {"aimer", "expert_random", "seer", "expert_sparsity_progressive", "reap_evolved"}
    for name in set(NAMES) - others:
        lost = gone(prune(model, Recipe.load(name), 0.17, windows=few).selection)
        for (one,), unseen in zip(lost, dead, strict=True):
            assert one in unseen or not unseen, name


def test_the_expert_whose_weights_are_most_alike_in_size_goes_first_without_any_text() -> None:
    model = moe_model("mixtral")
    for group, flat in zip(moe_groups(model), (4, 1), strict=True):
        layer = mixture_of(group)
        for stack in (layer.up, layer.down):
            stack[flat] = stack[flat].sign() / 8
    outcome = prune(model, Recipe.load("aimer"), 0.17)
    assert gone(outcome.selection) == [[4], [1]]


def test_super_experts_go_last() -> None:
    largest = {f"layers.{at}": torch.full((2, EXPERTS), 1.0) for at in range(4)}
    largest["layers.1"][1, 3] = largest["layers.3"][0, 2] = 50.0
    found = {name: is_super(name, largest).nonzero().flatten().tolist() for name in largest}
    # Not in the last quarter of the mixtures, whatever an activation is there.
    assert found == {"layers.0": [], "layers.1": [], "layers.2": [], "layers.3": []}
    largest["layers.3"][0, 2] = 1.0
    assert is_super("layers.1", largest).nonzero().flatten().tolist() == [3]
    model = moe_model("mixtral")
    (group, _), layer = moe_groups(model), None
    layer = mixture_of(group)
    # Huge inside, and nothing comes out.
    layer.up[2] *= 30
    layer.down[2] *= 1e-4
    plain = pruned(model, recipe("GF/N"), 0.17).selection
    guarded = pruned(model, recipe("GF/N", unit={"expert": {"guard": "super"}}), 0.17).selection
    assert gone(plain)[0] == [2] and gone(guarded)[0] != [2]
    assert gone(plain)[1] == gone(guarded)[1]


def test_a_mean_output_stands_for_an_expert_that_went() -> None:
    model = moe_model("qwen3_moe")
    groups, ids = moe_groups(model), WINDOWS[:1]
    outcome = pruned(model, Recipe.load("mone"))
    (group, kept), *_ = outcome.selection
    layer = mixture_of(group)
    totals, counts = torch.zeros(EXPERTS, 32, dtype=torch.float64), torch.zeros(EXPERTS)
    for window in WINDOWS:
        for token in inputs_of(model, layer, window[None]):
            for expert in layer.router(token[None])[2][0].tolist():
                totals[expert] += output_of(layer, token, expert)[0]
                counts[expert] += 1
    tokens, wanted = inputs_of(model, layer, ids), []
    for token in tokens:
        _, weights, chosen = (one[0] for one in layer.router(token[None]))
        answer = torch.zeros(32, dtype=torch.float64)
        for weight, expert in zip(weights.tolist(), chosen.tolist(), strict=True):
            mean = totals[expert] / counts[expert]
            answer += weight * (output_of(layer, token, expert)[0] if kept[expert] else mean)
        wanted.append(answer)
    before, dense = state(model), model.model(ids).logits
    with without_experts(model, outcome.selection), torch.no_grad():
        found = layer.module(tokens[None])[0]
    torch.testing.assert_close(found.double(), torch.stack(wanted), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.model(ids).logits, dense)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    with pytest.raises(ModelError, match="which no smaller model of qwen3_moe does"):
        UNITS["expert"].edit.remove(model, outcome.selection)
    assert [one.means for one in groups] == [None, None]


def test_protected_mixtures_keep_all_of_their_experts() -> None:
    chosen = recipe("N", unit={"expert": {"protect_first": 1}})
    assert [len(one) for one in gone(pruned(moe_model(), chosen, 0.25).selection)] == [0, 3]


@pytest.mark.parametrize(
    ("choices", "sparsity", "said"),
    [
        ({}, 0.7, r"0\.7 of the 6 experts of .* leaves 2|at least 2 have to stay"),
        ({"compare": "model"}, 0.9, "some of each group have to stay"),
        ({"targets": ["q_proj"]}, 0.3, "experts are stacks; use protect_first"),
    ],
)
def test_what_cannot_go_is_refused_before_the_text_is_read(
    choices: dict[str, object], sparsity: float, said: str
) -> None:
    model = moe_model("mixtral")
    if not choices:
        sparsity = 0.9
    with pytest.raises((SelectionError, RecipeError), match=said):
        prune(model, recipe("N", **choices), sparsity, windows=None)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"schedule": "subsets"}, "use criterion: LOO and compare: group"),
        ({"schedule": "subsets", "criterion": "LOO", "compare": "model"}, "compare: group"),
        ({"schedule": "greedy"}, "is for unit attention, block, layer, mlp, not for expert"),
        ({"update": "bias"}, "update: bias is for unit"),
        ({"recover": "lora"}, "recover: lora is for unit"),
        ({"criterion": "A"}, "feature A says nothing of expert x number"),
        ({"compare": "row"}, "compare: row says nothing of unit: expert"),
        ({"allocate": "evolve", "statistics": "sequential"}, "needs statistics: dense and"),
        ({"allocate": "slopes", "schedule": "subsets", "criterion": "LOO"}, "schedule: one-shot"),
        (
            {"unit": {"expert": {"guard": "super"}}, "statistics": "sequential"},
            "they need statistics: dense",
        ),
        (
            {"unit": {"expert": {"instead": "mean"}}, "criterion": "LOO", "schedule": "subsets"},
            "and schedule: one-shot",
        ),
    ],
)
def test_a_recipe_for_experts_is_held_to_what_speaks_of_them(
    choices: dict[str, object], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(**choices)  # type: ignore[arg-type]


def test_experts_that_all_score_alike_are_refused_by_name() -> None:
    with pytest.raises(ScoreError, match=r"gives every expert of model\.layers\.0\.mlp the same"):
        pruned(moe_model(), recipe("PARAMS"))


# ---- how many of each mixture


def divergence(model: LanguageModel, selection: Selection, windows: Tensor) -> float:
    """KL to the dense model, in nats per token whose next one is told."""
    total, count = 0.0, 0
    for ids in windows:
        dense = model.model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        with without_experts(model, selection):
            now = model.model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        total += float((dense.exp() * (dense - now)).sum())
        count += len(now)
    return total / count


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_the_evolved_numbers_are_those_that_brute_force_finds(family: str) -> None:
    model, held_out = moe_model(family, seed=1), tiny_batches(4, 12, seed=5)
    groups, numbers = moe_groups(model), {"evaluations": 24, "offspring": 4}
    before = state(model)
    chosen = recipe(
        allocate={"evolve": {**numbers, "first_windows": 4, "windows": 4, "proposals": "random"}}
    )
    known = routing_statistics(model, groups, WINDOWS, ["gated_norm_sum", "routed_count"])
    order = []
    for group in groups:
        sums = known[group.name].sums
        means = (sums["gated_norm_sum"] / sums["routed_count"].clamp(min=1)).tolist()
        order.append(sorted(range(EXPERTS), key=means.__getitem__))
    losses = {}
    for first in range(5):
        counts = (first, 4 - first)
        kept = [torch.ones(EXPERTS, dtype=torch.bool) for _ in groups]
        for mask, ranked, count in zip(kept, order, counts, strict=True):
            mask[ranked[:count]] = False
        losses[counts] = divergence(model, Selection(tuple(groups), tuple(kept)), held_out)
    found = prune(model, chosen, 0.34, windows=WINDOWS, held_out=held_out).selection
    best = min(losses, key=losses.__getitem__)
    assert tuple(map(len, gone(found))) == best
    for ranked, went, count in zip(order, gone(found), best, strict=True):
        assert sorted(ranked[:count]) == went
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_evolved_numbers_take_as_many_of_each_group_of_a_router_and_spare_the_protected() -> None:
    words = {"evolve": {"evaluations": 6, "first_windows": 2, "windows": 2}}
    model = moe_model("deepseek_v3", num_hidden_layers=3)
    for group, kept in pruned(model, recipe(allocate=words), 0.34).selection:
        halves = kept.reshape(group.strata, -1).sum(1).tolist()
        assert halves[0] == halves[1] and int(kept.sum()) >= group.least
    chosen = recipe(allocate="slopes", unit={"expert": {"protect_first": 1}})
    assert list(map(len, gone(pruned(moe_model(), chosen, 0.25).selection))) == [0, 3]


# ---- subsets


def frobenius(model: LanguageModel, group: Group, kept: Tensor) -> float:
    """The loss of a subset, by really running the layer without the others."""
    layer, total = mixture_of(group), 0.0
    for ids in WINDOWS:
        tokens = inputs_of(model, layer, ids[None])
        dense = layer.module(tokens[None])[0].double()
        with without_experts(model, Selection((group,), (kept,))):
            total += float((layer.module(tokens[None])[0].double() - dense).norm())
    return total


def losses_of(model: LanguageModel, group: Group) -> SubsetLosses:
    tokens = [inputs_of(model, mixture_of(group), ids[None]) for ids in WINDOWS]
    return SubsetLosses.of(model, group, tokens)


def subset(*went: int) -> Tensor:
    kept = torch.ones(EXPERTS, dtype=torch.bool)
    kept[list(went)] = False
    return kept


@pytest.mark.parametrize("family", MIXTURES)
def test_losses_of_several_subsets_are_those_of_the_layer_really_run_without_experts(
    family: str,
) -> None:
    model = moe_model(family)
    group = moe_groups(model)[-1]
    known, every = losses_of(model, group), [(), (0, 3), (2, 5), (1, 4)]
    found = known.losses(torch.stack([subset(*went) for went in every])).tolist()
    assert found[0] == 0.0
    for went, loss in zip(every[1:], found[1:], strict=True):
        assert loss == pytest.approx(frobenius(model, group, subset(*went)), rel=1e-6)
        assert loss == pytest.approx(float(known.losses(subset(*went)[None])), rel=1e-12)


def test_losses_may_be_counted_from_outputs_on_another_text() -> None:
    model = moe_model("qwen3_moe")
    group = moe_groups(model)[0]
    layer, generator = mixture_of(group), torch.Generator().manual_seed(5)
    tokens = torch.randn(2, 9, 32, generator=generator)
    wanted = list(torch.randn(2, 9, 32, generator=generator).double())
    known = SubsetLosses.of(model, group, list(tokens), wanted)
    found = known.losses(torch.stack([subset(), subset(1, 2)])).tolist()
    for went, loss in (((), found[0]), ((1, 2), found[1])):
        with without_experts(model, Selection((group,), (subset(*went),))), torch.no_grad():
            now = layer.module(tokens).double()
        slow = sum(float((a - b).norm()) for a, b in zip(now, wanted, strict=True))
        assert loss == pytest.approx(slow, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_trying_all_subsets_is_at_least_as_good_as_exchanges_and_these_as_one_by_one(
    seed: int,
) -> None:
    model = moe_model("qwen3_moe", seed=seed)
    (group, _) = moe_groups(model)
    losses = losses_of(model, group).losses

    def loss(kept: Tensor) -> float:
        return float(losses(kept[None]))

    greedy = one_by_one(group, losses, 3)
    better = exchanged(group, losses, greedy, 100)
    best = best_subset(group, losses, 3, Subsets())
    every = {went: loss(subset(*went)) for went in combinations(range(EXPERTS), 3)}
    lowest = min(every, key=every.__getitem__)
    assert torch.equal(best, subset(*lowest))
    assert loss(best) <= loss(better) <= loss(greedy)
    assert loss(greedy) < sum(every.values()) / len(every)
    assert subsets_of(group, 3) == len(every) == 20
    assert torch.equal(best_subset(group, losses, 3, Subsets(most=19)), better)
    assert torch.equal(best_subset(group, losses, 3, Subsets(most=19, swaps=0)), greedy)


def test_exchanges_leave_a_place_that_one_by_one_cannot() -> None:
    (group, _) = moe_groups(moe_model())
    known = {(0,): 1.0, (1,): 2.0, (2,): 2.0, (1, 2): 0.5}

    def losses(subsets: Tensor) -> Tensor:
        gone = (tuple((~kept).nonzero().flatten().tolist()) for kept in subsets)
        return torch.tensor([known.get(one, 5.0) for one in gone])

    greedy = one_by_one(group, losses, 2)
    assert (~greedy).nonzero().flatten().tolist() == [0, 1]
    found = exchanged(group, losses, greedy, 10)
    assert (~found).nonzero().flatten().tolist() == [1, 2]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_each_mixture_loses_the_subset_that_brute_force_finds(family: str) -> None:
    model = moe_model(family)
    groups = moe_groups(model)
    for group, kept in pruned(model, Recipe.load("expert_sparsity")).selection:
        allowed = [
            went
            for went in combinations(range(EXPERTS), 2)
            if group.strata == 1 or (went[0] < 3 <= went[1])
        ]
        best = min(allowed, key=lambda went: frobenius(model, group, subset(*went)))
        assert tuple((~kept).nonzero().flatten().tolist()) == best
    assert len(groups) in (1, 2)


def test_the_progressive_way_equals_a_slow_walk_over_the_pruned_prefix() -> None:
    model = moe_model("qwen3_moe", seed=3)
    groups = moe_groups(model)
    chosen, dense = Selection(), {}
    for group in groups:
        layer = mixture_of(group)
        tokens = [inputs_of(model, layer, ids[None]) for ids in WINDOWS]
        dense[group.name] = [layer.module(one[None])[0].double() for one in tokens]
    for group in groups:
        layer = mixture_of(group)
        with without_experts(model, chosen):
            tokens = [inputs_of(model, layer, ids[None]) for ids in WINDOWS]
        losses = {}
        for went in combinations(range(EXPERTS), 2):
            with without_experts(model, without([group], *went)):
                now = [layer.module(one[None])[0].double() for one in tokens]
            pairs = zip(now, dense[group.name], strict=True)
            losses[went] = sum(float((one - other).norm()) for one, other in pairs)
        best = min(losses, key=losses.__getitem__)
        chosen |= without([group], *best)
    found = pruned(model, Recipe.load("expert_sparsity_progressive")).selection
    assert gone(found) == gone(chosen)
    layerwise = pruned(model, Recipe.load("expert_sparsity")).selection
    assert gone(layerwise)[0] == gone(found)[0]


def test_too_many_subsets_of_a_router_with_groups_are_refused_before_the_text_is_seen() -> None:
    chosen = recipe("LOO", schedule={"subsets": {"most": 3}})
    with pytest.raises(SelectionError, match="9 subsets of 6 experts .* more than 3"):
        pruned(moe_model("deepseek_v3"), chosen)


def test_units_of_other_kinds_say_nothing_of_mixtures() -> None:
    assert UNITS["expert"].whole_model and not UNITS["expert"].edit.zeros_suffice
