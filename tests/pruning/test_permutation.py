from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunezero.errors import ScoreError, SelectionError
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing.permuting import Heads, PermutableChannels, find_permutables
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.walk import FORWARD_SUMS, BlockWalk
from prunezero.pruning.permutation import (
    Orders,
    channel_order,
    permute_block,
    retained_score,
)
from prunezero.pruning.recipes.choices import chosen
from prunezero.pruning.recipes.words import WORDS
from prunezero.scoring.request import Pattern
from prunezero.scoring.selection import select
from tests.tiny_models import BLOCKS, FAMILIES, tiny_batches, tiny_model

METHODS = ("heuristic", "assignment")
PERMUTATIONS = WORDS["permute"]
TWO_OF_FOUR = Pattern(2, 4)


def retained_by_numpy(scores: Tensor, pattern: Pattern, order: Any = None) -> float:
    values = scores.double().numpy()
    values = values if order is None else values[:, np.asarray(order)]
    groups = np.sort(values.reshape(len(values), -1, pattern.of), axis=2)
    return float(groups[:, :, pattern.of - pattern.keep :].sum())


def random_scores(seed: int, rows: int = 7, columns: int = 48, *, kind: str = "signed") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, columns, generator=generator)
    scores *= torch.randn(columns, generator=generator).exp()
    if kind == "tied":
        return scores.round()
    if kind == "dead columns":
        scores[:, ::3] = 0.0
        return scores.abs()
    return scores.abs() if kind == "positive" else scores


@pytest.mark.parametrize("keep, of", [(1, 2), (2, 4), (3, 4), (4, 8)])
def test_the_retained_score_is_that_of_the_mask(keep: int, of: int) -> None:
    pattern, scores = Pattern(keep, of), random_scores(0, rows=1030)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    kept = select(scores[:, order], pattern.sparsity, pattern=str(pattern))
    by_mask = float(scores[:, order].double()[kept].sum())
    assert retained_score(scores, pattern, order) == pytest.approx(by_mask, rel=1e-12)
    expected = retained_by_numpy(scores, pattern)
    assert retained_score(scores, pattern) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("keep, of", [(1, 2), (2, 4), (1, 4), (4, 8), (5, 6)])
@pytest.mark.parametrize("kind", ["signed", "positive", "tied", "dead columns"])
def test_the_retained_score_never_falls(kind: str, keep: int, of: int) -> None:
    pattern = Pattern(keep, of)
    for seed in range(6):
        scores = random_scores(seed, kind=kind)
        orders = {method: channel_order(scores, pattern, method) for method in PERMUTATIONS}
        kept = [retained_by_numpy(scores, pattern, orders[method]) for method in PERMUTATIONS]
        assert list(PERMUTATIONS) == ["none", "heuristic", "assignment"]
        assert kept[0] == retained_by_numpy(scores, pattern)
        assert kept == sorted(kept)
        for order in orders.values():
            assert order.dtype == torch.int64
            assert sorted(order.tolist()) == list(range(48))


def test_both_methods_raise_what_skewed_columns_retain() -> None:
    scores = random_scores(3, rows=64, columns=96, kind="positive")
    kept = [
        retained_by_numpy(scores, TWO_OF_FOUR, channel_order(scores, TWO_OF_FOUR, method))
        for method in PERMUTATIONS
    ]
    assert kept[0] < kept[1] < kept[2]


def test_columns_are_dealt_out_forwards_and_backwards() -> None:
    # Sums 0 to 7 cut into the runs 01, 23, 45, 67; the second and the fourth go backwards.
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
    order = channel_order(scores, TWO_OF_FOUR, "heuristic")
    assert order.tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    assert retained_by_numpy(scores, TWO_OF_FOUR, order) == 22.0


def best_of_all_orders(scores: Tensor) -> float:
    first_groups = combinations(range(8), 4)
    orders = [[*group, *sorted(set(range(8)) - set(group))] for group in first_groups]
    return max(retained_by_numpy(scores, TWO_OF_FOUR, order) for order in orders)


def share_of_the_possible(scores: Tensor, method: str) -> float:
    start, best = retained_by_numpy(scores, TWO_OF_FOUR), best_of_all_orders(scores)
    order = channel_order(scores, TWO_OF_FOUR, method)
    found = retained_by_numpy(scores, TWO_OF_FOUR, order)
    assert start <= found <= best + 1e-9
    return (found - start) / (best - start) if best > start else 1.0


def test_the_assignment_gains_most_of_what_any_order_of_eight_columns_could() -> None:
    cases = [random_scores(seed, rows=5, columns=8, kind="positive") for seed in range(40)]
    dealt = np.mean([share_of_the_possible(scores, "heuristic") for scores in cases])
    assigned = np.mean([share_of_the_possible(scores, "assignment") for scores in cases])
    assert dealt + 0.1 < assigned
    assert assigned > 0.7


@pytest.mark.parametrize("keep, of", [(2, 4), (1, 4), (3, 4), (4, 8)])
def test_no_single_place_of_the_last_group_position_can_be_assigned_better(
    keep: int, of: int
) -> None:
    from scipy.optimize import linear_sum_assignment

    pattern, scores = Pattern(keep, of), random_scores(5)
    order = channel_order(scores, pattern, "assignment").reshape(-1, of)
    groups = len(order)
    table = np.zeros((groups, groups))
    for source in range(groups):
        for target in range(groups):
            columns = [*order[target, :-1].tolist(), int(order[source, -1])]
            table[source, target] = retained_by_numpy(scores[:, columns], pattern)
    rows, columns_of_best = linear_sum_assignment(table, maximize=True)
    best = table[rows, columns_of_best].sum()
    assert np.trace(table) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_very_large_and_very_small_scores_are_ordered(method: str) -> None:
    scores = random_scores(4, kind="positive")
    scores[0] *= 1e37 / float(scores.max())
    order = channel_order(scores, TWO_OF_FOUR, method)
    assert retained_by_numpy(scores, TWO_OF_FOUR, order) >= retained_by_numpy(scores, TWO_OF_FOUR)


@pytest.mark.parametrize("method", METHODS)
def test_columns_stay_within_their_segment(method: str) -> None:
    scores = random_scores(2)
    order = channel_order(scores, TWO_OF_FOUR, method, segment=16)
    assert torch.equal(order // 16, torch.arange(48) // 16)
    for start in range(0, 48, 16):
        alone = channel_order(scores[:, start : start + 16], TWO_OF_FOUR, method)
        assert torch.equal(order[start : start + 16], alone + start)


@pytest.mark.parametrize("method", PERMUTATIONS)
def test_columns_that_cannot_gain_stay_where_they_are(method: str) -> None:
    assert channel_order(torch.ones(3, 12), TWO_OF_FOUR, method).tolist() == list(range(12))


def test_what_cannot_be_ordered_is_refused() -> None:
    scores = random_scores(0)
    with pytest.raises(SelectionError, match="did you mean 'heuristic'"):
        channel_order(scores, TWO_OF_FOUR, "heuristics")
    with pytest.raises(SelectionError, match="multiple of 5 columns but got 48"):
        channel_order(scores, Pattern(2, 5), "heuristic")
    with pytest.raises(SelectionError, match="multiple of 4 columns but got 6"):
        channel_order(scores, TWO_OF_FOUR, "heuristic", segment=6)
    with pytest.raises(SelectionError, match="multiple of 7 columns"):
        retained_score(scores, Pattern(3, 7))
    scores[0, 0] = float("nan")
    with pytest.raises(ScoreError, match="NaN"):
        channel_order(scores, TWO_OF_FOUR, "assignment")


def magnitude(layer: Linear) -> Tensor:
    return layer.weight.float().abs()


def permutables_of(model: LanguageModel, block: int) -> list[PermutableChannels]:
    inside = [layer for layer in find_linears(model.model) if layer.block == block]
    return find_permutables(model, inside)


def logits_of(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.model(tiny_batches()).logits
    return logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_permuted_model_computes_the_same_and_retains_more(family: str, method: str) -> None:
    model = tiny_model(family)
    dense = logits_of(model)
    for block in range(BLOCKS):
        permutables = permutables_of(model, block)
        consumers = [permutable.consumer for permutable in permutables]
        before = [retained_by_numpy(magnitude(layer), TWO_OF_FOUR) for layer in consumers]
        moved = permute_block(permutables, magnitude, TWO_OF_FOUR, chosen("permute", method))
        after = [retained_by_numpy(magnitude(layer), TWO_OF_FOUR) for layer in consumers]
        assert all(now >= then for now, then in zip(after, before, strict=True))
        assert sum(after) > sum(before)
        assert moved
    torch.testing.assert_close(logits_of(model), dense, rtol=1e-4, atol=1e-5)


def test_the_mask_of_a_permuted_layer_is_two_of_four_in_memory() -> None:
    model = tiny_model("llama")
    permutables = permutables_of(model, 0)
    permute_block(permutables, magnitude, TWO_OF_FOUR, chosen("permute", "assignment"))
    for permutable in permutables:
        weight = permutable.consumer.weight
        weight *= select(magnitude(permutable.consumer), 0.5, pattern="2:4")
        assert bool(((weight.reshape(-1, 4) != 0).sum(1) == 2).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_orders_bring_statistics_to_what_the_moved_layers_see(family: str) -> None:
    model = tiny_model(family)
    layers = [layer for layer in find_linears(model.model) if layer.block == 0]
    seen = BlockWalk(model, tiny_batches()).observe(0, layers, FORWARD_SUMS)
    choice = chosen("permute", "assignment")
    moved = permute_block(permutables_of(model, 0), magnitude, TWO_OF_FOUR, choice)
    assert moved.keys() <= seen.keys()
    seen_moved = BlockWalk(model, tiny_batches()).observe(0, layers, FORWARD_SUMS)
    for layer in layers:
        inputs, outputs = moved.get(layer.name, Orders(None, None))
        expected = seen[layer.name].permuted(inputs=inputs, outputs=outputs)
        for name, value in seen_moved[layer.name].sums.items():
            torch.testing.assert_close(value, expected.sums[name], rtol=1e-4, atol=1e-5)


def test_one_order_serves_all_query_heads_of_a_key_value_head() -> None:
    model = tiny_model("llama")
    permutables = permutables_of(model, 0)[:1]
    scores = magnitude(permutables[0].consumer)
    choice = chosen("permute", "heuristic")
    moved = permute_block(permutables, lambda layer: scores, TWO_OF_FOUR, choice)
    order = moved["model.layers.0.self_attn.o_proj"].inputs
    rows = moved["model.layers.0.self_attn.v_proj"].outputs
    assert order is not None and rows is not None
    for head in range(4):
        group = head // 2
        within = order[8 * head : 8 * head + 8] - 8 * head
        assert torch.equal(within, rows[8 * group : 8 * group + 8] - 8 * group)
        # The heads 0 and 1 read the key-value head 0, the heads 2 and 3 the other.
        both = torch.cat([scores[:, 16 * group :][:, :8], scores[:, 16 * group + 8 :][:, :8]])
        assert torch.equal(within, channel_order(both, TWO_OF_FOUR, "heuristic"))


def test_no_permutation_moves_nothing() -> None:
    model = tiny_model("gpt2")
    before = logits_of(model)
    permutables = permutables_of(model, 0)
    assert permute_block(permutables, magnitude, TWO_OF_FOUR, chosen("permute", "none")) == {}
    assert torch.equal(logits_of(model), before)


def test_a_pattern_that_does_not_divide_a_head_is_refused_before_anything_moves() -> None:
    model = tiny_model("llama")
    before = logits_of(model)
    permutables = permutables_of(model, 0)[::-1]
    assert permutables[1].heads == Heads(2, 2, 8)
    with pytest.raises(SelectionError, match="o_proj' can be permuted within heads of 8 channels"):
        permute_block(permutables, magnitude, Pattern(8, 16), chosen("permute", "heuristic"))
    assert torch.equal(logits_of(model), before)


def test_a_layer_may_read_the_channels_of_one_folding_and_make_those_of_another() -> None:
    torch.manual_seed(0)
    modules = [nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 8)]
    chain = nn.Sequential(modules[0], nn.ReLU(), modules[1], nn.ReLU(), modules[2])
    first, second, third = (
        Linear(name, m, 0, name) for name, m in zip("abc", modules, strict=True)
    )
    permutables = [
        PermutableChannels(second, ((first, 0),), None),
        PermutableChannels(third, ((second, 0),), None),
    ]
    inputs = torch.randn(5, 8)
    dense, before = chain(inputs).detach(), second.weight.clone()
    moved = permute_block(permutables, magnitude, TWO_OF_FOUR, chosen("permute", "assignment"))
    torch.testing.assert_close(chain(inputs).detach(), dense)
    columns, rows = moved["b"]
    assert columns is not None and rows is not None
    assert torch.equal(second.weight, before[rows][:, columns])
