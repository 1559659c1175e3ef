"""Exchanges against a search through all pairs of a row, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import StatisticsError
from prunezero.pruning.recipes.word_options import Swaps
from prunezero.pruning.updates import swaps
from prunezero.pruning.updates.swaps import improve_by_swaps
from prunezero.scoring.request import Pattern
from prunezero.scoring.selection import select
from tests.pruning.test_admm import correlated_gram

Array = np.ndarray[Any, Any]


def row_error(weight: Array, kept: Array, gram: Array) -> float:
    removed = np.where(kept, 0.0, weight)
    return float(removed @ gram @ removed)


def exchanged_by_search(
    weight: Array, kept: Array, gram: Array, count: int, width: int | None
) -> Array:
    """A row's mask after `count` best exchanges, each found by trying every pair."""
    kept = kept.copy()
    for _ in range(count):
        best, now = None, row_error(weight, kept, gram)
        for gone in np.flatnonzero(kept):
            for back in np.flatnonzero(~kept):
                if width is not None and gone // width != back // width:
                    continue
                trial = kept.copy()
                trial[gone], trial[back] = False, True
                error = row_error(weight, trial, gram)
                if error < now - 1e-9 * now and (best is None or error < best[0]):
                    best = (error, trial)
        if best is None:
            break
        kept = best[1]
    return kept


def case(rows: int, columns: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator), correlated_gram(columns, seed=seed)


def errors(weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    removed = weight.double().masked_fill(mask, 0.0)
    return ((removed @ gram.double()) * removed).sum(1)


@pytest.mark.parametrize("pattern", ["free", "2:4", "1:4", "4:8"])
@pytest.mark.parametrize("count", [1, 3, 50])
@pytest.mark.parametrize("seed", range(3))
def test_every_exchange_is_the_best_of_all_pairs(pattern: str, count: int, seed: int) -> None:
    weight, gram = case(5, 16, seed=seed)
    sparsity = {"free": 0.4, "2:4": 0.5, "1:4": 0.75, "4:8": 0.5}[pattern]
    mask = select(weight.abs(), sparsity, pattern=pattern)
    parsed = None if pattern == "free" else Pattern(*map(int, pattern.split(":")))
    found = improve_by_swaps(weight, mask, gram, Swaps(swaps=count), parsed)
    for row, kept, new in zip(weight.double().numpy(), mask, found, strict=True):
        width = None if parsed is None else parsed.of
        wanted = exchanged_by_search(row, kept.numpy(), gram.double().numpy(), count, width)
        assert np.array_equal(new.numpy(), wanted)


def test_the_best_pair_of_a_wide_row_is_found_among_all() -> None:
    weight, gram = case(20, 61, seed=13)
    mask = select(weight.abs() * gram.diagonal().sqrt(), 0.5)
    found = improve_by_swaps(weight, mask, gram, Swaps(swaps=1))
    for row, kept, new in zip(weight.double().numpy(), mask.numpy(), found, strict=True):
        wanted = exchanged_by_search(row, kept, gram.double().numpy(), 1, None)
        assert np.array_equal(new.numpy(), wanted)


@pytest.mark.parametrize("width", [7, 33])
def test_wide_and_odd_rows_lose_error_with_every_exchange(width: int) -> None:
    weight, gram = case(9, width, seed=3)
    mask = select(weight.abs() * gram.diagonal().sqrt(), 0.5)
    before = errors(weight, mask, gram)
    for count in (1, 2, 4, 8):
        new = improve_by_swaps(weight, mask, gram, Swaps(swaps=count))
        after = errors(weight, new, gram)
        assert (after <= before).all() and after.sum() < errors(weight, mask, gram).sum()
        assert torch.equal(new.sum(1), mask.sum(1))
        before = after


def test_a_finished_mask_is_left_alone() -> None:
    weight, gram = case(6, 24, seed=4)
    done = improve_by_swaps(weight, select(weight.abs(), 0.5), gram, Swaps(swaps=500))
    assert torch.equal(improve_by_swaps(weight, done, gram, Swaps()), done)


def test_a_pattern_holds_in_every_group() -> None:
    weight, gram = case(6, 24, seed=5)
    mask = select(weight.abs(), 0.5, pattern="2:4")
    new = improve_by_swaps(weight, mask, gram, Swaps(), Pattern(2, 4))
    assert (new.view(6, 6, 4).sum(2) == 2).all()
    assert not torch.equal(new, mask)


def test_ties_go_to_the_lower_index() -> None:
    weight = torch.tensor([[1.0, 1.0, 3.0, 3.0]])
    mask = torch.tensor([[True, True, False, False]])
    new = improve_by_swaps(weight, mask, torch.eye(4), Swaps(swaps=1))
    assert new.tolist() == [[False, True, True, False]]
    in_pairs = improve_by_swaps(weight, mask, torch.eye(4), Swaps(swaps=1), Pattern(2, 4))
    assert torch.equal(in_pairs, new)


def test_rows_of_different_counts_full_and_empty_ones_keep_theirs() -> None:
    weight, gram = case(4, 12, seed=6)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[1], mask[2, :3], mask[3, 2:] = True, True, True
    new = improve_by_swaps(weight, mask, gram, Swaps())
    assert new.sum(1).tolist() == [0, 12, 3, 10]
    for row in (2, 3):
        alone = improve_by_swaps(weight[row : row + 1], mask[row : row + 1], gram, Swaps())
        assert torch.equal(new[row], alone[0])


def test_dead_inputs_and_zero_weights_leave_no_better_exchange() -> None:
    weight, gram = case(5, 16, seed=7)
    gram[4], gram[:, 4], gram[11], gram[:, 11] = 0.0, 0.0, 0.0, 0.0
    weight[:, 7] = 0.0
    mask = torch.arange(16).expand(5, 16) % 2 == 0
    new = improve_by_swaps(weight, mask, gram, Swaps(swaps=200))
    for row, kept, found in zip(weight.double().numpy(), mask, new, strict=True):
        wanted = exchanged_by_search(row, kept.numpy(), gram.double().numpy(), 200, None)
        assert row_error(row, found.numpy(), gram.double().numpy()) == pytest.approx(
            row_error(row, wanted, gram.double().numpy())
        )


def test_no_input_at_all_changes_no_mask() -> None:
    weight, _ = case(3, 8, seed=8)
    mask = select(weight.abs(), 0.5)
    assert torch.equal(improve_by_swaps(weight, mask, torch.zeros(8, 8), Swaps()), mask)


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_the_scale_of_the_gram_matrix_does_not_matter(factor: float) -> None:
    weight, gram = case(6, 16, seed=9)
    mask = select(weight.abs(), 0.5)
    new = improve_by_swaps(weight, mask, gram * factor, Swaps())
    assert torch.equal(new, improve_by_swaps(weight, mask, gram, Swaps()))


def test_bfloat16_weights_with_many_ties_give_a_stable_mask() -> None:
    weight, gram = case(8, 32, seed=10)
    weight = (weight * 2).round().bfloat16()
    mask = select(weight.float().abs(), 0.5)
    new = improve_by_swaps(weight, mask, gram, Swaps(swaps=500))
    assert (errors(weight, new, gram) <= errors(weight, mask, gram)).all()
    assert torch.equal(improve_by_swaps(weight, new, gram, Swaps()), new)


def test_the_size_of_tiles_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = case(11, 24, seed=11)
    mask = select(weight.abs(), 0.5)
    wanted = improve_by_swaps(weight, mask, gram, Swaps())
    monkeypatch.setitem(swaps.TILE_NUMBERS, "cpu", 1)
    assert torch.equal(improve_by_swaps(weight, mask, gram, Swaps()), wanted)


def test_a_gram_matrix_that_is_not_finite_is_refused() -> None:
    weight, gram = case(3, 8, seed=12)
    gram[0, 1] = float("nan")
    with pytest.raises(StatisticsError, match="NaN or infinite"):
        improve_by_swaps(weight, weight > 0, gram, Swaps())
