"""Every file of `baselines/` loads, and its mask is what its paper's equation says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prunezero.pruning.recipes.recipe import Recipe, folder, published_of, published_recipes
from prunezero.pruning.recipes.staged import load_recipe
from prunezero.scoring.score import keep_mask
from prunezero.scoring.statistics import Statistics
from tests.scoring import reference

NAMES = [recipe.name for recipe in published_of("weight")]
EVERY = sorted(published_recipes())
# Every comparison group and pattern that a matrix of 24 columns can have.
CHOICES = [("row", "free"), ("layer", "free"), ("8 columns", "free"), ("5 columns", "free")]
CHOICES += [("row", "2:4"), ("row", "4:8"), ("row", "1:3")]


def example(
    dtype: torch.dtype, *, rows: int = 7, columns: int = 24, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, Statistics]:
    """A weight with ties, zeros and a dead input channel, and the statistics of its layer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[:, 1::3] = (weight[:, 1::3] * 4).round() / 4
    weight[2] = 0.0
    weight = weight.to(dtype)
    inputs = torch.randn(3, 5, columns, generator=generator)
    inputs[..., 4] = 0.0
    names = ("input_square_sum", "gram", "gradient_square_sum", "gradient_absolute_sum")
    statistics = Statistics.empty(names, rows, columns)
    statistics.add_inputs(inputs)
    for _ in range(3):
        statistics.add_gradient(torch.randn(rows, columns, generator=generator) * 1e-2)
    return weight, inputs, statistics


def numpy_values(
    weight: torch.Tensor, inputs: torch.Tensor, statistics: Statistics
) -> dict[str, Any]:
    squares = inputs.numpy().astype(np.float64) ** 2
    norm = np.sqrt(squares.reshape(-1, inputs.shape[-1]).sum(0) / inputs.shape[0])
    rows = inputs.reshape(-1, inputs.shape[-1]).numpy()
    gram = (rows.T @ rows).astype(np.float64) / inputs.shape[0]
    alive = np.diag(gram)[np.diag(gram) != 0]
    diagonal = np.where(np.diag(gram) == 0, alive.mean(), np.diag(gram))
    damped = gram - np.diag(np.diag(gram)) + np.diag(diagonal + 0.01 * diagonal.mean())
    inverse = np.linalg.inv(damped)
    return {
        "H": np.diag(gram).astype(np.float32)[None],
        "V": np.diag(inverse).astype(np.float32)[None],
        "U": np.diag(np.linalg.cholesky(inverse)).astype(np.float32)[None],
        "W": weight.float().numpy(),
        "X": norm.astype(np.float32)[None],
        "G": np.sqrt(statistics.sums["gradient_square_sum"].numpy()),
        "G1": statistics.sums["gradient_absolute_sum"].numpy(),
    }


def numpy_mask(scores: np.ndarray, compare: str, pattern: str, sparsity: float) -> np.ndarray:
    if pattern != "free":
        keep, of = map(int, pattern.split(":"))
        return reference.keep_pattern(scores, keep, of)
    if compare == "row":
        return reference.keep_rows(scores, str(sparsity))
    if compare == "layer":
        return reference.keep_layer(scores, str(sparsity))
    return reference.keep_blocks(scores, str(sparsity), int(compare.split()[0]))


def test_the_folder_holds_the_methods_that_the_readme_promises() -> None:
    promised = {"magnitude", "magnitude_row", "ri", "ria", "wanda", "gblm", "pruner_zero"}
    assert promised | {"obd", "fisher"} <= set(NAMES)
    assert set(NAMES) == set(reference.FORMULAS)


@pytest.mark.parametrize("name", EVERY)
def test_a_recipe_says_where_it_comes_from_and_how_to_run_it(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.source
    first, *_ = (folder("baselines") / f"{name}.yaml").read_text().splitlines()
    is_run_time = isinstance(recipe, Recipe) and recipe.unit.row.domain.is_run_time
    # The demo model has no experts.
    model = "./mixture" if recipe.unit.word == "expert" else "demo"
    prune = f"prunezero prune --model {model} --recipe"
    command = "python benchmarks/attention.py --recipes" if is_run_time else prune
    assert f"{first} ".startswith(f"# {command} {name} ")
    for result in recipe.published:
        assert {"model", "sparsity", "pattern", "sequence_length", "perplexity"} <= set(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("compare", "pattern"), CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_its_mask_equals_numpy_bit_for_bit(
    name: str, compare: str, pattern: str, dtype: torch.dtype
) -> None:
    criterion = Recipe.load(name).criterion
    sparsity = {"free": 0.29, "1:3": 2 / 3}.get(pattern, 0.5)
    for seed in range(3):
        weight, inputs, statistics = example(dtype, seed=seed)
        values = numpy_values(weight, inputs, statistics)
        expected = numpy_mask(reference.FORMULAS[name](values), compare, pattern, sparsity)
        mask = keep_mask(criterion, weight, statistics, sparsity, compare=compare, pattern=pattern)
        assert np.array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_its_mask_equals_numpy_on_odd_sizes_and_transposed_weights(name: str) -> None:
    criterion = Recipe.load(name).criterion
    for rows, columns in ((1, 3), (5, 63), (33, 65), (3, 1)):
        weight, inputs, statistics = example(
            torch.float32, rows=max(rows, 3), columns=max(columns, 5)
        )
        expected = reference.FORMULAS[name](numpy_values(weight, inputs, statistics))
        transposed = weight.T.contiguous().T
        mask = keep_mask(criterion, transposed, statistics, 0.5)
        assert np.array_equal(mask.numpy(), reference.keep_rows(expected, "0.5"))


def test_a_dead_input_channel_has_a_finite_score_and_is_pruned_first() -> None:
    weight, _, statistics = example(torch.float32)
    for name in ("wanda", "ria", "gblm", "obd"):
        criterion = Recipe.load(name).criterion
        if name == "gblm":
            # The gradient of a weight behind a dead input is zero too.
            statistics.sums["gradient_absolute_sum"][:, 4] = 0.0
        assert not keep_mask(criterion, weight, statistics, 0.29)[:, 4].any()
