"""The one loop: block after block, layer after layer, scores become masks become zeros.

With dense statistics every layer is judged by what it saw in the dense model. With sequential
statistics each block sees what the already pruned blocks before it make of the calibration text,
as Wanda and SparseGPT do it. Gradients always come from the dense model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from prunezero.errors import RecipeError, SelectionError
from prunezero.formula.features import FEATURES
from prunezero.models.calibration import FORWARD_SUMS, BlockWalk
from prunezero.models.language_model import LanguageModel
from prunezero.models.units import Layer, find_layers
from prunezero.pruning.allocation import ALLOCATIONS
from prunezero.pruning.recipe import Recipe
from prunezero.pruning.update import UPDATES
from prunezero.scoring.request import check_request, group_columns, pattern_sparsity, removed_count
from prunezero.scoring.score import keep_mask, score
from prunezero.scoring.selection import select_model
from prunezero.scoring.statistics import Statistics, needed_sums

# Told how many layers are done, and the total.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What pruning did to a model."""

    sparsity: float
    """the fraction that was asked for"""
    pattern: str
    """free or N:M"""
    zeros: int
    """weights of the pruned layers that are now exactly zero"""
    total: int
    """weights of the pruned layers"""
    seconds: float
    """elapsed, calibration of sequential statistics included"""

    @property
    def sparsity_reached(self) -> float:
        """The fraction of the layers' weights that are zero."""
        return self.zeros / self.total


def prune(
    language_model: LanguageModel,
    recipe: Recipe,
    sparsity: float | None = None,
    *,
    statistics: Mapping[str, Statistics] | None = None,
    windows: Tensor | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Prune a model in place.

    Weights that are zero already count towards the sparsity like any other weight.

    Args:
        language_model: modified; after an error some of its layers may be pruned already.
        recipe: the choices; `recipe.pattern` may fix the sparsity.
        sparsity: fraction to remove; may be left out with an N:M pattern.
        statistics: sums of the dense model by layer name, those of `dense_sums(recipe)`.
        windows: calibration token ids `[count, length]`, for sequential statistics.
        progress: told (layers done, layers in all).

    Raises:
        SelectionError: the sparsity, group or pattern fits no mask of some layer.
        ScoreError: the criterion gives a layer scores that rank nothing.
        ModelError: `targets` or `ignore` match nothing.
        RecipeError: choices that exclude each other.
    """
    begin = time.perf_counter()
    fraction = settled_sparsity(recipe.pattern, sparsity)
    layers = check_recipe(language_model, recipe, fraction)
    known = dict(statistics or {})
    ratios = ALLOCATIONS[recipe.allocate](layers, fraction)
    masks = _model_wide_masks(recipe, layers, known, fraction)
    walk = _walk(language_model, recipe, windows)
    done = 0
    for block, members in groupby(layers, key=lambda layer: layer.block):
        inside = list(members)
        known |= _seen_by_pruned(walk, block, inside, recipe, known)
        for layer in inside:
            mask = masks.get(layer.name)
            if mask is None:
                mask = _mask(recipe, layer, known.get(layer.name), ratios[layer.name])
            UPDATES[recipe.update](layer.weight, mask)
            done += 1
            if progress is not None:
                progress(done, len(layers))
        if walk is not None:
            walk.advance(block)
    outcome = Outcome(
        fraction,
        recipe.pattern,
        sum(int((layer.weight == 0).sum()) for layer in layers),
        sum(layer.weight.numel() for layer in layers),
        time.perf_counter() - begin,
    )
    _check_reached(outcome, recipe, layers, ratios)
    return outcome


def settled_sparsity(pattern: str, sparsity: float | None) -> float:
    """The fraction to remove: as asked for, or as an N:M pattern implies.

    Raises:
        SelectionError: nothing says how much to remove, or both do and disagree.
    """
    implied = pattern_sparsity(pattern)
    if sparsity is None:
        if implied is None:
            raise SelectionError("say how much to remove, for example --sparsity 0.5")
        return implied
    if implied is not None and abs(implied - sparsity) > 1e-6:
        raise SelectionError(
            f"pattern {pattern} removes exactly {implied:g} of the weights, not {sparsity:g}; "
            "leave --sparsity out or choose another pattern"
        )
    removed_count(1, sparsity)
    return sparsity


def dense_sums(recipes: Sequence[Recipe]) -> frozenset[str]:
    """Names of the sums over the dense model that these recipes need.

    Raises:
        RecipeError: a criterion uses a feature that is reserved for a later version.
    """
    needed: set[str] = set()
    for recipe in recipes:
        _refuse_reserved(recipe)
        sums = needed_sums([recipe.criterion])
        needed |= sums - FORWARD_SUMS if recipe.statistics == "sequential" else sums
    return frozenset(needed)


def check_recipe(language_model: LanguageModel, recipe: Recipe, sparsity: float) -> list[Layer]:
    """The layers that a recipe prunes, after every check that needs no computation.

    Raises:
        RecipeError, ModelError, SelectionError: as `prune`.
    """
    _refuse_reserved(recipe)
    if recipe.compare == "model" and recipe.statistics == "sequential":
        raise RecipeError(
            f"recipe {recipe.name}: compare 'model' ranks all layers before the first is pruned, "
            "so it needs statistics 'dense'"
        )
    layers = find_layers(language_model.model, targets=recipe.targets, ignore=recipe.ignore)
    for layer in layers:
        try:
            check_request(
                layer.weight.shape[1], sparsity, compare=recipe.compare, pattern=recipe.pattern
            )
        except SelectionError as error:
            raise SelectionError(f"layer {layer.name}: {error}") from error
    return layers


class DenseWeights:
    """A copy of the layers' weights, to bring the dense model back after a measurement."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._copies = [(layer, layer.weight.clone()) for layer in layers]

    def restore(self) -> None:
        """Write the copies back into the model."""
        for layer, copy in self._copies:
            layer.weight.copy_(copy)


def _refuse_reserved(recipe: Recipe) -> None:
    reserved = [name for name in recipe.criterion.features if not FEATURES[name].ready]
    if reserved:
        raise RecipeError(
            f"recipe {recipe.name}: feature '{reserved[0]}' ({FEATURES[reserved[0]].meaning}) is "
            "reserved for a later version; use another feature"
        )


def _walk(
    language_model: LanguageModel, recipe: Recipe, windows: Tensor | None
) -> BlockWalk | None:
    sums = needed_sums([recipe.criterion]) & FORWARD_SUMS
    if recipe.statistics == "dense" or not sums:
        return None
    if windows is None:
        raise RecipeError(f"recipe {recipe.name}: sequential statistics need calibration text")
    return BlockWalk(language_model, windows)


def _seen_by_pruned(
    walk: BlockWalk | None,
    block: int,
    layers: list[Layer],
    recipe: Recipe,
    known: Mapping[str, Statistics],
) -> dict[str, Statistics]:
    """Statistics of one block behind already pruned ones, with the dense gradients beside them."""
    if walk is None:
        return {}
    while walk.position < block:
        walk.advance(walk.position)
    seen = walk.observe(block, layers, needed_sums([recipe.criterion]) & FORWARD_SUMS)
    for name, statistics in seen.items():
        if name in known:
            statistics.sums |= {
                key: value for key, value in known[name].sums.items() if key not in FORWARD_SUMS
            }
    return seen


def _mask(recipe: Recipe, layer: Layer, statistics: Statistics | None, ratio: float) -> Tensor:
    return keep_mask(
        recipe.criterion,
        layer.weight,
        statistics,
        ratio,
        compare=recipe.compare,
        pattern=recipe.pattern,
        layer=layer.name,
    )


def _model_wide_masks(
    recipe: Recipe, layers: Sequence[Layer], known: Mapping[str, Statistics], sparsity: float
) -> dict[str, Tensor]:
    if recipe.compare != "model" or recipe.pattern != "free":
        return {}
    scores = [
        score(recipe.criterion, layer.weight, known.get(layer.name), layer=layer.name)
        for layer in layers
    ]
    names = [layer.name for layer in layers]
    return dict(zip(names, select_model(scores, sparsity), strict=True))


def _check_reached(
    outcome: Outcome, recipe: Recipe, layers: Sequence[Layer], ratios: Mapping[str, float]
) -> None:
    """A sparsity that was not reached is an error of ours, and never passes in silence."""
    wanted = sum(expected_zeros(layer.weight.shape, recipe, ratios[layer.name]) for layer in layers)
    if recipe.compare == "model" and recipe.pattern == "free":
        wanted = removed_count(outcome.total, outcome.sparsity)
    if outcome.zeros < wanted:
        raise SelectionError(
            f"recipe {recipe.name} reached {outcome.zeros} zeros of {wanted} that were asked for; "
            "please report this"
        )


def expected_zeros(shape: torch.Size, recipe: Recipe, sparsity: float) -> int:
    """How many weights of a matrix `[out, in]` a recipe removes; each group rounds down."""
    rows, columns = shape
    if recipe.compare == "row" or recipe.pattern != "free":
        return rows * removed_count(columns, sparsity)
    return sum(removed_count(rows * width, sparsity) for width in _group_widths(recipe, columns))


def _group_widths(recipe: Recipe, columns: int) -> Iterator[int]:
    width = group_columns(recipe.compare) or columns
    for start in range(0, columns, width):
        yield min(width, columns - start)
