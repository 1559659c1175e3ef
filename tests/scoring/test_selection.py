"""Masks keep exactly the right weights, whatever the ties, sizes and memory layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from prunezero.errors import ScoreError, SelectionError
from prunezero.scoring import selection
from prunezero.scoring.request import (
    GROUPS,
    Pattern,
    check_request,
    checked_request,
    group_columns,
    parse_pattern,
    pattern_sparsity,
    removed_count,
)
from prunezero.scoring.selection import select, select_model
from tests.scoring import reference

ROWS = 7


def continuous(columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    return torch.randn(ROWS, columns, generator=generator)


def quantised(columns: int) -> torch.Tensor:
    return (continuous(columns) * 2).round().abs() / 2


def bfloat16_magnitudes(columns: int) -> torch.Tensor:
    return continuous(columns).bfloat16().abs().float()


def signed_zeros(columns: int) -> torch.Tensor:
    zeros = torch.zeros(ROWS, columns)
    zeros[:, ::2] = -0.0
    zeros[0, : columns // 2] = -1.0
    return zeros


def transposed(columns: int) -> torch.Tensor:
    return quantised(columns).T.contiguous().T


def every_second_column(columns: int) -> torch.Tensor:
    return quantised(2 * columns)[:, ::2]


SCORES: list[Callable[[int], torch.Tensor]] = [
    continuous,
    quantised,
    bfloat16_magnitudes,
    signed_zeros,
    transposed,
    every_second_column,
]
SPARSITIES = ["0", "0.01", "0.29", "0.5", "0.7", "0.99"]


@pytest.mark.parametrize("make", SCORES)
@pytest.mark.parametrize("columns", [1, 2, 63, 64, 100])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_rows_layers_and_blocks_equal_a_stable_sort(
    make: Callable[[int], torch.Tensor], columns: int, sparsity: str
) -> None:
    scores = make(columns)
    values = scores.numpy()
    expected = {
        "row": reference.keep_rows(values, sparsity),
        "layer": reference.keep_layer(values, sparsity),
        "1 column": reference.keep_blocks(values, sparsity, 1),
        "24 columns": reference.keep_blocks(values, sparsity, 24),
        "128 columns": reference.keep_blocks(values, sparsity, 128),
    }
    for compare, mask in expected.items():
        kept = select(scores, float(sparsity), compare=compare)
        assert kept.dtype == torch.bool and kept.is_contiguous()
        np.testing.assert_array_equal(kept.numpy(), mask, err_msg=compare)


@pytest.mark.parametrize("make", SCORES)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:5", "1:2", "5:40"])
def test_patterns_strike_out_the_lowest_of_every_group(
    make: Callable[[int], torch.Tensor], pattern: str
) -> None:
    parsed = parse_pattern(pattern)
    assert parsed is not None
    scores = make(parsed.of * 3)
    kept = select(scores, parsed.sparsity, pattern=pattern)
    expected = reference.keep_pattern(scores.numpy(), parsed.keep, parsed.of)
    np.testing.assert_array_equal(kept.numpy(), expected)


@pytest.mark.parametrize("make", SCORES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_model_group_ranks_all_matrices_together(
    make: Callable[[int], torch.Tensor], sparsity: str
) -> None:
    matrices = [make(columns) for columns in (10, 1, 33, 10)]
    masks = select_model(matrices, float(sparsity))
    expected = reference.keep_model([matrix.numpy() for matrix in matrices], sparsity)
    for mask, wanted in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(mask.numpy(), wanted)


def test_a_stable_sort_and_a_partition_give_the_same_mask() -> None:
    for make in SCORES:
        scores = make(50)
        for count in (1, 25, 49):
            by_sort = selection._lowest_by_stable_sort(scores, count)
            by_partition = selection._lowest_by_partition(scores.numpy(), count)
            np.testing.assert_array_equal(by_sort.numpy(), by_partition)


def test_bisection_and_partition_cut_the_model_at_the_same_place() -> None:
    for make in SCORES:
        matrices = [make(columns) for columns in (10, 1, 33)]
        flat = np.sort(np.concatenate([matrix.numpy().reshape(-1) for matrix in matrices]))
        for count in (1, 100, flat.size - 1):
            threshold = selection._threshold_by_bisection(matrices, count)
            assert (flat < threshold).sum() <= count <= (flat <= threshold).sum()


small_scores = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 24)),
    elements=st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1e-45, -1e-45, 3.0e38, -3.0e38, 2.0]),
)


@settings(max_examples=100, deadline=None)
@given(values=small_scores, percent=st.integers(0, 99))
def test_any_scores_with_many_ties_equal_a_stable_sort(
    values: reference.Array, percent: int
) -> None:
    sparsity, text = percent / 100, f"{percent}/100"
    scores = torch.from_numpy(values)
    np.testing.assert_array_equal(
        select(scores, sparsity).numpy(), reference.keep_rows(values, text)
    )
    np.testing.assert_array_equal(
        select(scores, sparsity, compare="layer").numpy(), reference.keep_layer(values, text)
    )
    (mask,) = select_model([scores], sparsity)
    np.testing.assert_array_equal(mask.numpy(), reference.keep_layer(values, text))


def test_equal_scores_go_from_the_left() -> None:
    assert select(torch.ones(2, 4), 0.5).tolist() == [[False, False, True, True]] * 2
    by_layer = select(torch.ones(2, 4), 0.5, compare="layer")
    assert by_layer.tolist() == [[False] * 4, [True] * 4]
    by_block = select(torch.ones(2, 4), 0.5, compare="2 columns")
    assert by_block.tolist() == [[False] * 4, [True] * 4]
    first, second = select_model([torch.ones(1, 2), torch.ones(1, 2)], 0.5)
    assert first.tolist() == [[False, False]] and second.tolist() == [[True, True]]


def test_two_of_four_keeps_two_of_four() -> None:
    kept = select(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), 0.5, pattern="2:4")
    assert kept.tolist() == [[True, False, True, False]]
    kept = select(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), 0.75, pattern="1:4")
    assert kept.tolist() == [[True, False, False, False]]


def test_half_precision_scores_are_compared_without_loss() -> None:
    scores = continuous(64).bfloat16()
    assert torch.equal(select(scores, 0.5), select(scores.float(), 0.5))
    assert torch.equal(
        select(scores, 0.5, pattern="2:4"), select(scores.float(), 0.5, pattern="2:4")
    )


def test_scores_are_left_as_they_were() -> None:
    scores = signed_zeros(20)
    before = scores.clone()
    select(scores, 0.5)
    select(scores, 0.5, compare="layer")
    select_model([scores], 0.5)
    assert torch.equal(scores.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize(
    ("size", "sparsity", "count"),
    [(100, 0.29, 29), (100, 0.57, 57), (10, 0.0, 0), (1, 0.99, 0), (3, 0.5, 1), (1000, 1e-3, 1)],
)
def test_counts_are_those_of_the_decimal_that_was_written(
    size: int, sparsity: float, count: int
) -> None:
    assert removed_count(size, sparsity) == count
    assert int((~select(torch.ones(1, size), sparsity)).sum()) == count


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, math.nan, math.inf])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity: float) -> None:
    with pytest.raises(SelectionError, match="at least 0 and below 1 but got"):
        select(torch.ones(2, 4), sparsity)
    with pytest.raises(SelectionError, match="at least 0 and below 1 but got"):
        select_model([torch.ones(2, 4)], sparsity)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("2:", "neither free nor N:M"),
        ("fre", "did you mean 'free'"),
        ("124", "neither free nor N:M"),
        ("2:4:8", "neither free nor N:M"),
        ("-1:4", "neither free nor N:M"),
        ("4:4", "needs 1 <= N < M"),
        ("5:4", "needs 1 <= N < M"),
        ("0:4", "needs 1 <= N < M"),
        ("1:2", "removes exactly 0.5 of the weights but sparsity is 0.75"),
        ("4:16", "wider than the 12 columns"),
        ("2:8", "needs a multiple of 8 columns but the matrix has 12"),
    ],
)
def test_an_impossible_pattern_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select(torch.ones(2, 12), 0.75, pattern=pattern)


@pytest.mark.parametrize("compare", ["rows", "column", "N columns", "0 columns", "-3 columns", ""])
def test_an_unknown_group_is_refused_with_the_known_ones(compare: str) -> None:
    with pytest.raises(SelectionError, match=f"'{compare}' is not .* known: row .*, layer "):
        check_request(4, 0.5, compare=compare)


def test_a_near_group_is_named() -> None:
    with pytest.raises(SelectionError, match="did you mean 'row'"):
        select(torch.ones(2, 4), 0.5, compare="rows")


def test_every_group_word_is_known() -> None:
    words = [word.replace("N", "64") for word in GROUPS]
    assert [group_columns(word) for word in words] == [None, None, None, 64]


def test_one_matrix_has_no_model_group() -> None:
    with pytest.raises(SelectionError, match="select_model"):
        select(torch.ones(2, 4), 0.5, compare="model")


def test_a_pattern_ignores_the_group() -> None:
    scores = continuous(16)
    by_row = select(scores, 0.5, pattern="2:4")
    for compare in ("layer", "model", "8 columns"):
        assert torch.equal(select(scores, 0.5, compare=compare, pattern="2:4"), by_row)


def test_a_pattern_fixes_its_sparsity() -> None:
    assert pattern_sparsity("free") is None
    assert [pattern_sparsity(word) for word in ("2:4", "1:4", "3:5")] == [0.5, 0.75, 0.4]
    assert parse_pattern("2:4") == Pattern(keep=2, of=4) and str(Pattern(2, 4)) == "2:4"
    assert select(torch.ones(1, 3), 2 / 3, pattern="1:3").tolist() == [[False, False, True]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_never_become_a_mask(bad: float) -> None:
    scores = torch.ones(3, 8)
    scores[1, 5] = bad
    requests = [("row", "free"), ("layer", "free"), ("4 columns", "free"), ("row", "2:4")]
    for compare, pattern in requests:
        with pytest.raises(ScoreError, match="1 of 24|are NaN and 1 are infinite"):
            select(scores, 0.5, compare=compare, pattern=pattern)
    with pytest.raises(ScoreError):
        select_model([torch.ones(2, 2), scores], 0.5)


def test_a_matrix_without_weights_is_refused() -> None:
    with pytest.raises(ScoreError, match="no weight"):
        select(torch.ones(0, 8), 0.5)


def test_double_scores_that_are_infinite_in_float32_never_become_a_mask() -> None:
    scores = torch.tensor([[1e300, 1.0, 2e300, 3.0]], dtype=torch.float64)
    with pytest.raises(ScoreError, match="2 are infinite"):
        select(scores, 0.5)
    with pytest.raises(ScoreError, match="2 are infinite"):
        select_model([scores], 0.5)


def test_requests_are_remembered_as_they_read() -> None:
    number: Any = np.float32(0.29)
    words: Any = ["2:4"]
    assert checked_request(100, float(number)) == 28
    assert checked_request(100, number) == 29
    with pytest.raises(SelectionError, match="neither free nor N:M"):
        checked_request(8, 0.5, pattern=words)
