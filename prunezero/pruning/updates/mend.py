"""How are the weights that stay mended, once a mask is chosen, and how does a mask get better?

Updates of a recipe run in their order, on the layers that read the same inputs together; each finds
masks and weights as the one before left them. What a mask removes is exactly +0.0 in the end. Every
function of a word at `update` takes such layers and the word's numbers, and changes both in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import ModelError, StatisticsError
from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.linears import Linear
from prunezero.models.editing.biases import compensate
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.updates.admm import refit
from prunezero.pruning.updates.dsnot import dsnot
from prunezero.pruning.updates.obs import Choose, sweep
from prunezero.pruning.updates.refit import refit_columns as least_squares
from prunezero.pruning.updates.swaps import improve_by_swaps
from prunezero.scoring.columns import ColumnScores, sees_inputs_alone
from prunezero.scoring.feature_values import feature
from prunezero.scoring.masking import clear
from prunezero.scoring.request import group_columns, parse_pattern
from prunezero.scoring.score import keep_mask, score
from prunezero.scoring.second_order import factor_of
from prunezero.scoring.selection import select, select_pattern
from prunezero.scoring.statistics import Statistics, sum_of
from prunezero.scoring.unit_features import centred


@dataclass
class Work:
    """One layer on its way from scores to mended weights."""

    recipe: Recipe
    """the choices"""
    layer: Linear
    """its weight is changed in place"""
    statistics: Statistics | None
    """of the layer"""
    sparsity: float
    """fraction of this layer to remove"""
    mask: Tensor | None = None
    """bool `[out, in]`, True = keep; None as long as nobody asked for it"""

    def __post_init__(self) -> None:
        # An update that looks back at the dense weights finds them changed by others before it.
        rows = [choice.row for choice in self.recipe.update]
        first = next((place for place, row in enumerate(rows) if row.mends), len(rows))
        looks_back = any(row.sees_dense for row in rows[first + 1 :])
        self._before = self.weight.clone() if looks_back else None

    @property
    def criterion(self) -> Criterion:
        """The formula that ranks its weights."""
        return self.recipe.criterion_of(self.layer.name)

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, of the model itself."""
        return self.layer.weight

    @cached_property
    def swept_group(self) -> int | None:
        """Columns chosen together in a sweep; None where all are chosen before it."""
        pattern = parse_pattern(self.recipe.pattern)
        return pattern.of if pattern is not None else group_columns(self.recipe.compare)

    def settled_mask(self) -> Tensor:
        """The mask as chosen before, or chosen now on the weights as they are."""
        if self.mask is None:
            self.mask = keep_mask(
                self.criterion,
                self.weight,
                self.statistics,
                self.sparsity,
                compare=self.recipe.compare,
                pattern=self.recipe.pattern,
                damping=self.recipe.damping,
                layer=self.layer.name,
            )
        return self.mask

    @property
    def dense_weight(self) -> Tensor:
        """`[out, in]`, before any update changed it."""
        return self.weight if self._before is None else self._before

    def change_in_output_mean(self) -> Tensor:
        """How far the mean output `[out]` falls by all changes to the weight, float32."""
        mean = feature("X_mean", self.weight, self.statistics)[0]
        kept = self.weight.masked_fill(~self.settled_mask(), 0.0)
        return (self.dense_weight.float() - kept.float()) @ mean


def mend(works: Sequence[Work]) -> None:
    """Choose masks, run the recipe's updates, and set what was removed to zero.

    Args:
        works: of one recipe, for layers that read the same inputs.

    Raises:
        ScoreError, StatisticsError, SelectionError: as `keep_mask`.
        FactorizationError: as `factor_of`.
    """
    for choice in works[0].recipe.update:
        choice.row.function(works, choice.options)
    for work in works:
        clear(work.weight, work.settled_mask())
        _refuse_not_finite(work)


def keep(works: Sequence[Work], options: Any) -> None:
    """Leave the weights that stay as they are."""


def obs(works: Sequence[Work], options: Any) -> None:
    """Mend by optimal brain surgery, all layers in one sweep; see `sweep`.

    Where no mask was chosen yet, groups of columns are chosen as the sweep reaches them.
    """
    first, recipe = works[0], works[0].recipe
    factor = factor_of(first.statistics, recipe.damping, layer=first.layer.name)
    group = None if first.mask is not None else first.swept_group
    heights = [work.weight.shape[0] for work in works]
    if group is None:
        masks = torch.cat([work.settled_mask() for work in works])
        choose: Choose = lambda weight, start, stop: masks[:, start:stop]  # noqa: E731
    else:
        for work in works:
            # What ranks nothing, or is not finite, is told of the whole layer at once.
            score(
                work.criterion,
                work.weight,
                work.statistics,
                damping=recipe.damping,
                layer=work.layer.name,
            )
        choose = _chooser(works)
    for work in works:
        _refuse_not_finite(work)
    stacked = torch.cat([work.weight.float() for work in works])
    mended, masks = sweep(stacked, factor, choose, group=group)
    for work, weight, mask in zip(
        works, torch.split(mended, heights), torch.split(masks, heights), strict=True
    ):
        work.mask = mask
        work.weight.copy_(weight)


def _chooser(works: Sequence[Work]) -> Choose:
    """What chooses a group of columns in all rows of stacked layers."""
    first, *others = works
    is_shared = all(work.criterion == first.criterion for work in others)
    if is_shared and first.recipe.pattern != "free" and sees_inputs_alone(first.criterion):
        # Rows do not compete, and a score says nothing of its layer: one call serves all.
        return _scored_by(first)
    heights = [work.weight.shape[0] for work in works]
    choosers = [_scored_by(work) for work in works]

    def choose(weight: Tensor, start: int, stop: int) -> Tensor:
        parts = zip(choosers, torch.split(weight, heights), strict=True)
        return torch.cat([chosen(rows, start, stop) for chosen, rows in parts])

    return choose


def _scored_by(work: Work) -> Choose:
    recipe = work.recipe
    scores_of = ColumnScores(work.criterion, work.weight, work.statistics, damping=recipe.damping)
    pattern = parse_pattern(recipe.pattern)

    def choose(weight: Tensor, start: int, stop: int) -> Tensor:
        scores = scores_of(weight, start, stop)
        if pattern is not None:
            return select_pattern(scores, pattern)
        return select(scores, work.sparsity, compare="layer")

    return choose


def admm(works: Sequence[Work], options: Any) -> None:
    """Fit the kept weights again, on fixed masks, to the outputs before any update.

    In a schedule of several steps those are the outputs that the step before left.
    """
    for work in works:
        gram = sum_of(work.statistics, "gram")
        with _named(work):
            work.weight.copy_(refit(work.dense_weight, work.settled_mask(), gram, options))


def refit_columns(works: Sequence[Work], options: Any) -> None:
    """Solve for the columns that stay where others go as a whole; biases may take over the mean."""
    for work in works:
        kept = work.settled_mask().any(0)
        gram = sum_of(work.statistics, "gram")
        with _named(work):
            if work.recipe.needs_biases:
                assert work.statistics is not None  # sum_of refused it; for the type checker
                total = sum_of(work.statistics, "input_sum")
                gram = centred(gram, total, work.statistics.tokens)
            mended = least_squares(work.dense_weight, kept, gram, damping=options.damping)
            work.weight.copy_(mended)


def swaps(works: Sequence[Work], options: Any) -> None:
    """Exchange kept and removed weights while that lowers the error of their row."""
    for work in works:
        gram = sum_of(work.statistics, "gram")
        pattern = parse_pattern(work.recipe.pattern)
        with _named(work):
            work.mask = improve_by_swaps(work.weight, work.settled_mask(), gram, options, pattern)


def refine_by_dsnot(works: Sequence[Work], options: Any) -> None:
    """Exchange kept and removed weights as DSnoT does, by means and variances of the inputs."""
    for work in works:
        known = work.statistics
        mean, variance, norm = (
            feature(name, work.weight, known)[0] for name in ("X_mean", "X_var", "X")
        )
        assert known is not None  # `feature` refused it; for the type checker
        mean = mean * (known.tokens / known.sequences)
        pattern = parse_pattern(work.recipe.pattern)
        with _named(work):
            work.mask = dsnot(
                work.weight, work.settled_mask(), mean, variance, norm, options, pattern
            )


def take_over_mean(works: Sequence[Work], options: Any) -> None:
    """Add to the layers' biases what their outputs lose on average."""
    for work in works:
        compensate(work.layer, work.change_in_output_mean())


def _refuse_not_finite(work: Work) -> None:
    if not all(math.isfinite(float(bound)) for bound in torch.aminmax(work.weight)):
        raise ModelError(
            f"the weight of layer {work.layer.name} holds NaN or infinite numbers; check that the "
            "model itself is sound"
        )


@contextmanager
def _named(work: Work) -> Iterator[None]:
    """Within it, an error of the statistics says of which layer they are."""
    try:
        yield
    except StatisticsError as error:
        raise type(error)(f"layer {work.layer.name}: {error}") from error
