"""The sweep of optimal brain surgery against the published algorithm, written once more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prunezero.pruning.updates.obs import Choose, sweep
from prunezero.scoring.second_order import InverseFactor, inverse_factor
from prunezero.scoring.selection import select


def correlated_layer(
    rows: int, columns: int, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, columns] and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ (mixing + torch.eye(columns))
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def published_sweep(
    weight: np.ndarray,
    gram: np.ndarray,
    removed_of: object,
    group: int,
    *,
    damping: float = 0.01,
) -> np.ndarray:
    """Algorithm 1 column by column in float64, with the inverse computed the long way round.

    `removed_of(weights of a group, their diagonal of the factor)` says what goes.
    """
    weight, gram = weight.astype(np.float64).copy(), gram.astype(np.float64).copy()
    dead = np.diag(gram) == 0
    gram[dead, dead] = np.diag(gram)[~dead].mean()
    weight[:, dead] = 0.0
    gram[np.diag_indices_from(gram)] += damping * np.diag(gram).mean()
    factor = np.linalg.cholesky(np.linalg.inv(gram)).T
    columns = weight.shape[1]
    removed = np.zeros(weight.shape, dtype=bool)
    for column in range(columns):
        if column % group == 0:
            end = min(column + group, columns)
            inside = slice(column, end)
            removed[:, inside] = removed_of(weight[:, inside], np.diag(factor)[inside])  # type: ignore[operator]
        error = np.where(removed[:, column], weight[:, column], 0.0) / factor[column, column]
        weight[:, column:] -= np.outer(error, factor[column, column:])
    weight[removed] = 0.0
    return weight


def lowest_half_of_block(weight: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    scores = (weight / diagonal) ** 2
    removed = np.zeros(scores.size, dtype=bool)
    removed[np.argsort(scores, axis=None, kind="stable")[: scores.size // 2]] = True
    return removed.reshape(scores.shape)


def lowest_two_of_four(weight: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    order = np.argsort((weight / diagonal) ** 2, axis=1, kind="stable")
    removed = np.zeros(weight.shape, dtype=bool)
    np.put_along_axis(removed, order[:, :2], True, axis=1)
    return removed


def half_by_surgeon(factor: InverseFactor, **request: str) -> Choose:
    """Keeps the half with the larger w^2 / U^2, by the comparison group or pattern asked for."""

    def choose(now: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        scores = (now[:, start:stop] / factor.upper.diagonal()[start:stop]) ** 2
        return select(scores, 0.5, **request)

    return choose


@pytest.mark.parametrize("group", [1, 3, 7, 16, 24, 32, 50, 128, 200])
@pytest.mark.parametrize(("rows", "columns"), [(8, 96), (5, 131), (16, 300)])
def test_blocks_of_any_width_equal_the_published_algorithm(
    rows: int, columns: int, group: int
) -> None:
    weight, gram = correlated_layer(rows, columns)
    factor = inverse_factor(gram)
    choose = half_by_surgeon(factor, compare="layer")
    ours, mask = sweep(weight, factor, choose, group=group)
    reference = published_sweep(weight.numpy(), gram.numpy(), lowest_half_of_block, group)
    assert np.array_equal(mask.numpy(), reference != 0)
    np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("columns", [64, 132, 400])
def test_2_4_chosen_on_mended_weights_equals_the_published_algorithm(columns: int) -> None:
    weight, gram = correlated_layer(12, columns)
    factor = inverse_factor(gram)
    choose = half_by_surgeon(factor, pattern="2:4")
    ours, mask = sweep(weight, factor, choose, group=4)
    reference = published_sweep(weight.numpy(), gram.numpy(), lowest_two_of_four, 4)
    assert np.array_equal(mask.numpy(), reference != 0)
    np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-3, atol=1e-5)
    assert (mask.view(12, -1, 4).sum(2) == 2).all()


def test_a_mask_chosen_before_the_sweep_is_kept_and_mended() -> None:
    weight, gram = correlated_layer(6, 150)
    mask = torch.rand(6, 150, generator=torch.Generator().manual_seed(1)) > 0.4
    ours, kept = sweep(weight, inverse_factor(gram), lambda now, start, stop: mask[:, start:stop])
    columns = iter(range(150))
    reference = published_sweep(
        weight.numpy(), gram.numpy(), lambda now, d: ~mask.numpy()[:, [next(columns)]], 1
    )
    assert torch.equal(kept, mask)
    np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-3, atol=1e-5)


def test_mending_lowers_the_output_error_of_the_same_mask() -> None:
    weight, gram = correlated_layer(20, 80)
    mask = torch.rand(20, 80, generator=torch.Generator().manual_seed(1)) > 0.5
    mended, _ = sweep(weight, inverse_factor(gram), lambda now, start, stop: mask[:, start:stop])

    def error(changed: torch.Tensor) -> float:
        difference = changed - weight
        return float(((difference @ gram) * difference).sum())

    assert error(mended) < 0.9 * error(weight * mask)


def test_weights_of_dead_channels_go_and_change_nothing_else() -> None:
    weight, gram = correlated_layer(6, 40)
    gram[[3, 17]] = 0.0
    gram[:, [3, 17]] = 0.0
    factor = inverse_factor(gram)
    choose = half_by_surgeon(factor, compare="layer")
    ours, _ = sweep(weight, factor, choose, group=40)
    reference = published_sweep(weight.numpy(), gram.numpy(), lowest_half_of_block, 40)
    assert not ours[:, [3, 17]].any()
    np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-3, atol=1e-5)


def test_kept_weights_of_dead_channels_stay_as_they_are() -> None:
    weight, gram = correlated_layer(6, 40)
    gram[[3, 17]] = 0.0
    gram[:, [3, 17]] = 0.0
    factor = inverse_factor(gram)
    mask = torch.ones(6, 40, dtype=torch.bool)
    mask[:, ::4] = False
    mask[0, 3] = False
    before, _ = sweep(weight, factor, lambda now, start, stop: mask[:, start:stop])
    assert int((before == 0).sum()) == int((~mask).sum())
    assert torch.equal(before[1:, [3, 17]], weight[1:, [3, 17]])
    # Chosen on the way, nothing goes where nothing is asked for.
    whole, kept = sweep(
        weight, factor, lambda now, start, stop: torch.ones_like(now[:, start:stop]) > 0, group=8
    )
    assert kept.all()
    assert torch.equal(whole, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_mended_in_float32(dtype: torch.dtype) -> None:
    weight, gram = correlated_layer(6, 48)
    coarse = weight.to(dtype)
    mask = torch.rand(6, 48, generator=torch.Generator().manual_seed(1)) > 0.5

    def choose(now: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return mask[:, start:stop]

    ours, _ = sweep(coarse, inverse_factor(gram), choose)
    exact, _ = sweep(coarse.float(), inverse_factor(gram), choose)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, exact)
    assert not torch.signbit(ours[ours == 0]).any()
