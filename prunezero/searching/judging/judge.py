"""What does a rung of the ladder say of a recipe? Computed here, ordered and kept elsewhere.

A judge holds a model with its statistics and answers questions made of plain data, so that it may
as well stand in another process or on another machine. It remembers no answer, and no answer
depends on the seed of the search or on what was asked before.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch

from prunezero.errors import FactorizationError, ScoreError
from prunezero.formula.criterion import Criterion
from prunezero.models.calibration import Progress
from prunezero.models.units import find_layers
from prunezero.pruning.bench import Bench, with_choices
from prunezero.pruning.compare import Stand, finite_row
from prunezero.pruning.documents import validated
from prunezero.pruning.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.searching.judging.fitness import (
    Sample,
    ladder_sums,
    layer_error,
    mask_digest,
    masks_on,
    probe_of,
    sample_rows,
)
from prunezero.searching.judging.tuning import tune
from prunezero.searching.regimes import geometric_mean, over_regimes
from prunezero.searching.task import Task

# Keys of a recipe that change no result.
_WORDS_ONLY = {"schema_version", "name", "source", "published", "note", "command", "provenance"}
# Masks that are compared again and again are those of the best few hundred.
_PROBES = 1024
# How torch says on the CPU, and cuBLAS on a GPU, that memory is short: not by an error of its own.
_SHORT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
# Numbers of a formula are tried on every third layer; a Llama block has seven kinds.
_TUNED_ON = 3


@dataclass(frozen=True)
class Question:
    """What is asked of a judge."""

    splits: tuple[str, ...]
    """texts to measure the pruned model on; none asks for the layer error"""
    recipe: Mapping[str, Any] | None
    """what of the recipe changes results, in its YAML's spelling; None is the dense model"""
    trials: int = 0
    """numbers to try in its formula; more than none asks for the best ones"""

    @classmethod
    def of(cls, recipe: Recipe | None, splits: Sequence[str] = (), *, trials: int = 0) -> Question:
        """The question what a recipe does, on some texts or to the layers' outputs."""
        if recipe is None:
            return cls(tuple(splits), None)
        fields = recipe.model_dump(
            mode="json", by_alias=True, exclude=_WORDS_ONLY, exclude_defaults=True
        )
        return cls(tuple(splits), fields, trials)

    @property
    def kind(self) -> str:
        """The rung that answers it."""
        if self.trials:
            return "tuning"
        return "measurement" if self.splits else "layer error"

    @property
    def key(self) -> str:
        """Equal for equal questions."""
        return json.dumps([self.recipe, self.trials, *self.splits], sort_keys=True)


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


class Judge:
    """The rungs of a search, over one model on its stand."""

    def __init__(
        self,
        task: Task,
        bench: Bench,
        rivals: Sequence[Recipe] = (),
        progress: Progress | None = None,
    ) -> None:
        """Calibrate the model, or find its statistics where an earlier process left them.

        Args:
            rivals: recipes that will be measured beside those of the task.

        Raises:
            TextError, StatisticsError: the text is too short, or nothing follows from it.
        """
        self.task = task
        space = task.space
        layers = find_layers(bench.language_model.model)
        sums = ladder_sums(space.features, with_gradients=space.weighted_by_gradient)
        for regime in task.regimes:
            sums |= dense_sums(space.examples(regime.pattern))
        sums |= dense_sums(rivals)
        statistics = bench.statistics(layers, sums, progress)
        self._stand = Stand(bench, statistics, splits=("search", "validation", "test"))
        self._samples = sample_rows(layers, statistics, space.features)
        self._probe = probe_of(self._samples)
        self._tuning_samples = self._samples[::_TUNED_ON]
        self.probe = lru_cache(maxsize=_PROBES)(self._probed)
        self._rungs = {
            "layer error": self._layer_error,
            "tuning": self._tuned,
            "measurement": self._row,
        }

    def _probed(self, criterion: Criterion, compare: str) -> ProbeMask | None:
        """Rung 0: the mask on the probe; None for a formula whose scores rank nothing there."""
        try:
            masks = list(chain.from_iterable(self._masks(self._probe, criterion, compare)))
        except ScoreError:
            return None
        bits = np.concatenate([mask.cpu().numpy().ravel() for mask in masks])
        return ProbeMask(mask_digest(masks), bits)

    def answer(self, question: Question) -> dict[str, Any]:
        """The answer, with a `fault` in words where the recipe fails on some layer."""
        try:
            return self._rungs[question.kind](question)
        except (ScoreError, FactorizationError) as error:
            return {"fault": str(error)}
        except (RuntimeError, MemoryError) as error:
            if not _is_short_of_memory(error):
                raise
            return {"fault": "it needs too much memory"}

    def _layer_error(self, question: Question) -> dict[str, Any]:
        recipe = _recipe(question)
        begin = time.perf_counter()
        error = self._lost(self._samples, recipe.criterion, recipe.compare)
        if not math.isfinite(error):
            return {"fault": "its layer error is not finite"}
        return {"layer_error": error, "seconds": time.perf_counter() - begin}

    def _lost(self, samples: Sequence[Sample], criterion: Criterion, compare: str) -> float:
        """The layer error, of several regimes the geometric mean."""
        masks = self._masks(samples, criterion, compare)
        return geometric_mean([layer_error(samples, of_regime) for of_regime in masks])

    def _masks(
        self, samples: Sequence[Sample], criterion: Criterion, compare: str
    ) -> Iterator[list[torch.Tensor]]:
        """The masks of all samples in each regime, one regime after the other."""
        for regime in self.task.regimes:
            yield masks_on(samples, criterion, regime.sparsity, compare, regime.pattern)

    def _tuned(self, question: Question) -> dict[str, Any]:
        recipe = _recipe(question)
        begin = time.perf_counter()

        def error(criterion: Criterion) -> float | None:
            try:
                found = self._lost(self._tuning_samples, criterion, recipe.compare)
            except ScoreError:
                return None
            return found if math.isfinite(found) else None

        best = tune(recipe.criterion, error, trials=question.trials, seed=0)
        return {"formula": best.text, "seconds": time.perf_counter() - begin}

    def _row(self, question: Question) -> dict[str, Any]:
        if question.recipe is None:
            return finite_row(self._stand.dense_row(question.splits))
        begin = time.perf_counter()
        recipe = _recipe(question)
        rows = []
        for regime in self.task.regimes:
            one = with_choices(recipe, pattern=regime.pattern)
            rows.append(self._stand.row(one, regime.sparsity, question.splits))
        row = over_regimes(self.task.regimes, rows)
        return finite_row(row) | {"elapsed": time.perf_counter() - begin}


def _is_short_of_memory(error: Exception) -> bool:
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in _SHORT_OF_MEMORY)


def _recipe(question: Question) -> Recipe:
    return validated(Recipe, {"name": "candidate", **(question.recipe or {})}, "a question")
