"""Gram matrices, their damping, and the factor of their inverse."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from prunezero.errors import FactorizationError, StatisticsError
from prunezero.scoring.feature_values import feature
from prunezero.scoring.second_order import (
    factor_of,
    forget_factors,
    inverse_factor,
    share_gram,
)
from prunezero.scoring.statistics import Statistics


def correlated_inputs(tokens: int = 200, width: int = 24, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(tokens, width, generator=generator) @ (mixing + torch.eye(width))


def statistics_of(inputs: torch.Tensor, *, sequences: int = 1) -> Statistics:
    statistics = Statistics.empty(["gram"], 4, inputs.shape[-1])
    statistics.add_inputs(inputs.view(sequences, -1, inputs.shape[-1]))
    return statistics


def damped(inputs: torch.Tensor, damping: float, *, sequences: int = 1) -> np.ndarray:
    gram = inputs.double().numpy().T @ inputs.double().numpy() / sequences
    gram[np.diag_indices_from(gram)] += damping * np.diag(gram).mean()
    return gram


def test_the_factor_squares_to_the_inverse() -> None:
    inputs = correlated_inputs()
    factor = inverse_factor(inputs.T @ inputs)
    expected = np.linalg.inv(damped(inputs, 0.01))
    upper = factor.upper.double().numpy()
    assert np.all(np.tril(upper, -1) == 0)
    np.testing.assert_allclose(upper.T @ upper, expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(factor.features["V"][0].numpy(), np.diag(expected), rtol=1e-5)
    assert factor.damping == 0.01


def test_the_diagonal_is_the_surgeons_denominator_with_earlier_columns_gone() -> None:
    inputs = correlated_inputs()
    diagonal = inverse_factor(inputs.T @ inputs).upper.diagonal().double().numpy()
    hessian = damped(inputs, 0.01)
    for column in range(len(hessian)):
        remaining = np.linalg.inv(hessian[column:, column:])
        assert diagonal[column] ** 2 == pytest.approx(remaining[0, 0], rel=1e-5)


def test_only_as_much_damping_as_needed_is_added_and_it_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # 64 tokens cannot span 256 dimensions.
    inputs = correlated_inputs(64, 256).double()
    gram = inputs.T @ inputs
    # What float32 sums lose makes some eigenvalues clearly negative.
    gram -= 1e-4 * gram.diagonal().mean() * torch.eye(256, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        factor = inverse_factor(gram, 1e-6, layer="model.layers.3.q_proj")
    assert factor.damping == pytest.approx(1e-3)
    assert "model.layers.3.q_proj: damping raised from 1e-06 to 0.001" in caplog.text
    # Restored for every try: the matrix inverted is the given one with 1e-3 added, not a sum.
    added = 1e-3 * gram.diagonal().mean() * torch.eye(256, dtype=torch.float64)
    np.testing.assert_allclose(
        factor.features["V"][0].numpy(),
        torch.linalg.inv(gram + added).diagonal().numpy(),
        rtol=1e-4,
    )


def test_a_rank_poor_gram_matrix_is_factored_with_the_usual_damping() -> None:
    inputs = correlated_inputs(64, 256)
    factor = inverse_factor(inputs.T @ inputs)
    assert factor.damping == 0.01
    assert bool(torch.isfinite(factor.upper).all())


def test_a_matrix_that_no_damping_mends_is_refused_by_name_and_never_an_identity() -> None:
    gram = torch.diag(torch.tensor([1.0, -3.0, 1.0]))
    with pytest.raises(FactorizationError, match=r"of block\.q_proj is not positive definite"):
        inverse_factor(gram, layer="block.q_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_name_the_layer_and_are_not_damped(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    gram = torch.eye(3)
    gram[0, 2] = gram[2, 0] = value
    with pytest.raises(StatisticsError, match=r"of block\.q_proj holds NaN or infinite") as caught:
        inverse_factor(gram, layer="block.q_proj")
    assert not isinstance(caught.value, FactorizationError)
    assert "damping" not in caplog.text


def test_a_channel_that_was_always_zero_counts_as_a_mean_one_and_is_told() -> None:
    inputs = correlated_inputs(50, 6)
    inputs[:, 2] = 0.0
    factor = inverse_factor(inputs.T @ inputs)
    assert factor.dead.tolist() == [False, False, True, False, False, False]
    gram = inputs.double().numpy().T @ inputs.double().numpy()
    gram[2, 2] = np.delete(np.diag(gram), 2).mean()
    gram[np.diag_indices_from(gram)] += 0.01 * np.diag(gram).mean()
    expected = np.diag(np.linalg.inv(gram))
    np.testing.assert_allclose(factor.features["V"][0].numpy(), expected, rtol=1e-5)


def test_the_unit_of_inputs_changes_no_more_than_the_unit_of_the_factor() -> None:
    inputs = correlated_inputs(50, 6)
    inputs[:, 2] = 0.0
    gram = inputs.T @ inputs
    usual, small = inverse_factor(gram), inverse_factor(1e-6 * gram)
    np.testing.assert_allclose(small.upper.numpy(), 1e3 * usual.upper.numpy(), rtol=1e-4)


@pytest.mark.parametrize("start", [1e-6, 0.01, 0.03, 0.2])
def test_the_last_try_adds_the_whole_mean_diagonal_wherever_the_first_began(start: float) -> None:
    # The smallest eigenvalue is half a mean diagonal below zero.
    gram = torch.tensor([[1.0, 1.7], [1.7, 1.0]])
    assert 0.7 < inverse_factor(gram, start).damping <= 1.0


def test_a_shared_sum_parts_when_one_layer_sees_more() -> None:
    query, key = statistics_of(correlated_inputs()), statistics_of(correlated_inputs())
    assert share_gram(query, key)
    more = correlated_inputs(seed=1)
    before = key.sums["gram"].clone()
    query.add_inputs(more)
    assert torch.equal(key.sums["gram"], before)
    key.add_inputs(more)
    assert torch.equal(key.sums["gram"], query.sums["gram"])


def test_statistics_remember_the_factor_until_they_change() -> None:
    statistics = statistics_of(correlated_inputs())
    first = factor_of(statistics)
    assert factor_of(statistics) is first
    statistics.add_inputs(correlated_inputs(seed=1))
    assert factor_of(statistics) is not first


def test_features_follow_the_damping_of_the_recipe() -> None:
    inputs = correlated_inputs(sequences := 40)
    statistics = statistics_of(inputs, sequences=sequences // 10)
    weight = torch.ones(4, inputs.shape[-1])
    for damping in (0.01, 0.3):
        expected = np.diag(np.linalg.inv(damped(inputs, damping, sequences=4)))
        np.testing.assert_allclose(
            feature("V", weight, statistics, damping=damping)[0].numpy(), expected, rtol=1e-4
        )


def test_layers_with_the_same_inputs_share_one_factor_and_others_do_not() -> None:
    inputs = correlated_inputs()
    query, key = statistics_of(inputs), statistics_of(inputs)
    other = statistics_of(correlated_inputs(seed=1))
    assert share_gram(query, key)
    assert not share_gram(key, other)
    assert factor_of(query) is factor_of(key)
    assert factor_of(other) is not factor_of(key)
    diagonal = feature("U", torch.ones(4, inputs.shape[-1]), query)
    forget_factors(query)
    assert not any(name == "factor" for name, *_ in key.memo)
    assert torch.equal(feature("U", torch.ones(4, inputs.shape[-1]), key), diagonal)
