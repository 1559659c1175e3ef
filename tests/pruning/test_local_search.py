"""Swaps of units against least squares on every pair, solved by brute force."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import FactorizationError, RecipeError
from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.groups import Group, linears_of
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.local_search import improved, swapped
from prunezero.pruning.outcome import Outcome
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import checked_groups, dense_sums
from prunezero.pruning.rescoring import rescored
from prunezero.pruning.testbed import with_choices
from tests.models.test_mlp import noisy
from tests.pruning.test_neurons import BATCHES, activations
from tests.pruning.test_refit import DAMPING, IN, correlated, recipe, statistics_of, units_of
from tests.tiny_models import BLOCKS, tiny_model

Array = np.ndarray[Any, Any]


def loss_of(weight: Array, inputs: Array, kept: Array, width: int = 1) -> float:
    """What is lost of all outputs, damping included, when only these units are left, refitted."""
    columns = inputs.shape[1]
    rows = np.concatenate([inputs, np.sqrt(DAMPING * (inputs**2).sum(0).mean()) * np.eye(columns)])
    stays, target = kept.repeat(width), rows @ weight.T
    fitted = np.linalg.lstsq(rows[:, stays], target, rcond=None)[0]
    return float(((target - rows[:, stays] @ fitted) ** 2).sum())


def neighbours(kept: Array, strata: int = 1) -> Iterator[Array]:
    """All selections that one swap makes of one, in the order of what goes, then what returns."""
    size = len(kept) // strata
    for goes in np.flatnonzero(kept):
        for returns in np.flatnonzero(~kept):
            if goes // size == returns // size:
                other = kept.copy()
                other[goes], other[returns] = False, True
                yield other


def searched(weight: Array, inputs: Array, kept: Array, width: int, strata: int) -> Array:
    """The selection at which swaps end, each the best of all that were tried."""
    while True:
        best = min(neighbours(kept, strata), key=lambda one: loss_of(weight, inputs, one, width))
        now = loss_of(weight, inputs, kept, width)
        if loss_of(weight, inputs, best, width) > now * (1 - 1e-8):
            return kept
        kept = best


def all_but(order: torch.Tensor, count: int) -> torch.Tensor:
    kept = torch.ones(len(order), dtype=torch.bool)
    kept[order[:count]] = False
    return kept


def single(count: int) -> Group:
    """Units of one channel each, whatever their matrix holds."""
    group = units_of(np.ones((1, IN)), 1)
    return replace(group, members=(replace(group.members[0], units=count),), shape=(count,))


def swaps_of(weight: Array, inputs: Array, kept: Array, group: Group, most: int = 100) -> Array:
    gram = torch.from_numpy(inputs.T @ inputs)
    found = swapped(
        torch.from_numpy(weight), torch.from_numpy(kept), group, gram, damping=DAMPING, most=most
    )
    return found.numpy()


@pytest.mark.parametrize(("width", "strata"), [(1, 1), (2, 1), (3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_search_goes_where_the_best_of_all_pairs_leads_and_no_pair_is_left(
    width: int, strata: int, bias: bool
) -> None:
    ways = 0
    for seed in range(4):
        weight, inputs = correlated(seed)
        units = IN // width
        group = replace(units_of(weight, width), strata=strata)
        # The first half of each stratum, whatever that loses.
        kept = (np.arange(units) % (units // strata)) < units // strata // 2
        seen = inputs - inputs.mean(0) if bias else inputs
        chosen = recipe(
            unit={"neuron": {"swaps": 100}}, update=["refit", "bias"] if bias else "refit"
        )
        (found,) = improved(
            Selection((group,), (torch.from_numpy(kept),)), chosen, {"mlp": statistics_of(inputs)}
        ).kept
        assert found.tolist() == searched(weight, seen, kept, width, strata).tolist()
        least = loss_of(weight, seen, found.numpy(), width)
        others = neighbours(found.numpy(), strata)
        assert all(loss_of(weight, seen, other, width) > least * (1 - 1e-8) for other in others)
        ways += int((found.numpy() != kept).any())
    assert ways >= 3


def test_a_search_loses_no_more_than_where_it_began() -> None:
    """What goes at once loses more than what goes one by one, in the mean, and swaps mend both."""
    criterion, half, ratios = Criterion.parse("Lr0"), IN // 2, []
    for seed in range(8):
        weight, inputs = correlated(seed)
        group, known = units_of(weight, 1), {"mlp": statistics_of(inputs)}
        first = recipe(unit="neuron", criterion="Lr0").unit
        once = first.row.scores(group, criterion, known, damping=DAMPING, options=first.options)
        greedy = rescored(group, criterion, known, damping=DAMPING, at_once=1)
        losses = []
        for scores in (once, greedy):
            kept = all_but(scores.argsort(stable=True), half).numpy()
            mended = swaps_of(weight, inputs, kept, group)
            losses.append([loss_of(weight, inputs, one) for one in (kept, mended)])
            assert losses[-1][1] <= losses[-1][0] * (1 + 1e-12)
            assert mended.sum() == half
        ratios.append(losses[1][0] / losses[0][0])
    assert float(np.mean(ratios)) < 0.9


def test_equal_swaps_go_by_the_lower_index_and_a_swap_that_gains_nothing_is_none() -> None:
    """On inputs that do not lean on each other what is lost are the columns that go."""
    weight = np.zeros((1, 6))
    weight[0] = [1.0, 1.0, 3.0, 2.0, 2.0, 2.0]
    inputs, group = np.eye(6), single(6)
    kept = np.array([True, True, True, False, False, False])
    one = swaps_of(weight, inputs, kept, group, most=1)
    assert one.tolist() == [False, True, True, True, False, False]
    two = swaps_of(weight, inputs, kept, group)
    assert two.tolist() == [False, False, True, True, True, False]
    assert swaps_of(weight, inputs, two, group).tolist() == two.tolist()


def test_what_an_earlier_step_took_does_not_return() -> None:
    weight, inputs = correlated(2)
    group, known = units_of(weight, 1), {"mlp": statistics_of(inputs)}
    kept = np.arange(IN) < IN // 2
    chosen = recipe(unit={"neuron": {"swaps": 100}}, update="refit")
    start = Selection((group,), (torch.from_numpy(kept),))
    free = improved(start, chosen, known).kept[0]
    returned = int((free & torch.from_numpy(~kept)).nonzero()[0])
    earlier = torch.ones(IN, dtype=torch.bool)
    earlier[returned] = False
    found = improved(start, chosen, known, before=Selection((group,), (earlier,))).kept[0]
    assert not bool(found[returned]) and int(found.sum()) == IN // 2
    nothing = Selection((group,), (torch.from_numpy(kept),))
    assert improved(start, chosen, known, before=nothing).kept[0].tolist() == kept.tolist()


def greedy_units(gram: Array, weight: Array, width: int, count: int) -> Array:
    """The units that stay when the one goes, again and again, that costs the least by then."""
    kept = np.ones(len(gram) // width, dtype=bool)
    for _ in range(count):
        losses = {}
        for unit in np.flatnonzero(kept):
            kept[unit] = False
            losses[unit] = quadratic(gram, weight, kept.repeat(width))
            kept[unit] = True
        kept[min(losses, key=losses.__getitem__)] = False
    return kept


def quadratic(gram: Array, weight: Array, stays: Array) -> float:
    """The least-squares loss, from the normal equations."""
    wanted = gram @ weight.T
    solved = np.linalg.solve(gram[stays][:, stays], wanted[stays])
    return float((weight.T * wanted).sum() - (solved * wanted[stays]).sum())


def pruned(model: LanguageModel, chosen: Recipe, share: float) -> Outcome:
    layers = linears_of(checked_groups(model, chosen, share))
    known = calibrate(model, BATCHES, layers, dense_sums([chosen]))
    return prune(model, chosen, share, statistics=known, windows=BATCHES)


def test_osscar_prunes_a_model_as_a_loop_over_its_blocks_does_by_brute_force() -> None:
    chosen, share = Recipe.load("osscar"), 0.3
    chosen = with_choices(chosen, unit={"width": {"rescore": 1, "swaps": 1000}})
    model, slow = noisy(tiny_model("llama")), noisy(tiny_model("llama"))
    outcome = pruned(model, chosen, share)
    counts = [int((~kept).sum()) for kept in outcome.selection.kept]
    groups, swaps = checked_groups(slow, chosen, share), 0
    for block in range(BLOCKS):
        inside = [group for group in groups if group.block == block]
        # Both parts of a block look at it as it was before either changed.
        seen = {group.name: activations(slow, group.reader.linear) for group in inside}
        for group in inside:
            reader, width = group.reader.linear, group.reader.width
            place = [one.name for one in outcome.selection.groups].index(group.name)
            gram = seen[group.name].T @ seen[group.name]
            gram += DAMPING * np.diag(gram).mean() * np.eye(len(gram))
            weight = reader.weight.double().numpy()
            kept = greedy_units(gram, weight, width, counts[place])
            while counts[place]:
                near = list(neighbours(kept))
                losses = [quadratic(gram, weight, one.repeat(width)) for one in near]
                if min(losses) > quadratic(gram, weight, kept.repeat(width)) * (1 - 1e-8):
                    break
                kept, swaps = near[int(np.argmin(losses))], swaps + 1
            assert outcome.selection.kept[place].tolist() == kept.tolist()
            stays = torch.from_numpy(kept.repeat(width))
            wanted = (gram @ weight.T)[stays.numpy()]
            fitted = np.linalg.solve(gram[stays.numpy()][:, stays.numpy()], wanted).T
            reader.weight.zero_()
            reader.weight[:, stays] = torch.from_numpy(fitted).float()
            found = outcome.selection.groups[place].reader.linear.weight
            np.testing.assert_allclose(found.numpy(), reader.weight.numpy(), atol=2e-4)
        # Units that went make nothing any more; what reads them is zero already.
    assert swaps > 0 and sum(counts) > 20


def test_a_measured_allocation_swaps_as_the_pruning_does() -> None:
    chosen = recipe(
        unit={"neuron": {"swaps": 50}},
        criterion="Lr0",
        update="refit",
        allocate={"slopes": {"steps": 4}},
    )
    plain = with_choices(chosen, unit="neuron")
    first, second = (pruned(noisy(tiny_model("llama")), one, 0.5) for one in (chosen, plain))
    counts = [[int(kept.sum()) for kept in one.selection.kept] for one in (first, second)]
    assert sum(counts[0]) == sum(counts[1]) == 64
    assert any(
        not torch.equal(one, other)
        for one, other in zip(first.selection.kept, second.selection.kept, strict=True)
    )


def test_swaps_without_a_refit_are_refused_and_so_is_a_gram_matrix_that_is_none() -> None:
    with pytest.raises(RecipeError, match="swaps lowers what is lost .* needs update: refit"):
        recipe(unit={"neuron": {"swaps": 1}})
    kept = torch.tensor([True, True, False])
    with pytest.raises(FactorizationError, match="of mlp is not positive definite"):
        swapped(torch.ones(1, 3), kept, single(3), -torch.eye(3), damping=0.01, most=1)
