"""Query heads are scored and chosen as loops in numpy say, as many of each key-value head."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError, SelectionError
from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.groups import Group, linears_of
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import calibrate
from prunezero.models.observing.gradients import sequence_loss
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.outcome import Outcome
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import checked_groups, dense_sums, refuse_unequal_widths
from prunezero.pruning.rescoring import rescored
from prunezero.pruning.unit_allocation import Ladder
from prunezero.scoring.selection import lowest_first
from tests.models.test_heads import SHARING, model_of
from tests.pruning.test_neurons import chosen_of, group_of
from tests.pruning.test_refit import DAMPING, correlated, statistics_of, units_of
from tests.tiny_models import tiny_batches
from tests.unequal import unequal_model

Array = np.ndarray[Any, Any]
BATCHES = tiny_batches(4, 16)
HEAD = UNITS["head"]
# Eight heads of eight channels, four of each key-value head.
HEADS, SIZE, SHARED = 8, 8, 4


def recipe(**choices: object) -> Recipe:
    fields = {"name": "mine", "criterion": "M2", "unit": "head", "compare": "group"}
    return validated(Recipe, {**fields, **choices}, "mine.yaml")


def pruned(model: LanguageModel, chosen: Recipe, share: float) -> Outcome:
    layers = linears_of(checked_groups(model, chosen, share))
    known = calibrate(model, BATCHES, layers, dense_sums([chosen]))
    return prune(model, chosen, share, statistics=known, windows=BATCHES)


def readers(model: LanguageModel) -> list[Linear]:
    return [one for one in find_linears(model.model) if one.name.endswith("o_proj")]


def seen_by(model: LanguageModel, reader: Linear) -> Array:
    """What a matrix reads, float64 [sequences, tokens, in]."""
    seen: list[Tensor] = []
    handle = reader.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for window in BATCHES:
            model.model(window[None])
    handle.remove()
    return torch.cat(seen).double().numpy()


def mask_gradients(model: LanguageModel, reader: Linear) -> Array:
    """How the loss of each sequence changes with a factor on each head, [sequences, heads]."""
    factors = torch.ones(HEADS, requires_grad=True)
    handle = reader.module.register_forward_pre_hook(
        lambda module, args: (args[0] * factors.repeat_interleave(SIZE),)
    )
    found = []
    for window in BATCHES:
        loss = sequence_loss(model.model, window[None])
        found.append(torch.autograd.grad(loss, factors)[0].double().numpy())
    handle.remove()
    return np.stack(found)


def lost(x: Array, weight: Array, head: int) -> float:
    """What the outputs lose without a head, squared, per sequence: token by token."""
    place, total = slice(head * SIZE, (head + 1) * SIZE), 0.0
    for token in x.reshape(-1, HEADS * SIZE):
        total += float(((weight[:, place] @ token[place]) ** 2).sum())
    return total / len(BATCHES)


def expected(name: str, model: LanguageModel, reader: Linear) -> list[float]:
    x, weight = seen_by(model, reader), reader.weight.double().numpy()
    values: list[float] = []
    for head in range(HEADS):
        mine = x[..., head * SIZE : (head + 1) * SIZE]
        if name == "A":
            values.append(math.sqrt((mine**2).sum() / len(BATCHES)))
        elif name == "A2":
            values.append(float(np.linalg.norm(np.abs(mine).mean(1))))
        elif name in ("M", "M2"):
            gradient = mask_gradients(model, reader)[:, head]
            values.append(float(gradient.sum() if name == "M" else (gradient**2).sum()))
        elif name == "L00":
            values.append(lost(x, weight, head))
        else:
            values.append(refitted(x.reshape(-1, HEADS * SIZE), weight, head))
    return values


def refitted(rows: Array, weight: Array, head: int) -> float:
    """What a solver loses without a head, per sequence; damping counts as rows of the text."""
    damping = 0.01 * (rows**2).sum(0).mean()
    rows = np.concatenate([rows, math.sqrt(damping) * np.eye(rows.shape[1])])
    stays = np.arange(rows.shape[1]) // SIZE != head
    target = rows @ weight.T
    fitted = np.linalg.lstsq(rows[:, stays], target, rcond=None)[0]
    return float(((target - rows[:, stays] @ fitted) ** 2).sum()) / len(BATCHES)


@pytest.mark.parametrize("layout", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize("name", ["A", "A2", "M", "M2", "L00", "Lr0"])
def test_a_feature_of_a_head_is_what_brute_force_finds(name: str, layout: str) -> None:
    model = model_of(layout)
    chosen = recipe(criterion=name)
    groups = checked_groups(model, chosen, 0.25)
    known = calibrate(model, BATCHES, linears_of(groups), dense_sums([chosen]))
    for group, reader in zip(groups, readers(model), strict=True):
        found = HEAD.scores(
            group, chosen.criterion, known, damping=0.01, options=chosen.unit.options
        )
        wanted = expected(name, model, reader)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-3, atol=1e-6)


def slowly(scores: Array, gone: int) -> list[int]:
    """So many heads of each key-value head, the lowest first, by a loop."""
    found = []
    for first in range(0, HEADS, SHARED):
        inside = list(range(first, first + SHARED))
        for _ in range(gone):
            lowest = inside[0]
            for head in inside:
                if scores[head] < scores[lowest]:
                    lowest = head
            inside.remove(lowest)
            found.append(lowest)
    return sorted(found)


def removed(outcome: Outcome) -> list[list[int]]:
    return [(~kept).nonzero().flatten().tolist() for kept in outcome.selection.kept]


@pytest.mark.parametrize("layout", SHARING)
@pytest.mark.parametrize(("share", "each"), [(0.25, 1), (0.49, 1), (0.5, 2), (0.7, 2), (0.75, 3)])
def test_minitron_ranks_heads_inside_each_key_value_head(
    layout: str, share: float, each: int
) -> None:
    model, dense = model_of(layout), model_of(layout)
    outcome = pruned(model, Recipe.load("minitron_heads"), share)
    wanted = []
    for reader in readers(dense):
        x = np.abs(seen_by(dense, reader)).mean(1)
        channels = np.sqrt((x**2).sum(0)).reshape(HEADS, SIZE)
        wanted.append(slowly(np.linalg.norm(channels, axis=1), each))
    assert removed(outcome) == wanted
    assert outcome.sparsity_reached == 2 * each / HEADS


def in_strata(name: str, units: int, rest: int, strata: int, **limits: Any) -> Group:
    return replace(group_of(name, units, rest, least=1, **limits), strata=strata)


def test_of_each_stratum_the_lowest_go_and_ties_go_to_the_lower_index() -> None:
    groups = [in_strata("a", 8, 3, 2), in_strata("b", 6, 3, 3)]
    scores = {"a": [4.0, 1.0, 0.0, -0.0, 7.0, 9.0, 7.0, 7.0], "b": [2.0] * 6}
    assert chosen_of(groups, scores, 0.25, "group") == [[2, 4], []]
    assert chosen_of(groups, scores, 0.5, "group") == [[2, 3, 4, 6], [0, 2, 4]]
    assert chosen_of(groups, scores, 0.74, "group") == [[2, 3, 4, 6], [0, 2, 4]]
    assert chosen_of(groups, scores, 0.8, "group") == [[1, 2, 3, 4, 6, 7], [0, 2, 4]]
    many = [in_strata("a", 8, 3, 2, multiple_of=4)]
    assert chosen_of(many, scores, 0.74, "group") == [[2, 3, 4, 6]]
    order = lowest_first(torch.tensor(scores["a"]), 2).tolist()
    assert order == [2, 4, 3, 6, 1, 7, 0, 5]
    assert [order[: 2 * turn] for turn in (1, 2)] == [[2, 4], [2, 4, 3, 6]]


def turns(groups: list[Group], scores: dict[str, list[float]], budget: float) -> list[list[int]]:
    """Where all compete: the cheapest turn of all groups again and again, by a loop."""
    left = budget * sum(group.units for group in groups)
    inside = {
        group.name: [
            list(range(first, first + group.units // group.strata))
            for first in range(0, group.units, group.units // group.strata)
        ]
        for group in groups
    }
    gone: dict[str, list[int]] = {group.name: [] for group in groups}
    while True:
        offers = []
        for place, group in enumerate(groups):
            parts, values = inside[group.name], scores[group.name]
            if len(parts[0]) > 1 and group.strata <= left:
                lowest = [min(part, key=lambda head: (values[head], head)) for part in parts]
                mean = sum(values[head] for head in lowest) / group.strata
                offers.append((mean, place, lowest))
        if not offers:
            return [sorted(gone[group.name]) for group in groups]
        _, place, lowest = min(offers)
        for part, head in zip(inside[groups[place].name], lowest, strict=True):
            part.remove(head)
            gone[groups[place].name].append(head)
        left -= groups[place].strata


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.4, 0.5, 0.6])
def test_where_all_layers_compete_one_head_of_each_goes_at_a_time(share: float) -> None:
    groups = [in_strata("a", 8, 3, 2), in_strata("b", 6, 3, 2), in_strata("c", 8, 3, 2)]
    for seed in range(8):
        generator = np.random.default_rng(seed)
        # Few values, so that many are equal; quarters, so that means are exact.
        scores = {
            group.name: (generator.integers(0, 9, group.units) / 4).tolist() for group in groups
        }
        assert chosen_of(groups, scores, share, "model") == turns(groups, scores, share)
    with pytest.raises(SelectionError, match=r"at most 0\.7273 can"):
        chosen_of(groups, scores, 0.8, "model")


@pytest.mark.parametrize("bias", [False, True])
def test_one_head_of_each_goes_before_the_others_are_scored_anew(bias: bool) -> None:
    weight, inputs = correlated(3)
    group = replace(units_of(weight, 2), strata=2)
    channels = inputs.shape[1]
    seen = inputs - inputs.mean(0) if bias else inputs
    added = np.sqrt(DAMPING * (seen**2).sum(0).mean()) * np.eye(channels)
    rows = np.concatenate([seen, added])
    target = rows @ weight.T

    def loss(gone: list[int]) -> float:
        kept = ~np.isin(np.arange(channels) // 2, gone)
        fitted = np.linalg.lstsq(rows[:, kept], target, rcond=None)[0]
        return float(((target - rows[:, kept] @ fitted) ** 2).sum())

    order: list[int] = []
    parts = [[0, 1, 2], [3, 4, 5]]
    for _ in range(2):
        lowest = [min(part, key=lambda unit: loss([*order, unit])) for part in parts]
        for part, unit in zip(parts, lowest, strict=True):
            part.remove(unit)
        order += lowest
    scores = rescored(
        group,
        Criterion.parse("Lrb" if bias else "Lr0"),
        {"mlp": statistics_of(inputs)},
        damping=DAMPING,
        at_once=1,
    )
    assert lowest_first(scores, 2).tolist()[:4] == order


@pytest.mark.parametrize("word", ["slopes", "evolve"])
def test_a_measured_allocation_takes_one_head_of_each(word: str) -> None:
    numbers = {"steps": 4, "windows": 2}
    numbers |= {"evaluations": 12, "first_windows": 2} if word == "evolve" else {}
    outcome = pruned(model_of("llama"), recipe(allocate={word: numbers}, update="refit"), 0.4)
    counts = [kept.reshape(2, 4).sum(1).tolist() for kept in outcome.selection.kept]
    assert all(first == second for first, second in counts)
    # 0.4 of 16 heads are 6, in steps of two.
    assert outcome.selection.removed() == 6


def test_steps_of_an_allocation_take_one_unit_of_each_stratum_at_least() -> None:
    groups = [in_strata("a", 8, 3, 2), in_strata("b", 6, 3, 3)]
    ladder = Ladder.of(groups, 0.3, "units", 16)
    assert ladder.grain == 3.0 and list(map(list, ladder.counts)) == [[0, 2, 6], [0, 3]]


@pytest.mark.parametrize("choices", [{}, {"compare": "model"}, {"allocate": "slopes"}])
def test_what_will_be_left_is_tried_before_the_work(choices: dict[str, Any]) -> None:
    refuse_unequal_widths(model_of("llama"), recipe(**choices), 0.3)
    with pytest.raises(ModelError, match="keys and values of its own.*use unit kv_group"):
        refuse_unequal_widths(unequal_model("opt"), recipe(**choices), 0.3)


def test_less_than_one_head_of_each_stays_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"at most 0\.7500 can"):
        checked_groups(model_of("llama"), recipe(compare="model"), 0.8)
    # In a layer by itself the count is rounded to what may go.
    assert removed(pruned(model_of("llama"), recipe(), 0.9)) == removed(
        pruned(model_of("llama"), recipe(), 0.75)
    )


def test_several_steps_take_heads_of_each_every_time() -> None:
    chosen = recipe(schedule={"iterative": {"steps": 2, "anew": True}}, compare="model")
    outcome = pruned(model_of("qwen3"), chosen, 0.5)
    for kept in outcome.selection.kept:
        first, second = kept.reshape(2, 4).sum(1).tolist()
        assert first == second
    assert outcome.selection.removed() == 8
