from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunezero.errors import ModelError, RecipeError, StatisticsError, TextError
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.allocation import (
    Evidence,
    fit_to_budget,
    heavy_tail,
    owl,
    sensitivity,
    table,
)
from prunezero.pruning.recipes.word_options import HeavyTail, Owl, Sensitivity, Table
from prunezero.pruning.recipes.words import WORDS
from prunezero.pruning.spectra import spectral_exponent, tail_exponent
from prunezero.scoring.statistics import Statistics
from tests.tiny_models import tiny_batches, tiny_model

NOTHING = Evidence({}, None, None)
ALLOCATIONS = {word: row for word, row in WORDS["allocate"].items() if "weight" in row.units}
SPARSITIES = [0.0, 0.3, 0.5, 0.7, 0.95, 0.9995]


def layer_of(block: int, kind: str, weight: Tensor) -> Linear:
    """A layer with this weight [out, in], outside any model."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return Linear(f"blocks.{block}.{kind}", module, block, kind)


def uneven_layers() -> list[Linear]:
    """Three blocks, the last with one matrix, of different sizes: 12, 30, 12, 28 and 8 weights."""
    shapes = [(0, "a", 3, 4), (0, "b", 5, 6), (1, "a", 4, 3), (1, "b", 7, 4), (2, "a", 2, 4)]
    generator = torch.Generator().manual_seed(0)
    return [
        layer_of(block, kind, torch.randn(rows, columns, generator=generator))
        for block, kind, rows, columns in shapes
    ]


def removed_share(ratios: dict[str, float], layers: list[Linear]) -> float:
    sizes = np.array([layer.weight.numel() for layer in layers], dtype=np.float64)
    parts = np.array([ratios[layer.name] for layer in layers])
    return float((sizes * parts).sum() / sizes.sum())


def tiny_evidence(family: str = "llama") -> tuple[list[Linear], Evidence]:
    model, windows = tiny_model(family), tiny_batches(4, 12)
    layers = find_linears(model.model)
    sums = frozenset[str]().union(*(row.sums for row in ALLOCATIONS.values()))
    return layers, Evidence(calibrate(model, windows, layers, sums), model, windows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("word", sorted(ALLOCATIONS))
def test_every_allocation_removes_what_was_asked_for_of_all_weights(word: str, family: str) -> None:
    layers, evidence = tiny_evidence(family)
    layers = layers[1:]  # blocks of unequal size
    numbers = {"ratios": {layers[-1].name: 0.5}} if word == "table" else {}
    options = ALLOCATIONS[word].options.model_validate(numbers)
    for sparsity in SPARSITIES:
        ratios = ALLOCATIONS[word].function(layers, sparsity, options, evidence)
        assert list(ratios) == [layer.name for layer in layers]
        assert all(0 <= ratio < 1 for ratio in ratios.values())
        assert removed_share(ratios, layers) == pytest.approx(sparsity, abs=1e-11)


@pytest.mark.parametrize("keep", ["differences", "ratios"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_wishes_beyond_the_bounds_are_held_and_the_others_make_up(
    keep: Any, sparsity: float
) -> None:
    layers = uneven_layers()
    wishes = dict(zip([layer.name for layer in layers], [0.01, 0.2, 0.5, 2.0, 1.5], strict=True))
    ratios = fit_to_budget(wishes, layers, sparsity, keep=keep)
    assert removed_share(ratios, layers) == pytest.approx(sparsity, abs=1e-11)
    free = [name for name in wishes if 0 < ratios[name] < max(0.999, sparsity)]
    moved = np.subtract if keep == "differences" else np.divide
    moves = [float(moved(ratios[name], wishes[name])) for name in free]
    assert moves == pytest.approx([moves[0]] * len(moves) if moves else [], abs=1e-8)
    order = sorted(wishes, key=lambda name: wishes[name])
    assert [ratios[name] for name in order] == sorted(ratios.values())


def test_equal_wishes_give_the_sparsity_itself() -> None:
    layers = uneven_layers()
    wishes = {layer.name: 0.7 for layer in layers}
    for sparsity in (0.1, 0.29, 0.5, 0.75):
        for keep in ("differences", "ratios"):
            ratios = fit_to_budget(wishes, layers, sparsity, keep=keep)
            assert set(ratios.values()) == {sparsity}


def outlier_statistics(layers: list[Linear]) -> dict[str, Statistics]:
    """Norms of inputs with an outlier channel in blocks 1 and 2, and a dead one everywhere."""
    found = {}
    for layer in layers:
        norms = torch.ones(layer.weight.shape[1], dtype=torch.float64)
        norms[0], norms[1] = 1.0 + 30.0 * layer.block, 0.0
        found[layer.name] = Statistics(8, 2, {"input_square_sum": norms.square() * 2})
    return found


def test_owl_keeps_more_where_outliers_are_many_as_its_equations_say() -> None:
    layers = uneven_layers()
    statistics = outlier_statistics(layers)
    options = Owl(outlier=2.0, spread=0.08)
    shares = []
    for block in range(3):
        scores = np.concatenate(
            [
                (
                    np.abs(layer.weight.double().numpy())
                    * np.sqrt(statistics[layer.name].sums["input_square_sum"].numpy() / 2)
                ).ravel()
                for layer in layers
                if layer.block == block
            ]
        )
        shares.append((scores > 2.0 * scores.mean()).mean())
    assert len(set(shares)) == 3
    kept = (np.array(shares) - min(shares)) / (max(shares) - min(shares)) * 2 * 0.08
    sizes = np.array([42, 40, 8])
    kept += 0.3 - (kept * sizes).sum() / sizes.sum()
    ratios = owl(layers, 0.7, options, Evidence(statistics, None, None))
    expected = {layer.name: 1 - kept[layer.block] for layer in layers}
    assert ratios == pytest.approx(expected, abs=1e-9)


def test_owl_is_uniform_where_all_blocks_have_as_many_outliers() -> None:
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    layers = [layer_of(block, "a", weight) for block in range(2)]
    sums = {"input_square_sum": torch.ones(4, dtype=torch.float64)}
    statistics = {layer.name: Statistics(4, 1, sums) for layer in layers}
    ratios = owl(layers, 0.6, Owl(), Evidence(statistics, None, None))
    assert ratios == {"blocks.0.a": 0.6, "blocks.1.a": 0.6}


def test_owl_refuses_missing_sums_and_scores_that_are_not_finite() -> None:
    layers = uneven_layers()
    with pytest.raises(StatisticsError, match="'input_square_sum' was not collected"):
        owl(layers, 0.5, Owl(), NOTHING)
    layers[2].weight[0, 0] = float("nan")
    with pytest.raises(StatisticsError, match="scores .* of block 1 hold NaN"):
        owl(layers, 0.5, Owl(), Evidence(outlier_statistics(layers), None, None))


def give_traces(monkeypatch: pytest.MonkeyPatch, traces: list[float]) -> Evidence:
    def given(model: Any, windows: Any, layers: list[Linear], **numbers: int) -> dict[str, float]:
        assert numbers == {"sequences": 4, "samples": 1}
        return dict(zip([layer.name for layer in layers], traces, strict=True))

    monkeypatch.setattr("prunezero.pruning.allocation.hessian_traces", given)
    return Evidence({}, tiny_model(), tiny_batches(4))


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.7, 0.97])
def test_sensitivity_ranks_by_mean_eigenvalue_at_every_sparsity(
    monkeypatch: pytest.MonkeyPatch, sparsity: float
) -> None:
    layers = uneven_layers()
    # Over the 12, 30, 12, 28 and 8 weights these are means of 2, 1, -2, 3 and 4.
    evidence = give_traces(monkeypatch, [24.0, 30.0, -24.0, 84.0, 32.0])
    ratios = sensitivity(layers, sparsity, Sensitivity(spread=0.1), evidence)
    spread = min(0.1, sparsity, (1 - sparsity) / 2)
    ranks = np.array([2, 1, 0, 3, 4])
    kept = (1 - sparsity - spread) + ranks * 2 * spread / 4
    sizes = np.array([12, 30, 12, 28, 8])
    kept += 1 - sparsity - (kept * sizes).sum() / sizes.sum()
    if kept.max() <= 1:
        assert list(ratios.values()) == pytest.approx(1 - kept, abs=1e-9)
    by_rank = [list(ratios.values())[place] for place in np.argsort(ranks)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_rank[0] > by_rank[-1]


def test_sensitivity_of_one_matrix_is_the_sparsity(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = uneven_layers()[:1]
    ratios = sensitivity(layers, 0.5, Sensitivity(), give_traces(monkeypatch, [1.0]))
    assert ratios == {"blocks.0.a": 0.5}


def test_sensitivity_refuses_what_it_cannot_compute() -> None:
    layers, evidence = tiny_evidence()
    with pytest.raises(RecipeError, match="needs the model and calibration text"):
        sensitivity(layers, 0.5, Sensitivity(), NOTHING)
    with pytest.raises(TextError, match="over 9 sequences but there are only 4"):
        sensitivity(layers, 0.5, Sensitivity(sequences=9), evidence)


def pareto(exponent: float, count: int) -> Tensor:
    """Quantiles of the density x^-exponent above 1."""
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (1 - levels) ** (-1 / (exponent - 1))


def with_spectrum(values: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix [rows, columns] with these squared singular values."""
    generator = torch.Generator().manual_seed(5)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        for size in (rows, columns)
    )
    count = values.numel()
    return ((left[:, :count] * values.sqrt()) @ right[:count]).float()


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_the_exponent_of_a_pareto_spectrum_is_found(exponent: float, scale: float) -> None:
    tail = pareto(exponent, 600) * scale
    assert tail_exponent(tail) == pytest.approx(exponent, rel=0.05)
    # A rising body below the peak, as the spectra of trained matrices have.
    body = scale * torch.linspace(0.02, 1.0, 400, dtype=torch.float64).sqrt()
    assert tail_exponent(torch.cat([body, tail])) == pytest.approx(exponent, rel=0.05)


def test_the_exponent_of_random_draws_is_found_within_their_error() -> None:
    generator = torch.Generator().manual_seed(7)
    draws = torch.rand(2000, generator=generator, dtype=torch.float64) ** (-1 / 1.5)
    assert tail_exponent(draws) == pytest.approx(2.5, abs=3 * 1.5 / 1500**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exponent_of_a_matrix_is_that_of_its_squared_singular_values(
    dtype: torch.dtype,
) -> None:
    values = pareto(2.5, 60)
    for matrix in (with_spectrum(values, 60, 80), with_spectrum(values, 80, 70)):
        found = spectral_exponent(matrix.to(dtype), layer="a")
        assert found == pytest.approx(2.5, rel=0.15)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3, 4), "'a' has 0 singular values above rounding"),
        (torch.ones(3, 4), "'a' has 1 singular values above rounding"),
        (torch.eye(4), "'a' has 4 singular values above rounding, which hold no tail"),
        (torch.full((2, 2), float("inf")), "'a' holds NaN or infinite"),
    ],
)
def test_a_matrix_without_a_tail_is_refused_by_name(weight: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spectral_exponent(weight, layer="a")


def test_heavy_tails_lose_less_in_the_ratios_of_the_spread() -> None:
    exponents = {0: (2.0, 3.0), 1: (4.0, 5.0), 2: (1.5, 2.0)}
    layers = [
        layer_of(block, kind, with_spectrum(pareto(exponent, 100), 100, 100 + 20 * block))
        for block, pair in exponents.items()
        for kind, exponent in zip("ab", pair, strict=True)
    ]
    ratios = heavy_tail(layers, 0.5, HeavyTail(spread=0.3), NOTHING)
    first, last = ratios["blocks.2.a"], ratios["blocks.1.a"]
    assert last / first == pytest.approx(1.3 / 0.7)
    # Means of 2.5, 4.5 and 1.75: the first block stands at 0.75 / 2.75 of the way.
    assert ratios["blocks.0.a"] / first == pytest.approx((0.7 + 0.6 * 0.75 / 2.75) / 0.7, rel=0.05)
    assert all(ratios[f"blocks.{block}.a"] == ratios[f"blocks.{block}.b"] for block in range(3))
    assert removed_share(ratios, layers) == pytest.approx(0.5, abs=1e-11)


def test_a_table_scales_its_ratios_and_the_last_match_counts() -> None:
    layers = uneven_layers()
    ratios = {"a": 0.5, "re:blocks\\.1": 0.25, "blocks.2.a": 0.0}
    wishes = np.array([0.5, 1.0, 0.25, 0.25, 0.0])
    sizes = np.array([12, 30, 12, 28, 8])
    expected = wishes * 0.3 * sizes.sum() / (wishes * sizes).sum()
    found = table(layers, 0.3, Table(ratios=ratios), NOTHING)
    assert list(found.values()) == pytest.approx(expected, abs=1e-11)


def test_a_table_refuses_patterns_without_layers_and_budgets_out_of_reach() -> None:
    layers = find_linears(tiny_model().model)
    with pytest.raises(ModelError, match="'qproj' matches no layer; did you mean 'q_proj'"):
        table(layers, 0.5, Table(ratios={"qproj": 0.5}), NOTHING)
    with pytest.raises(RecipeError, match="sparsity 0.5 is out of reach: .* at most"):
        table(layers, 0.5, Table(ratios={"re:mlp": 0}), NOTHING)
    with pytest.raises(RecipeError, match="out of reach"):
        table(layers, 0.0, Table(ratios={"re:.": 0}), NOTHING)
