"""DSnoT against a slow loop over single rows, written from the paper's description."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import StatisticsError
from prunezero.pruning.recipes.word_options import Dsnot
from prunezero.pruning.updates.dsnot import dsnot
from prunezero.scoring.request import Pattern
from prunezero.scoring.selection import select

Array = np.ndarray[Any, Any]
ROWS, IN = 12, 32


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, and the mean, variance and norm of inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, IN, generator=generator)
    mean = torch.randn(IN, generator=generator, dtype=torch.float64)
    variance = torch.rand(IN, generator=generator, dtype=torch.float64) + 0.1
    norm = (mean.square() + variance).sqrt()
    return weight, mean, variance, norm


def slow_row(
    weight: Array, kept: Array, moments: tuple[Array, Array, Array], options: Dsnot, width: int
) -> Array:
    """One row; `width` is the group size M of a pattern, 0 without one."""
    mean, variance, norm = moments
    kept = kept.copy()
    moved: set[int] = set()
    error = sum(weight[j] * mean[j] for j in range(len(weight)) if not kept[j])
    first = np.sign(error)
    for _ in range(options.cycles):
        if abs(error) <= options.threshold:
            break
        sign = np.sign(error)

        def leaving(
            j: int, grown: int, sign: float = sign, moved: set[int] = moved, kept: Array = kept
        ) -> bool:
            if j in moved or not kept[j]:
                return False
            return j // width == grown // width if width else sign * weight[j] * mean[j] < 0

        grow = [
            j
            for j in range(len(weight))
            if not kept[j] and j not in moved and sign * weight[j] * mean[j] > 0
        ]
        if width:
            grow = [j for j in grow if any(leaving(k, j) for k in range(len(weight)))]
        if not grow:
            break
        grown = max(grow, key=lambda j: abs(weight[j] * mean[j]) / variance[j] ** options.power)
        go = [j for j in range(len(weight)) if leaving(j, grown)]
        if not go:
            break
        gone = min(go, key=lambda j: abs(weight[j]) * norm[j])
        after = error + weight[gone] * mean[gone] - weight[grown] * mean[grown]
        if width and np.sign(after) != first:
            break
        error = after
        kept[gone], kept[grown] = False, True
        moved |= {gone, grown}
    return kept


@pytest.mark.parametrize("pattern", ["free", "2:4", "1:4"])
@pytest.mark.parametrize("options", [Dsnot(), Dsnot(cycles=3), Dsnot(threshold=0.0, power=0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_ends_where_the_slow_loop_ends(pattern: str, options: Dsnot, seed: int) -> None:
    weight, mean, variance, norm = case(seed)
    sparsity = {"free": 0.6, "2:4": 0.5, "1:4": 0.75}[pattern]
    mask = select(weight.abs() * norm.float(), sparsity, pattern=pattern)
    parsed = None if pattern == "free" else Pattern(*map(int, pattern.split(":")))
    found = dsnot(weight, mask, mean, variance, norm, options, parsed)
    assert not torch.equal(found, mask)
    moments = (mean.numpy(), variance.numpy(), norm.numpy())
    width = 0 if parsed is None else parsed.of
    for row, kept, new in zip(weight.double().numpy(), mask.numpy(), found, strict=True):
        assert np.array_equal(new.numpy(), slow_row(row, kept, moments, options, width))


def test_every_row_keeps_its_count() -> None:
    weight, mean, variance, norm = case()
    mask = torch.rand(ROWS, IN, generator=torch.Generator().manual_seed(5)) > 0.7
    found = dsnot(weight, mask, mean, variance, norm, Dsnot())
    assert torch.equal(found.sum(1), mask.sum(1))


def test_every_group_keeps_its_pattern() -> None:
    weight, mean, variance, norm = case()
    mask = select(weight.abs(), 0.5, pattern="4:8")
    found = dsnot(weight, mask, mean, variance, norm, Dsnot(threshold=0.0), Pattern(4, 8))
    assert (found.view(ROWS, -1, 8).sum(2) == 4).all()
    assert not torch.equal(found, mask)


def test_an_exchange_by_hand() -> None:
    # eps = 2 + 1 = 3: 2 / 4 < 1 / 1, so weight 3 comes back, and of the negative ones the cheaper
    # weight 1 goes.
    weight = torch.tensor([[5.0, -1.0, 2.0, 1.0, -2.0]])
    mask = torch.tensor([[True, True, False, False, True]])
    ones = torch.ones(5)
    variance = torch.tensor([1.0, 1.0, 4.0, 1.0, 1.0])
    found = dsnot(weight, mask, ones, variance, ones, Dsnot(cycles=1))
    assert found.tolist() == [[True, False, False, True, True]]


def test_a_row_below_the_threshold_is_left_alone() -> None:
    weight, mean, variance, norm = case()
    mask = select(weight.abs(), 0.5)
    assert torch.equal(dsnot(weight, mask, mean, variance, norm, Dsnot(threshold=1e6)), mask)


def test_an_input_without_variance_comes_back_first() -> None:
    weight = torch.tensor([[3.0, 0.1, -1.0, -2.0]])
    mask = torch.tensor([[False, False, True, True]])
    ones = torch.ones(4)
    found = dsnot(weight, mask, ones, torch.tensor([1.0, 0.0, 1.0, 1.0]), ones, Dsnot(cycles=1))
    assert found.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("kept", [True, False])
def test_rows_that_keep_all_or_nothing_stay_so(kept: bool) -> None:
    weight, mean, variance, norm = case()
    mask = torch.full((ROWS, IN), kept)
    assert torch.equal(dsnot(weight, mask, mean, variance, norm, Dsnot()), mask)


def test_ties_go_to_the_lower_index() -> None:
    weight = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    mask = torch.tensor([[False, False, True, True]])
    ones = torch.ones(4)
    found = dsnot(weight, mask, ones, ones, ones, Dsnot(cycles=1))
    assert found.tolist() == [[True, False, False, True]]


def test_bfloat16_weights_count_as_the_numbers_they_are() -> None:
    weight, mean, variance, norm = case()
    mask = select(weight.abs(), 0.5)
    rounded = weight.bfloat16()
    found = dsnot(rounded, mask, mean, variance, norm, Dsnot())
    assert torch.equal(found, dsnot(rounded.float(), mask, mean, variance, norm, Dsnot()))


def test_moments_that_are_not_finite_are_refused() -> None:
    weight, mean, variance, norm = case()
    mean[0] = float("nan")
    with pytest.raises(StatisticsError, match="NaN or infinite"):
        dsnot(weight, weight > 0, mean, variance, norm, Dsnot())
