"""Outcome of a pruning: what it did to a model, and whether that is what was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prunezero.errors import SelectionError
from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.selection import Selection
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recovery.training import TrainingReport
from prunezero.scoring.request import group_columns, removed_count


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
    selection: Selection = field(default_factory=Selection)
    """units that stay, where units can be taken out; none for single weights"""
    measure: str = "weights"
    """what `sparsity` is a fraction of"""
    reached: float | None = None
    """the fraction that went, where units of several kinds may have weights in common"""
    trainings: tuple[TrainingReport, ...] = ()
    """what won back some of the loss, after each pruning step"""

    @property
    def sparsity_reached(self) -> float:
        """The fraction that went: of weights, those that are zero; of units, what they cost."""
        if self.reached is not None:
            return self.reached
        if self.selection.groups:
            return self.selection.removed(self.measure) / self.selection.total(self.measure)
        return self.zeros / self.total


def check_reached(
    outcome: Outcome, recipe: Recipe, groups: Sequence[Group], ratios: Mapping[str, float]
) -> None:
    """A sparsity that was not reached is an error of ours, and never passes in silence."""
    if outcome.selection.groups:
        masks = outcome.selection.matrix_masks().values()
        wanted = sum(int((~mask).sum()) for mask in masks)
    else:
        wanted = sum(expected_zeros(group.shape, recipe, ratios[group.name]) for group in groups)
    if recipe.compare == "model" and recipe.pattern == "free" and not outcome.selection.groups:
        wanted = removed_count(outcome.total, outcome.sparsity)
    if outcome.zeros < wanted:
        raise SelectionError(
            f"recipe {recipe.name} reached {outcome.zeros} zeros of {wanted} that were asked for; "
            "please report this"
        )


def expected_zeros(shape: Sequence[int], recipe: Recipe, sparsity: float) -> int:
    """How many weights of a matrix `[out, in]` a recipe removes; each group rounds down."""
    rows, columns = shape
    if recipe.compare == "row" or recipe.pattern != "free":
        return rows * removed_count(columns, sparsity)
    return sum(removed_count(rows * width, sparsity) for width in _group_widths(recipe, columns))


def _group_widths(recipe: Recipe, columns: int) -> Iterator[int]:
    width = group_columns(recipe.compare) or columns
    for start in range(0, columns, width):
        yield min(width, columns - start)
