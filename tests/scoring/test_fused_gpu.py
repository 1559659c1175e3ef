"""On a real GPU the kernels give the masks of the CPU, at the sizes of real models."""

from __future__ import annotations

import os

import pytest
import torch

from prunezero.formula.criterion import Criterion
from prunezero.scoring import selection
from prunezero.scoring.fused import fused_mask, fused_score
from prunezero.scoring.parity import parity
from prunezero.scoring.population import stacked_scores
from prunezero.scoring.selection import select, select_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs a CUDA device and no interpreter",
    ),
]

FORMULAS = ["W", "abs(W)", "abs(W) * X", "(W*W) * minmax(G)", "(abs(W)/C1 + abs(W)/R1) * sqrt(X)"]
SHAPES = [(576, 576), (192, 576), (100, 1001), (64, 4096), (32, 11008), (16, 16384), (8, 28672)]


def values(rows: int, columns: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return {
        "W": weight,
        "G": torch.rand(rows, columns, generator=generator),
        "X": torch.rand(1, columns, generator=generator),
        "C1": weight.float().abs().sum(0, keepdim=True),
        "R1": weight.float().abs().sum(1, keepdim=True),
    }


@pytest.mark.parametrize("text", FORMULAS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_kernels_mask_is_the_cpu_mask_of_its_scores(
    text: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    criterion = Criterion.parse(text)
    there = {name: value.cuda() for name, value in values(*shape, dtype).items()}
    scores = fused_score(criterion, there["W"], there).cpu()
    requests = [("row", "free"), ("layer", "free"), ("128 columns", "free")]
    requests += [("row", "2:4")] if shape[1] % 4 == 0 else []
    for compare, pattern in requests:
        mask = fused_mask(criterion, there["W"], there, 0.5, compare=compare, pattern=pattern)
        assert torch.equal(mask.cpu(), select(scores, 0.5, compare=compare, pattern=pattern))


@pytest.mark.parametrize("text", [*FORMULAS, "abs(W)**0.7*log(G + 1) + tanh(abs(W)) + exp(-X)"])
@pytest.mark.parametrize("pattern", ["free", "2:4"])
def test_masks_differ_from_those_of_the_cpu_at_the_threshold_alone(text: str, pattern: str) -> None:
    there = {name: value.cuda() for name, value in values(64, 4096, torch.bfloat16).items()}
    found = parity(Criterion.parse(text), there["W"], there, 0.5, pattern=pattern)
    assert found.scores <= 64, str(found)
    assert found.threshold <= found.scores, str(found)


def test_a_population_on_a_gpu_scores_as_each_formula_by_its_own_kernel() -> None:
    single = [values(64, 576, torch.float32), values(64, 576, torch.float32)]
    stack = {name: torch.stack([one[name] for one in single]).cuda() for name in single[0]}
    criteria = [Criterion.parse(text) for text in FORMULAS]
    for criterion, scores in zip(
        criteria, stacked_scores(criteria, stack, (2, 64, 576)), strict=True
    ):
        there = {name: value[1] for name, value in stack.items()}
        assert torch.equal(scores[1], fused_score(criterion, there["W"], there))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_of_exact_operators_equal_those_of_the_cpu(dtype: torch.dtype) -> None:
    here = values(64, 1001, dtype)
    there = {name: value.cuda() for name, value in here.items()}
    weight, gradient = here["W"].float(), here["G"]
    expected = {
        "abs(W) * X + 0.5 * G": (weight.abs() * here["X"], 0.5 * gradient),
        "W*W - G*G": (weight * weight, -(gradient * gradient)),
    }
    for text, (left, right) in expected.items():
        scores = fused_score(Criterion.parse(text), there["W"], there)
        assert torch.equal(scores.cpu(), left + right), text


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.99])
def test_transposed_weights_and_ties_give_the_cpu_mask(sparsity: float) -> None:
    weight = (torch.randn(4096, 64).bfloat16() * 2).round().T
    mask = fused_mask(Criterion.parse("abs(W)"), weight.cuda(), {}, sparsity)
    assert torch.equal(mask.cpu(), select(weight.float().abs(), sparsity))


def test_torch_selects_the_same_on_both_devices() -> None:
    scores = (torch.randn(64, 640) * 4).round()
    for compare in ("row", "layer", "128 columns"):
        mask = select(scores.cuda(), 0.29, compare=compare)
        assert torch.equal(mask.cpu(), select(scores, 0.29, compare=compare))
    here = select_model([scores, scores[:, :7]], 0.29)
    there = select_model([scores.cuda(), scores[:, :7].cuda()], 0.29)
    assert all(torch.equal(mask.cpu(), mine) for mask, mine in zip(there, here, strict=True))
    by_pattern = selection.select(scores.cuda(), 0.5, pattern="2:4")
    assert torch.equal(by_pattern.cpu(), select(scores, 0.5, pattern="2:4"))
