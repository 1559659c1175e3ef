"""ADMM against the exact masked least squares solution, row by row in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import StatisticsError
from prunezero.pruning.recipes.word_options import Admm
from prunezero.pruning.updates.admm import refit

Array = np.ndarray[Any, Any]
OUT, IN = 6, 20


def correlated_gram(columns: int = IN, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(400, columns, generator=generator) @ (mix + 0.3)
    inputs *= torch.linspace(0.1, 5, columns)
    return inputs.T @ inputs


def weight_and_mask(*, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    mask = torch.rand(OUT, IN, generator=generator) > 0.5
    return weight, mask


def exact_fit(
    weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor, damping: float
) -> Array:
    """For kept K and removed R of a row: w_K + H_KK^-1 H_KR w_R, the damping in H's own units."""
    system = gram.double().numpy()
    system = system + damping * np.diag(np.diag(system))
    rows = []
    for row, kept in zip(weight.double().numpy(), mask.numpy(), strict=True):
        fitted = np.zeros(len(row))
        missing = system[np.ix_(kept, ~kept)] @ row[~kept]
        fitted[kept] = row[kept] + np.linalg.solve(system[np.ix_(kept, kept)], missing)
        rows.append(fitted)
    return np.array(rows)


def output_error(weight: torch.Tensor, other: torch.Tensor, gram: torch.Tensor) -> float:
    change = (other - weight).double()
    return float(((change @ gram.double()) * change).sum())


@pytest.mark.parametrize("damping", [0.1, 0.001])
def test_many_iterations_reach_the_masked_least_squares_solution(damping: float) -> None:
    weight, mask = weight_and_mask()
    gram = correlated_gram()
    found = refit(weight, mask, gram, Admm(iterations=5000, damping=damping))
    wanted = exact_fit(weight, mask, gram, damping)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-3)


def test_the_usual_iterations_lower_the_error_of_the_mask_alone() -> None:
    weight, mask = weight_and_mask()
    gram = correlated_gram()
    alone = output_error(weight, weight.masked_fill(~mask, 0.0), gram)
    fitted = output_error(weight, refit(weight, mask, gram, Admm()), gram)
    assert fitted < 0.5 * alone


def test_removed_weights_are_plus_zero_and_the_input_is_left_alone() -> None:
    weight, mask = weight_and_mask()
    before = weight.clone()
    found = refit(weight, mask, correlated_gram(), Admm())
    assert found.dtype == torch.float32
    assert not found[~mask].any() and not torch.signbit(found[~mask]).any()
    assert found[mask].all()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_the_scale_of_the_gram_matrix_does_not_matter(factor: float) -> None:
    weight, mask = weight_and_mask()
    gram = correlated_gram()
    found = refit(weight, mask, gram * factor, Admm())
    torch.testing.assert_close(found, refit(weight, mask, gram, Admm()))


def test_kept_weights_of_an_input_that_was_always_zero_stay_as_they_are() -> None:
    weight, mask = weight_and_mask()
    gram = correlated_gram()
    gram[3], gram[:, 3] = 0.0, 0.0
    found = refit(weight, mask, gram, Admm())
    assert torch.equal(found[:, 3], weight[:, 3].masked_fill(~mask[:, 3], 0.0))
    live = [column for column in range(IN) if column != 3]
    others = refit(weight[:, live], mask[:, live], gram[live][:, live], Admm())
    torch.testing.assert_close(found[:, live], others)


def test_a_mask_that_keeps_everything_changes_nothing() -> None:
    weight, _ = weight_and_mask()
    found = refit(weight, torch.ones_like(weight, dtype=torch.bool), correlated_gram(), Admm())
    torch.testing.assert_close(found, weight)


def test_bfloat16_weights_are_fitted_in_float32() -> None:
    weight, mask = weight_and_mask()
    gram = correlated_gram()
    found = refit(weight.bfloat16(), mask, gram, Admm())
    assert torch.equal(found, refit(weight.bfloat16().float(), mask, gram, Admm()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_not_finite_is_refused(bad: float) -> None:
    weight, mask = weight_and_mask()
    gram = correlated_gram()
    gram[2, 5] = bad
    with pytest.raises(StatisticsError, match="NaN or infinite"):
        refit(weight, mask, gram, Admm())


def test_a_gram_matrix_with_a_negative_diagonal_is_refused() -> None:
    weight, mask = weight_and_mask()
    with pytest.raises(StatisticsError, match="negative diagonal"):
        refit(weight, mask, -correlated_gram(), Admm())
