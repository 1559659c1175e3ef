"""Climb the ladder of `fitness.py`, computing nothing that the journal already holds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunezero.errors import ScoreError
from prunezero.formula.criterion import Criterion
from prunezero.models.units import Layer
from prunezero.pruning.compare import Stand, finite_row
from prunezero.pruning.recipe import Recipe
from prunezero.scoring.statistics import Statistics
from prunezero.searching.fitness import layer_error, mask_digest, masks_on, probe_of, sample_rows
from prunezero.searching.journal import Journal
from prunezero.searching.space import SearchSpace


@dataclass(frozen=True)
class Task:
    """What a search looks for."""

    space: SearchSpace
    """the formulas it may write"""
    sparsity: float
    """fraction of the weights to remove"""
    pattern: str
    """free or N:M"""
    seed: int
    """of every draw"""
    seeds: tuple[Criterion, ...]
    """formulas to start from"""

    def recipe(self, criterion: Criterion, name: str) -> Recipe:
        """The recipe that a formula stands for in this search."""
        return Recipe(
            name=name, criterion=criterion, compare=self.space.compare, pattern=self.pattern
        )


@dataclass(frozen=True)
class ProbeMask:
    """The mask of a formula on the probe."""

    digest: str
    """equal for equal masks"""
    bits: Any
    """numpy bool, all probed weights in a row"""

    def differs(self, other: ProbeMask) -> float:
        """The fraction of probed weights on which two masks disagree."""
        return float(np.mean(self.bits != other.bits))


class Ladder:
    """The rungs of one search, over one model on its stand."""

    def __init__(
        self,
        task: Task,
        stand: Stand,
        layers: Sequence[Layer],
        statistics: Mapping[str, Statistics],
        journal: Journal,
    ) -> None:
        self.task = task
        self._stand = stand
        self._journal = journal
        self._samples = sample_rows(layers, statistics, task.space.features, seed=task.seed)
        self._probe = probe_of(self._samples)

    def probe(self, criterion: Criterion) -> ProbeMask | None:
        """Rung 0: the mask on the probe; None for a formula whose scores rank nothing there."""
        try:
            masks = self._masks(self._probe, criterion)
        except ScoreError:
            return None
        bits = np.concatenate([mask.cpu().numpy().ravel() for mask in masks])
        return ProbeMask(mask_digest(masks), bits)

    def error(self, criterion: Criterion) -> dict[str, Any]:
        """Rung 1: `layer_error` (None for a formula that fails on some layer) and `seconds`."""
        known = self._journal.known("layer error", criterion.text)
        if known is not None:
            return known | {"is_replayed": True}
        begin = time.perf_counter()
        try:
            error = layer_error(self._samples, self._masks(self._samples, criterion))
        except ScoreError:
            error = math.nan
        found = {
            "layer_error": error if math.isfinite(error) else None,
            "seconds": time.perf_counter() - begin,
        }
        return self._journal.write("layer error", criterion.text, found)

    def measure(self, recipe: Recipe, splits: Sequence[str]) -> dict[str, Any]:
        """Rung 2 and beyond: one row of results on the pruned model, and whether it was known.

        Perplexity that is not finite becomes None.

        Raises:
            ScoreError: the criterion fails on some layer.
        """
        key = "|".join([recipe.criterion.text, recipe.compare, recipe.pattern, *splits])
        known = self._journal.known("measurement", key)
        if known is not None:
            return known | {"recipe": recipe.name, "is_replayed": True}
        row = self._stand.row(recipe, self.task.sparsity, splits)
        return self._journal.write("measurement", key, finite_row(row))

    def measure_dense(self, splits: Sequence[str]) -> dict[str, Any]:
        """The row of the dense model."""
        key = "|".join(["dense", *splits])
        known = self._journal.known("measurement", key)
        return known or self._journal.write(
            "measurement", key, finite_row(self._stand.dense_row(splits))
        )

    def _masks(self, samples: Any, criterion: Criterion) -> Any:
        task = self.task
        return masks_on(samples, criterion, task.sparsity, task.space.compare, task.pattern)
