"""Allocation: how much each layer loses, so that the model loses the sparsity asked for.

Each way to allocate only says which layers should lose more than others. `fit_to_budget` moves
those wishes, all alike, until the weights that go are exactly the share asked for.

The functions of a recipe's words at `allocate` take layers, the sparsity of the whole, the word's
numbers and `Evidence`, and give the sparsity by layer name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from prunezero.errors import RecipeError, StatisticsError
from prunezero.models.anatomy.linears import Linear, matching
from prunezero.models.observing.hessian_trace import hessian_traces
from prunezero.pruning.budget import Budget
from prunezero.pruning.selecting import shares_of
from prunezero.pruning.spectra import spectral_exponent
from prunezero.scoring.feature_values import feature
from prunezero.scoring.statistics import Statistics

if TYPE_CHECKING:
    from prunezero.models.anatomy.groups import Group
    from prunezero.models.loading.language_model import LanguageModel
    from prunezero.pruning.recipes.recipe import Recipe
    from prunezero.pruning.recipes.word_options import HeavyTail, Options, Owl, Sensitivity, Table

Key = TypeVar("Key", int, str)

# A matrix that loses all its weights passes nothing on; one in a thousand stays.
CEILING = 0.999


@dataclass(frozen=True)
class Evidence:
    """What an allocation may look at."""

    statistics: Mapping[str, Statistics]
    """sums over the dense model by layer name, those of the allocation's row"""
    language_model: LanguageModel | None
    """dense"""
    windows: Tensor | None
    """calibration token ids [count, length]"""
    recipe: Recipe | None = None
    """whose allocation it is"""
    groups: Sequence[Group] = ()
    """of units that it removes"""
    held_out: Tensor | None = None
    """calibration token ids [count, length] that the statistics have not seen, for trials"""
    memo: dict[str, Any] = field(default_factory=dict)
    """what an allocation has measured, for the next sparsity of a schedule"""


def uniform(
    layers: Sequence[Linear], sparsity: float, options: Options, evidence: Evidence
) -> dict[str, float]:
    """Every layer loses the same fraction: the choice of magnitude, Wanda, RIA and others.

    Groups that lose units each by itself make up for those that cannot, see `shares_of`.

    Raises:
        SelectionError: they do not have so much.
    """
    ratios, recipe = {layer.name: sparsity for layer in layers}, evidence.recipe
    if recipe is not None and recipe.compare == "group":
        budget = Budget(sparsity, measure=recipe.unit.measure)
        shares = shares_of(evidence.groups, budget)
        for group in evidence.groups:
            for member in group.members:
                ratios[member.linear.name] = shares[group.name]
    return ratios


def owl(
    layers: Sequence[Linear], sparsity: float, options: Owl, evidence: Evidence
) -> dict[str, float]:
    """Blocks with more outliers among their scores |W| X lose less.

    The share of outliers in a block is mapped linearly to kept fractions that span twice
    `options.spread`; all matrices of a block lose the same. Blocks with equal shares lose the same.

    Raises:
        StatisticsError: `input_square_sum` is missing for a layer, or a score is not finite.

    Source: Yin et al. 2024 (ICML), arXiv:2310.05175.
    """
    shares = {
        block: _outlier_share(inside, evidence.statistics, options.outlier)
        for block, inside in _by_block(layers).items()
    }
    wishes = _stretched(shares, sparsity + options.spread, sparsity - options.spread)
    by_layer = {layer.name: wishes[layer.block] for layer in layers}
    return fit_to_budget(by_layer, layers, sparsity, keep="differences")


def sensitivity(
    layers: Sequence[Linear], sparsity: float, options: Sensitivity, evidence: Evidence
) -> dict[str, float]:
    """Matrices along whose weights the loss curves more lose less.

    Matrices are ranked by the mean eigenvalue of the loss's Hessian, its trace over the number of
    weights; kept fractions rise with the rank in equal steps, from 1 - sparsity - spread to
    1 - sparsity + spread. Where that would leave a matrix less than half of the mean, or more than
    it has, the spread is narrower, so the order holds at any sparsity.

    Raises:
        RecipeError: the evidence has no model or no windows.
        TextError, StatisticsError: as `hessian_traces`.

    Source: Shao et al. 2024 (ICASSP), arXiv:2310.09499.
    """
    if evidence.language_model is None or evidence.windows is None:
        raise RecipeError("allocate sensitivity needs the model and calibration text; give both")
    if "traces" not in evidence.memo:
        evidence.memo["traces"] = hessian_traces(
            evidence.language_model,
            evidence.windows,
            layers,
            sequences=options.sequences,
            samples=options.samples,
        )
    traces = evidence.memo["traces"]
    ranked = sorted(layers, key=lambda layer: traces[layer.name] / layer.weight.numel())
    ranks = {layer.name: float(rank) for rank, layer in enumerate(ranked)}
    spread = min(options.spread, sparsity, (1 - sparsity) / 2)
    wishes = _stretched(ranks, sparsity + spread, sparsity - spread)
    return fit_to_budget(wishes, layers, sparsity, keep="differences")


def heavy_tail(
    layers: Sequence[Linear], sparsity: float, options: HeavyTail, evidence: Evidence
) -> dict[str, float]:
    """Blocks whose weights have heavier-tailed spectra lose less; no calibration text is needed.

    The mean exponent of a block's matrices is mapped linearly to ratios from 1 - spread to
    1 + spread, which one factor scales to the sparsity; all matrices of a block lose the same.

    Raises:
        ModelError: a matrix has no spectrum to fit, see `spectral_exponent`.

    Source: Lu et al. 2024 (NeurIPS), arXiv:2410.10912.
    """
    if "exponents" not in evidence.memo:
        evidence.memo["exponents"] = _block_exponents(layers)
    exponents = evidence.memo["exponents"]
    wishes = _stretched(exponents, 1 - options.spread, 1 + options.spread)
    by_layer = {layer.name: wishes[layer.block] for layer in layers}
    return fit_to_budget(by_layer, layers, sparsity, keep="ratios")


def _block_exponents(layers: Sequence[Linear]) -> dict[int, float]:
    """The mean exponent of the matrices of each block."""
    return {
        block: sum(spectral_exponent(layer.weight, layer=layer.name) for layer in inside)
        / len(inside)
        for block, inside in _by_block(layers).items()
    }


def table(
    layers: Sequence[Linear], sparsity: float, options: Table, evidence: Evidence
) -> dict[str, float]:
    """Layers lose in the ratios that the recipe gives by pattern, scaled to the sparsity.

    The last pattern that matches a layer counts; a layer that none matches has ratio 1.

    Raises:
        ModelError: a pattern matches none of the layers.
        RecipeError: too few weights lie in layers with a ratio above 0.
    """
    wishes = {layer.name: 1.0 for layer in layers}
    for pattern, ratio in options.ratios.items():
        wishes |= dict.fromkeys(matching(pattern, layers), ratio)
    return fit_to_budget(wishes, layers, sparsity, keep="ratios")


def fit_to_budget(
    wishes: Mapping[str, float],
    layers: Sequence[Linear],
    sparsity: float,
    *,
    keep: Literal["differences", "ratios"],
) -> dict[str, float]:
    """Sparsity by layer name, so that the given fraction of all weights goes (to 12 decimals).

    One number is added to all wishes, or multiplies them. What then lies outside the range from 0
    to `CEILING` (to the sparsity itself, where that is higher) is held at its end, and the others
    make up for it.

    Args:
        wishes: by layer name; for ratios at least 0.
        layers: whose weights, all together, are the budget.
        sparsity: fraction to remove, at least 0 and below 1.
        keep: what the move leaves as it is between layers that are not held.

    Raises:
        RecipeError: layers that wish for a ratio of 0 hold too many of the weights.
    """
    ceiling = max(CEILING, sparsity)
    low, high = -max(wishes.values()), ceiling - min(wishes.values())
    if keep == "ratios":
        _refuse_unreachable(wishes, layers, sparsity, ceiling)
        low, high = 0.0, ceiling / min(filter(None, wishes.values()))
    for _ in range(200):
        middle = (low + high) / 2
        if _removed_share(_held(wishes, middle, keep, ceiling), layers) <= sparsity:
            low = middle
        else:
            high = middle
    # Counts round down: a ratio an ulp below 3/4 would spare one more weight in every row.
    ratios = _held(wishes, low, keep, ceiling)
    return {layer.name: round(ratios[layer.name], 12) for layer in layers}


def _held(wishes: Mapping[str, float], move: float, keep: str, ceiling: float) -> dict[str, float]:
    moved = operator.mul if keep == "ratios" else operator.add
    return {name: min(max(moved(wish, move), 0.0), ceiling) for name, wish in wishes.items()}


def _removed_share(ratios: Mapping[str, float], layers: Sequence[Linear]) -> float:
    removed = math.fsum(ratios[layer.name] * layer.weight.numel() for layer in layers)
    return removed / sum(layer.weight.numel() for layer in layers)


def _refuse_unreachable(
    wishes: Mapping[str, float], layers: Sequence[Linear], sparsity: float, ceiling: float
) -> None:
    open_layers = {name: float(wish > 0) for name, wish in wishes.items()}
    most = ceiling * _removed_share(open_layers, layers)
    if most < sparsity or most == 0:
        raise RecipeError(
            f"sparsity {sparsity:g} is out of reach: layers with ratio 0 lose nothing, and the "
            f"others can lose {most:.3g} of all weights at most; ask for less, or give fewer "
            "layers ratio 0"
        )


def _by_block(layers: Sequence[Linear]) -> dict[int, list[Linear]]:
    blocks: dict[int, list[Linear]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(layer)
    return blocks


def _stretched(values: Mapping[Key, float], first: float, last: float) -> dict[Key, float]:
    """The values on a line that takes the lowest to `first` and the highest to `last`.

    Equal values all go to the middle.
    """
    lowest, highest = min(values.values()), max(values.values())
    if lowest == highest:
        return dict.fromkeys(values, (first + last) / 2)
    step = (last - first) / (highest - lowest)
    return {key: first + step * (value - lowest) for key, value in values.items()}


def _outlier_share(
    layers: Sequence[Linear], statistics: Mapping[str, Statistics], outlier: float
) -> float:
    """Share of the scores |W| X of all matrices together above `outlier` times their mean."""
    total = sum(float(_products(layer, statistics).sum(dtype=torch.float64)) for layer in layers)
    if not math.isfinite(total):
        raise StatisticsError(
            f"the scores |W| X of block {layers[0].block} hold NaN or infinite numbers; "
            "check that the model itself is sound"
        )
    count = sum(layer.weight.numel() for layer in layers)
    # The scores are made again, so that only one matrix of them exists at a time.
    threshold = outlier * total / count
    return sum(int((_products(layer, statistics) > threshold).sum()) for layer in layers) / count


def _products(layer: Linear, statistics: Mapping[str, Statistics]) -> Tensor:
    norms = feature("X", layer.weight, statistics.get(layer.name))
    return layer.weight.float().abs() * norms
