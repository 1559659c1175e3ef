"""Scores of some columns against those of the whole layer, on weights that change meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunezero.errors import StatisticsError
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import features_of_domain
from prunezero.formula.functions import REDUCTIONS
from prunezero.scoring.columns import ColumnScores, sees_inputs_alone
from prunezero.scoring.score import evaluate, features_of, score
from prunezero.scoring.statistics import SUMS, Statistics

ROWS, COLUMNS = 6, 24
PARTS = [(0, 4), (4, 5), (7, 19), (20, 24), (0, 24)]
OF_FEATURES = [name if name == "W" else f"abs(W) * {name}" for name in features_of_domain("matrix")]
OF_REDUCTIONS = [f"abs(W) / {name}(abs(W) * X)" for name in REDUCTIONS]
MIXED = [
    "W**2 / U**2",
    "W**2 * (H + 1 / V)",
    "(abs(W) / C1 + abs(W) / R1) * sqrt(X)",
    "minmax(abs(W)) * X",
    "zscore(W**2) + tanh(X)",
    "abs(W) * minmax(X)",
    "abs(W) * matrix_mean(X) + R2",
    "row_max(col_norm(W)) * abs(W) * G1",
    "log(abs(W) * C2) * D",
    "exp(-abs(W)) * Y",
]


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def statistics() -> Statistics:
    """Every sum there is, with one input channel that was always zero."""
    known = Statistics.empty(SUMS, ROWS, COLUMNS)
    for seed in range(2):
        inputs = random(40, COLUMNS, seed=seed) + 0.3
        inputs[:, 9] = 0.0
        known.add_inputs(inputs)
        known.add_outputs(random(40, ROWS, seed=seed + 10))
        known.add_gradient(random(ROWS, COLUMNS, seed=seed + 20))
        known.add_output_gradients(random(40, ROWS, seed=seed + 30), inputs=inputs)
    return known


def swept_to(start: int, weight: Tensor) -> Tensor:
    """A weight half of which is gone in front of a column, and mended behind it."""
    changed = weight + 0.1 * random(ROWS, COLUMNS, seed=start + 40)
    changed[:, :start][random(ROWS, start, seed=start + 50) > 0] = 0.0
    return changed


@pytest.mark.parametrize("formula", [*OF_FEATURES, *OF_REDUCTIONS, *MIXED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_score_as_in_the_whole_layer_of_that_moment(
    formula: str, dtype: torch.dtype
) -> None:
    criterion, weight = Criterion.parse(formula), random(ROWS, COLUMNS, seed=7).to(dtype)
    known = statistics()
    scores_of = ColumnScores(criterion, weight, known)
    for start, stop in PARTS:
        now = swept_to(start, weight.float())
        whole = evaluate(criterion, features_of(criterion, now, known), now.shape)
        part = scores_of(now, start, stop)
        assert part.shape == (ROWS, stop - start) and part.dtype == torch.float32
        torch.testing.assert_close(part, whole[:, start:stop], rtol=1e-6, atol=0.0)


def test_all_columns_of_an_unchanged_layer_are_its_scores() -> None:
    weight, known = random(ROWS, COLUMNS, seed=7), statistics()
    for formula in MIXED:
        criterion = Criterion.parse(formula)
        found = ColumnScores(criterion, weight, known)(weight, 0, COLUMNS)
        assert torch.equal(found, score(criterion, weight, known))


def test_a_sum_over_rows_sees_the_columns_beside_and_a_product_does_not() -> None:
    weight = torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]])
    beside = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]])
    by_row = ColumnScores(Criterion.parse("abs(W) / R1"), weight, None)
    assert by_row(weight, 1, 2).tolist() == [[2 / 8], [1 / 4]]
    assert by_row(beside, 1, 2).tolist() == [[2 / 4], [1 / 4]]
    by_column = ColumnScores(Criterion.parse("abs(W) / C1"), weight, None)
    assert by_column(weight, 1, 2).tolist() == by_column(beside, 1, 2).tolist()


@pytest.mark.parametrize(
    ("formula", "alone"),
    [
        ("abs(W)", True),
        ("abs(W) * X", True),
        ("W**2 / U**2", True),
        ("W**2 * (H + 1 / V)", True),
        ("tanh(W) * X_mean + log(X_var)", True),
        ("abs(W) * col_sum(X)", True),
        ("X", True),
        ("(abs(W) / C1 + abs(W) / R1) * sqrt(X)", False),
        ("abs(W) / C2", False),
        ("abs(W) * Y", False),
        ("abs(W) * D", False),
        ("abs(W) * G", False),
        ("abs(W) + G1", False),
        ("minmax(abs(W))", False),
        ("zscore(W) * X", False),
        ("abs(W) / col_norm(W)", False),
        ("abs(W) * matrix_max(X)", False),
    ],
)
def test_formulas_of_a_weight_and_its_channel_alone_are_told_apart(
    formula: str, alone: bool
) -> None:
    assert sees_inputs_alone(Criterion.parse(formula)) is alone


def test_one_call_serves_stacked_layers_where_formulas_see_inputs_alone() -> None:
    known, alone = statistics(), 0
    one, other = random(ROWS, COLUMNS, seed=1), random(ROWS, COLUMNS, seed=2)
    for criterion in map(Criterion.parse, [*OF_FEATURES, *OF_REDUCTIONS, *MIXED]):
        if sees_inputs_alone(criterion):
            stacked = ColumnScores(criterion, one, known)(torch.cat([one, other]), 3, 11)
            apart = [ColumnScores(criterion, each, known)(each, 3, 11) for each in (one, other)]
            assert torch.equal(stacked, torch.cat(apart))
            alone += 1
    assert alone >= 10


def test_a_missing_sum_is_refused_before_the_sweep() -> None:
    with pytest.raises(StatisticsError, match="'gram' was not collected"):
        ColumnScores(Criterion.parse("W**2 / U**2"), torch.ones(2, 4), None)
