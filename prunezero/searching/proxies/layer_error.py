"""Proxy for single weights: masks and layer errors of a recipe, on sampled rows of every layer.

The layer error is sum_i d_i^2 e_i H e_i' / sum_i d_i^2 w_i H w_i' over the sampled rows i of a
layer, averaged over layers, with w_i a row of weights, e_i its removed part, H the Gram matrix of
the inputs and d_i the root mean square of the loss gradient at that output: the Fisher weight that
K-FAC would give it. It tells good formulas from bad (on the demo model, Kendall's tau with
perplexity is 0.9 over published and random formulas) and hardly the best from the good (0.45 over
those that a search measured), so it gates and never decides; `benchmarks/rungs.py` measures it.
On 4 % of the rows it orders formulas as on all of them (tau 0.996 over 56 formulas).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunezero.formula.criterion import Criterion
from prunezero.pruning.budget import Budget
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.scoring.masking import cleared
from prunezero.scoring.population import select_stacked, stacked_scores
from prunezero.scoring.score import refuse_unusable
from prunezero.scoring.selection import select_model
from prunezero.searching.proxies.samples import Stack


@dataclass(frozen=True)
class WeightSamples:
    """Rows of layers, in stacks of one shape."""

    stacks: Sequence[Stack]

    def scores(self, criteria: Sequence[Criterion], damping: float) -> Iterator[list[Tensor]]:
        """What `masks_under` needs of each formula: on a GPU they are scored together."""
        return scores_on([stack.at_damping(damping) for stack in self.stacks], criteria)

    def masks_under(
        self,
        recipe: Recipe,
        budgets: Iterable[Budget],
        scores: Sequence[Tensor] | None = None,
    ) -> Iterator[list[Tensor]]:
        """The masks of all samples under each budget, one after the other.

        Args:
            scores: what `scores` says of its criterion, where that is known.

        Raises:
            ScoreError: the scores are not finite, or rank nothing.
        """
        merged = merged_scores(self.stacks, recipe, scores)
        for budget in budgets:
            yield masks_on(self.stacks, recipe, budget.amount, budget.pattern, scores=merged)

    def error(self, recipe: Recipe, masks: Sequence[Tensor]) -> float:
        """What `layer_error` says; how the weights that stay are mended is not seen."""
        return layer_error(self.stacks, masks)


def scores_on(stacks: Sequence[Stack], criteria: Sequence[Criterion]) -> Iterator[list[Tensor]]:
    """The scores of each formula in turn on sampled rows, each float32 `[layers, rows, in]`."""
    return map(
        list,
        zip(
            *(stacked_scores(criteria, stack.features, stack.weight.shape) for stack in stacks),
            strict=True,
        ),
    )


def merged_scores(
    stacks: Sequence[Stack], recipe: Recipe, scores: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The scores of a recipe on sampled rows, those of each layer by the formula that it has.

    Args:
        scores: what `scores_on` says of its criterion, where that is known.
    """
    if not stacks:
        return []
    stacks = [stack.at_damping(recipe.damping) for stack in stacks]
    merged = list(next(scores_on(stacks, [recipe.criterion])) if scores is None else scores)
    for own in dict.fromkeys(recipe.criteria.values()):
        for place, stack in enumerate(stacks):
            here = [recipe.criterion_of(name) == own for name in stack.names]
            if any(here):
                ((instead,),) = scores_on([stack], [own])
                chosen = torch.tensor(here, device=instead.device)[:, None, None]
                merged[place] = torch.where(chosen, instead, merged[place])
    return merged


def masks_on(
    stacks: Sequence[Stack],
    recipe: Recipe,
    sparsity: float,
    pattern: str,
    *,
    scores: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The masks of a recipe on sampled rows, each bool `[layers, rows, in]`, True = keep.

    Args:
        pattern: in place of the recipe's own.
        scores: what `merged_scores` says of the recipe, where that is known.

    Raises:
        ScoreError: the scores are not finite, or rank nothing.
    """
    if not stacks:
        return []
    scores = merged_scores(stacks, recipe) if scores is None else scores
    for stack, values, place in _unusable(scores, stacks):
        name = stack.names[place]
        refuse_unusable(values[place], recipe.criterion_of(name), stack.weight[place], name)
    if recipe.compare == "model" and pattern == "free":
        return select_model(scores, sparsity)
    request: dict[str, Any] = {"compare": recipe.compare, "pattern": pattern, "is_finite": True}
    return [select_stacked(values, sparsity, **request) for values in scores]


def _unusable(
    scores: Sequence[Tensor], stacks: Sequence[Stack]
) -> Iterator[tuple[Stack, Tensor, int]]:
    """Stack, its scores and the place in it of each layer whose scores may be of no use."""
    places = [
        (stack, values, place)
        for stack, values in zip(stacks, scores, strict=True)
        for place in range(len(values))
    ]
    # One wait for the device, whatever the number of stacks.
    bounds = [torch.stack(torch.aminmax(values.flatten(1), dim=1), dim=1) for values in scores]
    lowest, highest = torch.cat([one.to(bounds[0].device) for one in bounds]).cpu().numpy().T
    fits = (lowest < highest) & np.isfinite(lowest) & np.isfinite(highest)
    yield from (places[at] for at in np.flatnonzero(~fits))


def mask_digest(masks: Sequence[Tensor]) -> str:
    """Thirty-two hexadecimal digits that are equal for equal masks."""
    digest = hashlib.blake2b(digest_size=16)
    for mask in masks:
        digest.update(np.packbits(mask.cpu().numpy()).tobytes())
    return digest.hexdigest()


def layer_error(stacks: Sequence[Stack], masks: Sequence[Tensor]) -> float:
    """The gradient-weighted share of the layers' outputs that the masks lose, 0 to about 1."""
    shares = [
        stack.energy(cleared(stack.weight, ~mask)) / stack.whole_energy
        for stack, mask in zip(stacks, masks, strict=True)
    ]
    return float(torch.cat(shares).mean())
