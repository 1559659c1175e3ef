"""The sweep by the kernel is the published algorithm too."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from prunezero.pruning.updates import obs
from prunezero.scoring.kernels import sweep
from prunezero.scoring.second_order import InverseFactor, inverse_factor
from tests.pruning.test_obs import (
    correlated_layer,
    half_by_surgeon,
    lowest_half_of_block,
    lowest_two_of_four,
    published_sweep,
)

pytest.importorskip("triton")

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The spans of columns that the kernel was asked for."""
    spans = []
    real = sweep.mend_columns

    def watched(*arguments: object) -> None:
        spans.append(arguments[-2:])
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(obs, "has_kernels", lambda tensor: True)
    monkeypatch.setattr(obs, "mend_columns", watched)
    return spans  # type: ignore[return-value]


def on_device(weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, InverseFactor]:
    return weight.to(DEVICE), inverse_factor(gram.to(DEVICE))


@pytest.mark.parametrize("group", [3, 32, 128, 200])
@pytest.mark.parametrize(("rows", "columns"), [(8, 96), (37, 131), (5, 300)])
def test_blocks_of_any_width_equal_the_published_algorithm(
    rows: int, columns: int, group: int, by_kernel: list[tuple[int, int]]
) -> None:
    weight, gram = correlated_layer(rows, columns)
    there, factor = on_device(weight, gram)
    ours, mask = obs.sweep(there, factor, half_by_surgeon(factor, compare="layer"), group=group)
    reference = published_sweep(weight.numpy(), gram.numpy(), lowest_half_of_block, group)
    assert np.array_equal(mask.cpu().numpy(), reference != 0)
    np.testing.assert_allclose(ours.cpu().numpy(), reference, rtol=1e-3, atol=1e-5)
    assert not torch.signbit(ours[ours == 0]).any()
    assert sum(stop - start for start, stop in by_kernel) == columns
    assert max(stop - start for start, stop in by_kernel) <= sweep.MOST_COLUMNS


def test_2_4_chosen_on_mended_weights_equals_the_published_algorithm() -> None:
    weight, gram = correlated_layer(12, 132)
    there, factor = on_device(weight, gram)
    ours, mask = obs.sweep(there, factor, half_by_surgeon(factor, pattern="2:4"), group=4)
    reference = published_sweep(weight.numpy(), gram.numpy(), lowest_two_of_four, 4)
    assert np.array_equal(mask.cpu().numpy(), reference != 0)
    np.testing.assert_allclose(ours.cpu().numpy(), reference, rtol=1e-3, atol=1e-5)


def test_a_mask_chosen_before_takes_one_launch_for_128_columns(
    by_kernel: list[tuple[int, int]],
) -> None:
    weight, gram = correlated_layer(6, 384)
    there, factor = on_device(weight, gram)
    mask = torch.rand(6, 384, generator=torch.Generator().manual_seed(1)) > 0.4
    chosen = mask.to(DEVICE)
    ours, _ = obs.sweep(there, factor, lambda now, start, stop: chosen[:, start:stop])
    columns = iter(range(384))
    reference = published_sweep(
        weight.numpy(), gram.numpy(), lambda now, d: ~mask.numpy()[:, [next(columns)]], 1
    )
    np.testing.assert_allclose(ours.cpu().numpy(), reference, rtol=1e-3, atol=1e-5)
    assert by_kernel == [(0, 128), (128, 256), (256, 384)]
