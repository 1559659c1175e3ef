"""A kernel gives the scores and the mask that torch and a stable sort give.

Without a GPU the kernels run in Triton's interpreter; with one, on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import ScoreError, SelectionError, StatisticsError
from prunezero.formula.canonical import combine
from prunezero.formula.code import torch_lines
from prunezero.formula.constants import number
from prunezero.formula.criterion import Criterion
from prunezero.formula.vocabulary import FEATURES, OPERATORS
from prunezero.scoring import fused, score
from prunezero.scoring.fused import can_fuse, fused_mask, fused_score
from prunezero.scoring.kernels import launches
from prunezero.scoring.kernels.source import plan
from prunezero.scoring.request import parse_pattern
from prunezero.scoring.selection import select
from tests.scoring import reference

pytest.importorskip("triton")

# Triton's interpreter computes with numpy, which warns of a logarithm that the formula means.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPES = {"element": (3, 40), "row": (3, 1), "column": (1, 40)}
# Computed from approximations that differ between torch and a GPU in the last bits.
APPROXIMATE = {"exp", "log", "tanh", "power"}
READY = list(FEATURES)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """A value for every feature, coarse enough to hold many ties, with a few zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name in READY:
        value = torch.randn(SHAPES[FEATURES[name].shape], generator=generator)
        value = torch.where(value.abs() < 0.1, 0.0, (value * 4).round() / 8)
        values[name] = value.abs() if FEATURES[name].nonnegative else value
    return values


def in_torch(criterion: Criterion, values: dict[str, torch.Tensor]) -> torch.Tensor:
    scope: dict[str, Any] = {name: value.float() for name, value in values.items()}
    exec("\n".join(torch_lines(criterion)), {"torch": torch}, scope)
    return scope["score"].expand(values["W"].shape).contiguous()


def on_device(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(DEVICE) for name, value in values.items()}


def kernel_score(criterion: Criterion, values: dict[str, torch.Tensor]) -> torch.Tensor:
    there = on_device(values)
    return fused_score(criterion, there["W"], there).cpu()


def kernel_mask(
    criterion: Criterion, values: dict[str, torch.Tensor], sparsity: float, **choices: str
) -> torch.Tensor:
    there = on_device(values)
    return fused_mask(criterion, there["W"], there, sparsity, **choices).cpu()


def with_operator(name: str) -> list[Criterion]:
    weight, gradient = FEATURES["W"].symbol, FEATURES["G"].symbol
    if name == "power":
        pairs = [(weight, 0.3), (gradient, 1.5), (weight, 3), (gradient, -0.5)]
        return [
            Criterion.from_sympy(combine(OPERATORS[name], base, number(exponent)))
            for base, exponent in pairs
        ]
    if OPERATORS[name].arity == 2:
        pairs = [(weight, gradient), (gradient, weight)]
        return [Criterion.from_sympy(combine(OPERATORS[name], *pair)) for pair in pairs]
    values = [combine(OPERATORS[name], weight), combine(OPERATORS[name], weight * gradient)]
    # Exact operators are tried inside a sum too; there an approximate one could cancel.
    beside = 0 if name in APPROXIMATE else gradient * abs(weight)
    return [Criterion.from_sympy(value + beside) for value in values]


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_scores_and_selects_as_in_torch(name: str) -> None:
    values = tensors()
    for criterion in with_operator(name):
        expected = in_torch(criterion, values)
        scores = kernel_score(criterion, values)
        if name in APPROXIMATE:
            torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(scores, expected), criterion.text
        assert torch.equal(kernel_mask(criterion, values, 0.5), select(expected, 0.5))
        by_pattern = kernel_mask(criterion, values, 0.5, pattern="2:4")
        assert torch.equal(by_pattern, select(expected, 0.5, pattern="2:4"))


@pytest.mark.parametrize("name", READY)
def test_every_feature_is_read_by_its_own_shape(name: str) -> None:
    values = tensors()
    for text in (f"abs(W) + {name}", name):
        criterion = Criterion.parse(text)
        expected = in_torch(criterion, values)
        assert torch.equal(kernel_score(criterion, values), expected)


WANDA = Criterion.parse("abs(W) * X")
MAGNITUDE = Criterion.parse("abs(W)")
PLAIN = Criterion.parse("W")


@pytest.fixture(autouse=True)
def no_launch_of_another_test() -> Iterator[None]:
    """Tests set what launches depend on."""
    launches._launch.cache_clear()
    yield
    launches._launch.cache_clear()


def weights(kind: str, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    normal = torch.randn(2, columns, generator=generator)
    if kind == "signed zeros":
        normal = torch.zeros(2, columns)
        normal[:, ::2] = -0.0
        normal[0, : columns // 2] = -1e-45
    kinds = {
        "continuous": normal,
        "tied": (normal * 2).round(),
        "constant": torch.ones(2, columns),
        "bfloat16": normal.bfloat16(),
        "float16": normal.half(),
        "signed zeros": normal,
        "transposed": (normal * 2).round().T.contiguous().T,
        "every second": (normal * 2).round().repeat_interleave(2, dim=1)[:, ::2],
        "extreme": torch.where(normal > 0, normal * 1e38, normal * 1e-40),
    }
    return kinds[kind]


KINDS = ["continuous", "tied", "constant", "bfloat16", "float16", "signed zeros"]
KINDS += ["transposed", "every second", "extreme"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [63, 64, 100])
def test_rows_equal_a_stable_sort(kind: str, columns: int) -> None:
    weight = weights(kind, columns)
    expected = reference.keep_rows(in_torch(PLAIN, {"W": weight}).numpy(), "0.5")
    kept = kernel_mask(PLAIN, {"W": weight}, 0.5)
    assert kept.dtype == torch.bool
    np.testing.assert_array_equal(kept.numpy(), expected)


@pytest.mark.parametrize("columns", [1, 2, 65])
@pytest.mark.parametrize("sparsity", ["0", "0.01", "0.29", "0.99"])
def test_counts_at_the_edges_equal_a_stable_sort(columns: int, sparsity: str) -> None:
    for kind in ("continuous", "tied"):
        scores = weights(kind, columns)
        expected = reference.keep_rows(scores.abs().numpy(), sparsity)
        kept = kernel_mask(MAGNITUDE, {"W": scores}, float(sparsity))
        np.testing.assert_array_equal(kept.numpy(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (1, 4), (3, 5), (7, 20)])
def test_patterns_equal_striking_out_the_lowest(kind: str, keep: int, of: int) -> None:
    weight = weights(kind, of * 5)
    expected = reference.keep_pattern(in_torch(PLAIN, {"W": weight}).numpy(), keep, of)
    kept = kernel_mask(PLAIN, {"W": weight}, 1 - keep / of, pattern=f"{keep}:{of}")
    np.testing.assert_array_equal(kept.numpy(), expected)


@pytest.mark.parametrize("compare", ["layer", "8 columns"])
def test_other_groups_select_from_the_kernels_scores(compare: str) -> None:
    values = tensors()
    assert not can_fuse(compare, "free")
    expected = select(in_torch(WANDA, values), 0.5, compare=compare)
    assert torch.equal(kernel_mask(WANDA, values, 0.5, compare=compare), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", ["0", "0.01", "0.5", "0.99"])
@pytest.mark.parametrize("widest", [112, 15])
def test_long_rows_go_in_pieces_held_or_read_again(
    monkeypatch: pytest.MonkeyPatch, kind: str, sparsity: str, widest: int
) -> None:
    monkeypatch.setattr(launches, "WIDEST_ROW", widest)
    monkeypatch.setattr(launches, "_PIECES", {})
    monkeypatch.setattr(launches, "_WIDE_PIECE", 16)
    weight = weights(kind, 100)
    expected = reference.keep_rows(in_torch(PLAIN, {"W": weight}).numpy(), sparsity)
    kept = kernel_mask(PLAIN, {"W": weight}, float(sparsity))
    np.testing.assert_array_equal(kept.numpy(), expected)


def test_a_formula_on_long_rows_selects_from_its_own_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = tensors()
    expected = select(in_torch(WANDA, values), 0.5)
    # Formulas with more inputs and steps than there are registers have only scores in pieces.
    monkeypatch.setattr(launches, "_PIECES", {})
    monkeypatch.setattr(launches, "_WIDE_PIECE", 16)
    monkeypatch.setattr(launches, "_WIDEST_BESIDE_MORE", 0)
    monkeypatch.setattr(launches, "_WIDEST", {1: 40})
    assert torch.equal(kernel_mask(WANDA, values, 0.5), expected)
    monkeypatch.setattr(launches, "WIDEST_ROW", 39)
    assert torch.equal(kernel_mask(WANDA, values, 0.5), expected)
    values["W"][1, 7] = float("nan")
    with pytest.raises(ScoreError, match="1 of 120 scores are NaN"):
        kernel_mask(WANDA, values, 0.5)


def test_only_rows_and_narrow_patterns_are_fused() -> None:
    assert can_fuse("row", "free") and not can_fuse("layer", "free")
    assert can_fuse("layer", "2:4")
    assert not can_fuse("row", "64:128")


@pytest.mark.parametrize("widest", [64, 6])
def test_ties_count_where_places_alone_decide(monkeypatch: pytest.MonkeyPatch, widest: int) -> None:
    monkeypatch.setattr(launches, "WIDEST_ROW", widest)
    monkeypatch.setattr(launches, "_PIECES", {})
    monkeypatch.setattr(launches, "_WIDE_PIECE", 8)
    rows = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 4, 5, 6, 7], [1] * 8]).float()
    rows = rows.to(DEVICE)
    assert [fused.selected(PLAIN, rows, {}, count).ties for count in (0, 3, 4, 5)] == [0, 1, 2, 1]
    pattern = parse_pattern("2:4")
    assert pattern is not None
    assert fused.selected(PLAIN, rows, {}, pattern).ties == 2


def test_a_float64_feature_and_a_missing_w_are_accepted() -> None:
    values = tensors()
    there = on_device({"X": values["X"].double()})
    scores = fused_score(WANDA, values["W"].to(DEVICE), there)
    assert torch.equal(scores.cpu(), in_torch(WANDA, values))


def test_a_parameter_that_takes_gradients_is_only_read() -> None:
    values = tensors()
    weight = torch.nn.Parameter(values["W"].to(DEVICE))
    criterion = Criterion.parse("minmax(abs(W)) * abs(W)")
    kept = fused_mask(criterion, weight, {}, 0.5)
    assert not kept.requires_grad
    assert torch.equal(kept.cpu(), select(in_torch(criterion, values), 0.5))


def test_a_missing_feature_is_named() -> None:
    with pytest.raises(StatisticsError, match="reads X but no values"):
        fused_score(WANDA, torch.ones(2, 4, device=DEVICE), {})


# What a processor makes of inf - inf has its sign bit set.
NEGATIVE_NAN = 0xFFC00000 - (1 << 32)


@pytest.mark.parametrize("bad", [0x7FC00000, NEGATIVE_NAN, 0x7F800000, 0xFF800000 - (1 << 32)])
@pytest.mark.parametrize("pattern", ["free", "2:4", "3:4", "1:2"])
@pytest.mark.parametrize(("columns", "place"), [(64, 5), (64, 63), (576, 70), (600, 599)])
def test_scores_that_are_not_finite_never_become_a_mask(
    bad: int, pattern: str, columns: int, place: int
) -> None:
    weight = weights("continuous", columns)
    weight.view(torch.int32)[1, place] = bad
    sparsity = 0.25 if pattern == "3:4" else 0.5
    with pytest.raises(ScoreError, match="are NaN and . are infinite"):
        kernel_mask(PLAIN, {"W": weight}, sparsity, pattern=pattern)


def test_an_impossible_request_is_refused_before_any_work() -> None:
    with pytest.raises(SelectionError, match="multiple of 4 columns"):
        fused_mask(PLAIN, torch.ones(2, 6), {}, 0.5, pattern="2:4")
    with pytest.raises(SelectionError, match="at least 0 and below 1"):
        fused_mask(PLAIN, torch.ones(2, 6), {}, 1.0)


def test_a_matrix_without_weights_is_refused() -> None:
    with pytest.raises(ScoreError, match="no weight"):
        kernel_mask(PLAIN, {"W": torch.ones(0, 8)}, 0.5)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("abs(W) * G**0.3 + 0.5", "abs(W) * G**0.7 + 0.25"),
        ("abs(W) * X", "abs(W) * C1"),
        ("abs(W) * sqrt(X)", "abs(W) * R1"),
    ],
)
def test_constants_and_feature_names_do_not_make_a_new_kernel(first: str, second: str) -> None:
    one, other = plan(Criterion.parse(first)), plan(Criterion.parse(second))
    assert one.source == other.source
    assert (one.inputs, one.constants) != (other.inputs, other.constants)


def test_what_is_the_same_along_an_axis_is_computed_before() -> None:
    planned = plan(Criterion.parse("abs(W) * sqrt(X) * minmax(G) + row_mean(abs(W))"))
    names = [line.split(" = ")[0] for line in planned.before.splitlines()]
    assert "torch.sqrt(X)" in planned.before and ".amax(" in planned.before
    assert set(planned.inputs) <= {"W", *names}
    assert "sqrt_rn" not in planned.source


def test_the_source_holds_nothing_of_the_formulas_text() -> None:
    planned = plan(Criterion.parse("abs(W) * log(G1) * 123.456"))
    assert "G1" not in planned.source and "123" not in planned.source
    assert planned.constants == (123.456,)


@pytest.mark.parametrize("pattern", ["free", "2:4"])
def test_a_layers_mask_is_one_kernel_and_refused_as_in_torch(
    monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    values = tensors()
    expected = score.keep_mask(MAGNITUDE, values["W"], None, 0.5, pattern=pattern)
    scored = []

    def watched(*arguments: Any) -> torch.Tensor:
        scored.append(arguments)
        return fused_score(*arguments)

    monkeypatch.setattr(score, "has_kernels", lambda tensor: True)
    monkeypatch.setattr(score, "fused_score", watched)
    weight = values["W"].to(DEVICE)
    kept = score.keep_mask(MAGNITUDE, weight, None, 0.5, pattern=pattern)
    assert torch.equal(kept.cpu(), expected) and not scored
    for criterion, bad, words in (
        (MAGNITUDE, float("nan"), "NaN or infinite"),
        (Criterion.parse("matrix_mean(abs(W))"), 1.0, "the same score"),
    ):
        weight[1, 7] = bad
        with pytest.raises(ScoreError, match=words):
            score.keep_mask(criterion, weight, None, 0.5, pattern=pattern)
    zeros = torch.zeros(3, 40, device=DEVICE)
    kept = score.keep_mask(MAGNITUDE, zeros, None, 0.5, pattern=pattern)
    assert torch.equal(kept.cpu(), select(zeros.cpu(), 0.5, pattern=pattern))
