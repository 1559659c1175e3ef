"""Tiles change the time that scores and masks take, and not one bit of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prunezero.formula.criterion import Criterion
from prunezero.formula.vocabulary import FEATURES, OPERATORS
from prunezero.scoring import score, tiles
from prunezero.scoring.selection import select
from tests.scoring.test_fused import with_operator

# No multiple of a vector register.
ROWS, COLUMNS = 70, 131
SHAPES = {"element": (ROWS, COLUMNS), "row": (ROWS, 1), "column": (1, COLUMNS)}
FORMULAS = [
    *(criterion for name in OPERATORS.own for criterion in with_operator(name)),
    *(Criterion.parse(name) for name in FEATURES),
    Criterion.parse("(abs(W)/R1 + abs(W)/C1) * sqrt(X)"),
    Criterion.parse("W**2 * minmax(G) + col_norm(abs(W) * X) * Y"),
    Criterion.parse("tanh(abs(W)*X) * log(G + 1) + exp(-G)"),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_VALUES", 40 * COLUMNS)
    monkeypatch.setattr(tiles, "_LARGE", 0)


def features(*, is_transposed: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, feature in FEATURES.items():
        value = torch.randn(SHAPES[feature.shape], generator=generator)
        value = torch.where(value.abs() < 0.05, 0.0, value)
        value = value.abs() if feature.nonnegative else value
        values[name] = value.T.contiguous().T if is_transposed else value
    return values


def test_tiles_cover_every_row_once() -> None:
    for rows in (0, 1, 31, 32, 33, ROWS):
        covered = [row for tile in tiles.row_tiles(rows, COLUMNS) for row in range(rows)[tile]]
        assert covered == list(range(rows))
    assert list(tiles.row_tiles(2, 64 * COLUMNS)) == [slice(0, 1), slice(1, 2)]
    assert list(tiles.row_tiles(0, 0)) == []


@pytest.mark.parametrize("columns", [131, 132, 36, 48, 576])
def test_tiles_end_where_a_turn_of_the_loop_ends(columns: int) -> None:
    ends = [tile.stop * columns for tile in tiles.row_tiles(1000, columns)]
    assert len(ends) > 2
    assert all(end % 32 == 0 for end in ends[:-1])


@pytest.mark.parametrize("is_transposed", [False, True])
def test_scores_by_tiles_are_those_of_the_whole_matrix(is_transposed: bool) -> None:
    assert len(FORMULAS) > 30
    values = features(is_transposed=is_transposed)
    for criterion in FORMULAS:
        read = {name: values[name] for name in criterion.features}
        with torch.no_grad():
            whole = score._compiled(criterion)(**read).expand(ROWS, COLUMNS)
        assert torch.equal(score.evaluate(criterion, read, (ROWS, COLUMNS)), whole), criterion.text


def test_no_temporary_is_larger_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = score._in_parts

    def watched(criterion: Criterion) -> Any:
        before, inside = real(criterion)  # type: ignore[misc]

        def counted(*pieces: torch.Tensor) -> torch.Tensor:
            seen.append(max(piece.shape[0] for piece in pieces))
            return inside(*pieces)

        return before, counted

    monkeypatch.setattr(score, "_in_parts", watched)
    values = features()
    criterion = Criterion.parse("abs(W) * sqrt(X) + G**2")
    score.evaluate(criterion, {name: values[name] for name in "WXG"}, (ROWS, COLUMNS))
    assert seen == [32, 32, 6]


def test_the_users_default_dtype_changes_no_score() -> None:
    values = features()
    read = {name: values[name] for name in ("W", "X")}
    criterion = Criterion.parse("abs(W)*X")
    expected = score.evaluate(criterion, read, (ROWS, COLUMNS))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = score.evaluate(criterion, read, (ROWS, COLUMNS))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("columns", "sparsity", "pattern"), [(131, 0.3, "free"), (132, 0.5, "2:4"), (132, 0.75, "3:12")]
)
def test_masks_by_tiles_are_those_of_one_tile(
    monkeypatch: pytest.MonkeyPatch, columns: int, sparsity: float, pattern: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(ROWS, columns, generator=generator) * 3).round()
    by_tiles = select(scores, sparsity, pattern=pattern)
    monkeypatch.setattr(tiles, "_VALUES", scores.numel())
    assert torch.equal(by_tiles, select(scores, sparsity, pattern=pattern))
