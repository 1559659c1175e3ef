"""What a mask removes is exactly 0.0, whatever stood there."""

from __future__ import annotations

import pytest
import torch

from prunezero.scoring.masking import clear, cleared, count_zeros

ODD = [float("nan"), float("inf"), -float("inf"), -1.5, -0.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_removed_weights_are_positive_zeros_and_the_others_untouched(dtype: torch.dtype) -> None:
    weight = torch.tensor([ODD, ODD[::-1]], dtype=dtype)
    keep = torch.tensor([[True] * 3 + [False] * 3, [True] * 3 + [False] * 3])
    before = weight.clone()
    copy = cleared(weight, keep)
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))
    assert clear(weight, keep) is weight
    assert torch.equal(weight.view(torch.uint8), copy.view(torch.uint8))
    assert not torch.signbit(weight[~keep]).any()
    kept = (weight[keep].view(torch.uint8), before[keep].view(torch.uint8))
    assert torch.equal(*kept)
    assert (weight[~keep] == 0).all()


def test_rows_of_a_larger_matrix_are_cleared_in_place() -> None:
    whole = torch.ones(4, 6)
    clear(whole.T[1:3], torch.zeros(2, 4, dtype=torch.bool))
    assert whole.sum() == 16
    assert not whole[:, 1:3].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_of_both_signs_are_counted(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    odd = [float("nan"), float("inf"), -float("inf"), smallest, -smallest]
    weight = torch.tensor([[0.0, -0.0, *odd], [1.0, 0.0, *odd]], dtype=dtype)
    assert count_zeros(weight) == 3
    assert count_zeros(weight.T) == 3
    assert count_zeros(weight[:, ::2]) == 1
