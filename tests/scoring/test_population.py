"""Masks of many formulas on stacked layers are those of each formula on each layer."""

from __future__ import annotations

import pytest
import torch

from prunezero.errors import ScoreError, SelectionError
from prunezero.formula.criterion import Criterion
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.scoring import population
from prunezero.scoring.population import select_stacked, stacked_scores
from prunezero.scoring.score import evaluate
from prunezero.scoring.selection import select
from prunezero.searching.proxies.layer_error import masks_on
from prunezero.searching.proxies.samples import stacked
from tests.scoring.test_machine import EVERY, stack
from tests.searching.test_samples import FORMULAS, samples_of

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")

REQUESTS = [
    (0.5, "row", "free"),
    (0.3, "layer", "free"),
    (0.5, "8 columns", "free"),
    (0.5, "7 columns", "free"),
    (0.5, "row", "2:4"),
    (0.75, "layer", "2:8"),
]


@pytest.fixture(params=["torch", "kernels"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways, the kernels in Triton's interpreter where there is no GPU."""
    if request.param == "kernels":
        pytest.importorskip("triton")
    monkeypatch.setattr(population, "has_kernels", lambda tensor: request.param == "kernels")
    return str(request.param)


def test_scores_of_a_stack_are_those_of_its_layers(way: str) -> None:
    single, together = stack()
    shape = together["W"].shape
    rtol = 1e-5 if way == "kernels" else 1e-6  # powers and exponentials are approximate
    for criterion, scores in zip(EVERY, stacked_scores(EVERY, together, shape), strict=True):
        for values, found in zip(single, scores.cpu(), strict=True):
            read = {name: values[name] for name in criterion.features}
            expected = evaluate(criterion, read, shape[1:])
            torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol / 100)


def test_a_formula_too_deep_for_the_machine_has_the_same_scores(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, together = stack()
    criteria = [Criterion.parse("abs(W)*X"), Criterion.parse("(abs(W)/R1 + abs(W)/C1)*sqrt(X)")]
    by_machine = list(stacked_scores(criteria, together, together["W"].shape))
    monkeypatch.setattr(population, "can_run", lambda criterion: criterion != criteria[1])
    for found, expected in zip(
        stacked_scores(criteria, together, together["W"].shape), by_machine, strict=True
    ):
        assert torch.equal(found, expected)


def test_many_formulas_are_scored_in_portions(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, together = stack()
    whole = list(stacked_scores(EVERY[:7], together, together["W"].shape))
    monkeypatch.setattr(population, "_SCORES", 3 * together["W"].numel())
    portions = list(stacked_scores(EVERY[:7], together, together["W"].shape))
    assert len(portions) == 7
    assert all(map(torch.equal, whole, portions))


@pytest.mark.parametrize(("sparsity", "compare", "pattern"), REQUESTS)
def test_masks_of_a_stack_are_those_of_its_layers(
    way: str, sparsity: float, compare: str, pattern: str
) -> None:
    _, together = stack()
    criterion = Criterion.parse("abs(W)*X + G")
    (scores,) = stacked_scores([criterion], together, together["W"].shape)
    kept = select_stacked(scores, sparsity, compare=compare, pattern=pattern)
    for found, own in zip(kept.cpu(), scores.cpu(), strict=True):
        assert torch.equal(found, select(own, sparsity, compare=compare, pattern=pattern))


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, "2:4"), (0.3, "2:5"), (0.5, "8:16")])
def test_a_request_that_fits_no_row_is_refused(way: str, sparsity: float, pattern: str) -> None:
    scores = torch.rand(2, 3, 10)
    with pytest.raises(SelectionError):
        select_stacked(scores, sparsity, compare="row", pattern=pattern)


def test_what_is_computed_before_counts_in_a_portion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(population, "_SCORES", 100)
    plain, scaled = Criterion.parse("abs(W)*X"), Criterion.parse("W**2*minmax(G)")
    assert [len(some) for some in population._portions([plain] * 5, 25)] == [4, 1]
    assert [len(some) for some in population._portions([scaled] * 5, 25)] == [2, 2, 1]
    assert [len(some) for some in population._portions([plain] * 2, 1000)] == [1, 1]
    monkeypatch.setattr(population, "_MOST_FORMULAS", 3)
    assert [len(some) for some in population._portions([plain] * 5, 1)] == [3, 2]


def test_scores_that_are_not_finite_never_become_a_mask_of_a_stack(way: str) -> None:
    _, together = stack()
    scores = together["W"].clone()
    scores[1, 2, 3] = float("inf")
    with pytest.raises(ScoreError, match="1 are infinite"):
        select_stacked(scores, 0.5, compare="row", pattern="free")


def test_kernels_screen_a_model_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    stacks = stacked(samples_of())
    recipes = [Recipe(name="it", criterion=criterion) for criterion in FORMULAS]
    expected = [masks_on(stacks, one, 0.5, "free") for one in recipes]
    monkeypatch.setattr(population, "has_kernels", lambda tensor: True)
    for recipe, masks in zip(recipes, expected, strict=True):
        assert all(map(torch.equal, masks_on(stacks, recipe, 0.5, "free"), masks))
