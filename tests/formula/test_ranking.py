"""The ranking form of a formula ranks every group as the formula does."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunezero.errors import CriterionError
from prunezero.formula import FEATURES, Criterion
from prunezero.formula.functions import AXES
from prunezero.formula.ranking import ranking_form
from prunezero.scoring.score import evaluate
from tests.formula.test_criterion import random_tree

OUT, IN = 5, 12
GROUPS = ["row", "128 columns", "layer", "model"]


def form(text: str, group: str = "row") -> str:
    return Criterion.from_sympy(ranking_form(Criterion.parse(text).sympy, group)).text


def values(seed: int) -> dict[str, torch.Tensor]:
    """Features of a random matrix; all are away from 0, where divisions are defined otherwise."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, row in FEATURES.items():
        by_row, by_column = AXES[row.shape]
        shape = (OUT if by_row else 1, IN if by_column else 1)
        value = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        if not row.nonnegative:
            value *= torch.randint(0, 2, shape, generator=generator) * 2 - 1
        found[name] = value.float()
    return found


def scores(criterion: Criterion, features: dict[str, torch.Tensor]) -> torch.Tensor:
    used = {name: features[name] for name in criterion.features}
    return evaluate(criterion, used, (OUT, IN)).double().broadcast_to(OUT, IN)


@pytest.mark.parametrize(
    ("text", "group", "expected"),
    [
        ("W**2 * X**2", "row", "abs(W)*X"),
        ("sqrt(abs(W) * X)", "row", "abs(W)*X"),
        ("log(abs(W)*X)", "row", "abs(W)*X"),
        ("exp(3 * abs(W)*X + 2)", "row", "abs(W)*X"),
        ("abs(W) * X / R1 + Y", "row", "abs(W)*X"),
        ("abs(W) * X / R1", "layer", "abs(W)*X/R1"),
        ("abs(W) * X / R1", "128 columns", "abs(W)*X/R1"),
        ("minmax(W**2) * matrix_sum(abs(W))", "layer", "abs(W)"),
        ("minmax(W**2)", "model", "minmax(W**2)"),
        ("2 * abs(W) * matrix_sum(abs(W))", "model", "abs(W)*matrix_sum(abs(W))"),
        ("-3 * X", "row", "-X"),
        ("W * X_mean * 2", "row", "W*X_mean"),
        ("abs(W)*R1 + abs(W)*X*R1", "row", "abs(W)*(1 + X)"),
        ("2*abs(W) + 3*X", "row", "abs(W) + 1.5*X"),
        ("X**0.5 / U**2", "row", "1/U*X**0.25"),
    ],
)
def test_what_a_mask_cannot_see_is_taken_away(text: str, group: str, expected: str) -> None:
    assert form(text, group) == Criterion.parse(expected).text


def test_what_a_mask_can_see_stays() -> None:
    for text in ("W", "abs(W) - X", "W*X", "X_mean*W**2", "1/U"):
        assert form(text) == Criterion.parse(text).text


def test_a_step_to_a_number_that_no_formula_may_hold_is_not_taken() -> None:
    text = "1e-10*abs(W) + X*W**2"
    assert form(text) == Criterion.parse(text).text


def test_formulas_that_rank_nothing_in_a_group_are_refused() -> None:
    with pytest.raises(CriterionError, match="ranks none"):
        form("R1 * Y", "row")
    with pytest.raises(CriterionError, match="ranks none"):
        form("matrix_sum(X)", "layer")
    assert form("R1 * Y", "layer") == "R1*Y"


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(GROUPS))
def test_no_order_inside_a_group_changes(seed: int, group: str) -> None:
    try:
        criterion = Criterion.from_sympy(random_tree(random.Random(seed), 4))
        ranked = Criterion.from_sympy(ranking_form(criterion.sympy, group))
    except CriterionError:
        return
    features = values(seed % 1000)
    before, after = scores(criterion, features), scores(ranked, features)
    if not (before.isfinite().all() and after.isfinite().all()):
        return
    if group != "row":
        before, after = before.reshape(1, -1), after.reshape(1, -1)
    step = before[:, :, None] - before[:, None, :]
    # Where scores differ by more than roundings, and are not where exp and log are clamped.
    is_clear = step.abs() > 1e-4 * before.abs().amax(dim=1)[:, None, None]
    moved = after[:, :, None] - after[:, None, :]
    assert ((moved * step.sign())[is_clear] >= 0).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(GROUPS))
def test_the_ranking_form_of_a_ranking_form_is_itself(seed: int, group: str) -> None:
    try:
        once = ranking_form(Criterion.from_sympy(random_tree(random.Random(seed), 4)).sympy, group)
    except CriterionError:
        return
    assert ranking_form(once, group) == once
