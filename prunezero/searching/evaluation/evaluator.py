"""Evaluator: requests in, results out; what each rung of a search says of a recipe.

It holds testbeds and their samples, and may as well stand in another process or on another machine
(`workers/`), since requests and results are plain data. It remembers no result, and none depends on
the seed of the search or on what was asked before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunezero.errors import FactorizationError, ScoreError
from prunezero.formula.criterion import Criterion
from prunezero.models.observing.calibration import Progress
from prunezero.pruning.budget import Budget
from prunezero.pruning.compare import finite_row, rounding
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import Testbed, with_choices
from prunezero.searching.evaluation.early_stop import sees_worse, stopped
from prunezero.searching.evaluation.request import Request
from prunezero.searching.evaluation.sampled_testbed import SampledTestbed, Samples
from prunezero.searching.evaluation.tuning import tune
from prunezero.searching.experiment.baselines import baselines
from prunezero.searching.experiment.budgets import geometric_mean, over_budgets
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.task import Task
from prunezero.searching.experiment.testbeds import about, drawn, progress_of
from prunezero.searching.proxies.layer_error import mask_digest
from prunezero.searching.proxies.samples import rung_sums

# Masks that are compared again and again are those of the best few hundred.
_PROBES = 1024
# How torch says on the CPU, and cuBLAS on a GPU, that memory is short: not by an error of its own.
_SHORT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
# The one budget of a dense model.
_DENSE = (Budget(0.0),)


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


class Evaluator:
    """The rungs of a search, over one model and one draw of calibration text, or over several."""

    def __init__(
        self,
        task: Task,
        testbeds: Sequence[Testbed],
        progress: Progress | None = None,
    ) -> None:
        """Calibrate the models, or find their statistics where an earlier process left them.

        Args:
            testbeds: of all models, on the same text and under the same settings.

        Raises:
            TextError, StatisticsError: the text is too short, or nothing follows from it.
        """
        self.task = task
        sums = sums_of(task)
        self._testbeds = drawn(testbeds, task.config.draws)
        self._sampled: list[SampledTestbed] = []
        for place, one in enumerate(self._testbeds):
            # Draws of one model stand side by side, and share all that calibration does not change.
            runner = self._sampled[-1].runner if place % task.config.draws else None
            told = progress_of(one, self._testbeds, progress)
            self._sampled.append(SampledTestbed.of(one, sums, task, told, runner=runner))
        self.probe = lru_cache(maxsize=_PROBES)(self._probed)
        self._rungs = {
            "layer error": self._layer_error,
            "tuning": self._tuned,
            "measurement": self._row,
        }

    @property
    def threads(self) -> int:
        """On how many threads this process computes; the last bits of sums depend on it."""
        return torch.get_num_threads()

    def close(self) -> None:
        """Nothing is held."""

    @property
    def names(self) -> dict[str, str]:
        """What the models are called, by their fingerprints, under which rows know them."""
        models = [testbed.language_model for testbed in self._testbeds]
        return {model.fingerprint: model.name for model in models}

    def _probed(self, rule: Rule) -> ProbeMask | None:
        """Rung 0: the mask on the probe; None for a rule whose scores rank nothing there.

        Args:
            rule: its choices are those that a mask shows.
        """
        recipe = self.task.recipe(rule, "it")
        try:
            masks = [
                mask
                for one in self._sampled
                for of_budget in one.probe.masks_under(recipe, self.task.budgets)
                for mask in of_budget
            ]
        except ScoreError:
            return None
        bits = np.concatenate([mask.cpu().numpy().ravel() for mask in masks])
        return ProbeMask(mask_digest(masks), bits)

    def results(self, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
        """What `result` says to each, in their order, each computed when it is asked for.

        On a GPU, formulas that are asked for their layer errors are scored together.
        """
        for (kind, damping), some in groupby(requests, key=lambda one: (one.kind, one.damping)):
            if kind == "layer error":
                yield from self._layer_errors(list(some), damping)
            else:
                yield from map(self.result, list(some))

    def _layer_errors(
        self, requests: Sequence[Request], damping: float
    ) -> Iterator[dict[str, Any]]:
        """Those of recipes of one damping."""
        waiting = list(requests)
        while waiting:
            scores = self._scores([request.named.criterion for request in waiting], damping)
            begin = time.perf_counter()
            while waiting:
                request = waiting.pop(0)
                try:
                    values = next(scores)
                except (RuntimeError, MemoryError):
                    # Perhaps together they were too many; what failed has no more to give.
                    yield self.result(request)
                    break
                yield self._or_fault(partial(self._layer_error, request, values, begin))
                begin = time.perf_counter()

    def result(self, request: Request) -> dict[str, Any]:
        """The result, with a `fault` in words where the recipe fails on some layer."""
        return self._or_fault(partial(self._rungs[request.kind], request))

    def _or_fault(self, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return compute()
        except (ScoreError, FactorizationError) as error:
            return {"fault": str(error)}
        except (RuntimeError, MemoryError) as error:
            if not _is_short_of_memory(error):
                raise
            return {"fault": "it needs too much memory"}

    def _layer_error(
        self,
        request: Request,
        scores: Sequence[Sequence[Tensor] | None] | None = None,
        begin: float | None = None,
    ) -> dict[str, Any]:
        begin = time.perf_counter() if begin is None else begin
        samples = [one.samples for one in self._sampled]
        error = self._lost(samples, request.named, scores)
        if not math.isfinite(error):
            return {"fault": "its layer error is not finite"}
        return {"layer_error": error, "seconds": time.perf_counter() - begin}

    def _scores(
        self, criteria: Sequence[Criterion], damping: float
    ) -> Iterator[tuple[Sequence[Tensor] | None, ...]]:
        """Of each formula the scores on the samples of each testbed, where they come together."""
        of_sampled = [one.samples.scores(criteria, damping) for one in self._sampled]
        return zip(*of_sampled, strict=True)

    def _lost(
        self,
        of_sampled: Sequence[Samples],
        recipe: Recipe,
        scores: Sequence[Sequence[Tensor] | None] | None = None,
    ) -> float:
        """The layer error, of several testbeds and budgets the geometric mean."""
        known = scores or [None] * len(of_sampled)
        lost: list[float] = []
        for testbed, samples, own in zip(self._testbeds, of_sampled, known, strict=True):
            with about(testbed, self._testbeds):
                for masks in samples.masks_under(recipe, self.task.budgets, own):
                    lost.append(samples.error(recipe, masks))
        return geometric_mean(lost)

    def _tuned(self, request: Request) -> dict[str, Any]:
        recipe = request.named
        begin = time.perf_counter()
        samples = [one.tuning_samples for one in self._sampled]

        def error(criterion: Criterion) -> float | None:
            try:
                found = self._lost(samples, self.task.with_formula(recipe, criterion))
            except ScoreError:
                return None
            return found if math.isfinite(found) else None

        best = tune(recipe.criterion, error, trials=request.trials, seed=0)
        return {"formula": best.text, "seconds": time.perf_counter() - begin}

    def _row(self, request: Request) -> dict[str, Any]:
        if request.recipe is None:
            dense = [one.runner.dense_row(request.splits) for one in self._sampled]
            return finite_row(over_budgets(_DENSE, dense, self._places()))
        begin = time.perf_counter()
        recipe = request.named
        row = self._measured(recipe, request.splits, rival=request.rival)
        # Test text is asked for at the end alone, when others are compared with what was found.
        if recipe.mends and "test" in request.splits:
            again = self._measured(recipe, request.splits, is_reversed=True)
            row |= rounding(row, again, request.splits, self.task.objective.also)
        if request.rival:
            row = stopped(row, request.splits[0], self.task.objective, request.rival)
        return finite_row(row) | {"elapsed": time.perf_counter() - begin}

    def _measured(
        self,
        recipe: Recipe,
        splits: Sequence[str],
        *,
        is_reversed: bool = False,
        rival: Sequence[float] = (),
    ) -> dict[str, Any]:
        """The row of a recipe under all budgets; also with its calibration windows in reverse.

        Args:
            rival: see `Request`; where there is one, the first windows may be enough.
        """
        rows = []
        for one in self._sampled:
            with about(one.runner.testbed, self._testbeds):
                runner = one.runner.reversed(recipe) if is_reversed else one.runner
                if rival:
                    runner = runner.stopping(partial(sees_worse, self.task.objective, rival))
                for budget in self.task.budgets:
                    asked = with_choices(recipe, pattern=budget.pattern)
                    rows.append(runner.row(asked, budget.amount, splits))
        return over_budgets(self.task.budgets, rows, self._places())

    def _places(self) -> list[dict[str, Any]]:
        """Of each testbed what tells it from the others."""
        # Not by name: the same model may be called otherwise in another process or search.
        of = [
            {"model": one.language_model.fingerprint, "seed": one.settings.seed}
            for one in self._testbeds
        ]
        told = [key for key in ("model", "seed") if len({place[key] for place in of}) > 1]
        return [{key: place[key] for key in told} for place in of]


def sums_of(task: Task) -> frozenset[str]:
    """Names of the sums of layers that all rungs of a search look at, and its baselines."""
    space = task.space
    sums = rung_sums(space.features, with_gradients=space.weighted_by_gradient, unit=space.unit)
    return sums | dense_sums(recipes_of_space(task)) | dense_sums(baselines(task))


def recipes_of_space(task: Task) -> list[Recipe]:
    """A recipe for every choice of the space under each budget."""
    return [one for budget in task.budgets for one in task.space.examples(budget.pattern)]


def _is_short_of_memory(error: Exception) -> bool:
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in _SHORT_OF_MEMORY)
