"""What must a worker know to build the judge that its coordinator has?

Names and numbers only, so that a plan travels to other processes and machines. Sums over
calibration text are not in it: they are in the cache on disk, where the coordinator has put them.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from prunezero.errors import PruneZeroError, SearchError, differences, reason
from prunezero.formula.criterion import Criterion
from prunezero.models.loading.load import load_model
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import Settings, Testbed, set_up
from prunezero.searching.evaluation.evaluator import Evaluator, Request
from prunezero.searching.experiment.budgets import Budget
from prunezero.searching.experiment.provenance import conditions
from prunezero.searching.experiment.task import Rule, Task
from prunezero.searching.spaces.space import SearchSpace

# What a worker says: ready and its process id, refused and why, answer and it, or failed and the
# error. Whoever listens adds died and why.
Message = tuple[str, Any]


class Answering(Protocol):
    """Whoever answers one question at a time, as a `Evaluator` does."""

    def result(self, request: Request) -> dict[str, Any]:
        """The answer."""
        ...


class JudgePlan(Protocol):
    """What a worker builds its judge from; it can be pickled."""

    @property
    def device(self) -> str:
        """Type of the device that the judge computes on."""
        ...

    def evaluator(self, threads: int) -> Answering:
        """The judge, which computes on this many threads."""
        ...


@dataclass(frozen=True)
class Plan:
    """Everything that a judge is made of, as plain data."""

    model: str
    """name or absolute path"""
    text: str
    """name or absolute path"""
    settings: Settings
    """how much of the text is used"""
    dtype: str
    """of the weights, as `set_up` takes it"""
    device: str
    """type of device: every worker takes the one that it sees"""
    conditions: Mapping[str, Any]
    """what answers depend on, as the coordinator has it"""
    space: Mapping[str, Any]
    """the fields of the search space, as JSON holds them"""
    sparsity: float
    """fraction of the weights to remove"""
    pattern: str
    """free or N:M"""
    also: tuple[Budget, ...]
    """where else rules have to be good"""
    seed: int
    """of the task"""
    draws: int
    """of calibration text that rules have to be good on"""
    seeds: tuple[str, ...]
    """formulas of the task"""
    baselines: tuple[Mapping[str, Any], ...]
    """fields of the recipes that are measured beside those of the task, as JSON holds them"""
    also_models: tuple[tuple[str, str], ...] = ()
    """further models: name or absolute path, and dtype"""
    targets: tuple[str, ...] = ()
    """layers to prune, by pattern"""
    ignore: tuple[str, ...] = ()
    """layers to leave alone, by pattern"""

    @classmethod
    def of(
        cls,
        testbed: Testbed,
        task: Task,
        baselines: Sequence[Recipe] = (),
        *,
        also_testbeds: Sequence[Testbed] = (),
    ) -> Plan:
        """The plan of the judge that `Evaluator` is of the same arguments."""
        model, *others = (one.language_model for one in (testbed, *also_testbeds))
        return cls(
            model=_from_anywhere(model.name),
            text=_from_anywhere(testbed.text.name),
            settings=testbed.settings,
            dtype=model.dtype_word,
            device=model.device.type,
            conditions=conditions(testbed, task, also_testbeds),
            space=task.space.model_dump(mode="json"),
            sparsity=task.sparsity,
            pattern=task.pattern,
            also=task.also,
            seed=task.seed,
            draws=task.draws,
            seeds=tuple(seed.criterion.text for seed in task.seeds),
            baselines=tuple(one.model_dump(mode="json", by_alias=True) for one in baselines),
            also_models=tuple((_from_anywhere(one.name), one.dtype_word) for one in others),
            targets=task.targets,
            ignore=task.ignore,
        )

    def evaluator(self, threads: int) -> Evaluator:
        """The judge; from here on this process computes on so many threads.

        Raises:
            SearchError: the names lead to other models or text here, or the packages differ.
            PruneZeroError: models or text cannot be loaded.
        """
        torch.set_num_threads(threads)
        testbed = set_up(self.model, self.text, self.settings, dtype=self.dtype, device=self.device)
        also_testbeds = [
            replace(testbed, language_model=load_model(name, dtype=dtype, device=self.device))
            for name, dtype in self.also_models
        ]
        task = self._task()
        told = differences(self.conditions, conditions(testbed, task, also_testbeds))
        if told:
            raise SearchError(
                f"the worker would answer otherwise than the search ({told}); give every machine "
                "the same packages, and the same files under the same path"
            )
        baselines = [validated(Recipe, dict(fields), "a rival") for fields in self.baselines]
        return Evaluator(task, testbed, baselines, also_testbeds=also_testbeds)

    def _task(self) -> Task:
        space = validated(SearchSpace, dict(self.space), "a plan")
        seeds = tuple(Rule(Criterion.parse(text)) for text in self.seeds)
        return Task(
            space,
            self.sparsity,
            self.pattern,
            self.seed,
            seeds,
            also=self.also,
            draws=self.draws,
            targets=self.targets,
            ignore=self.ignore,
        )


def _from_anywhere(name: str) -> str:
    """The name, and of a file or folder its absolute path: workers start in other folders."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != "demo" and path.exists() else name


class WorkerLoop:
    """Where a worker sits: its judge, and what it says of it. Errors are said, never raised."""

    def __init__(self, plan: JudgePlan, threads: int) -> None:
        """Sit down; nothing is loaded yet."""
        self._plan = plan
        self._threads = threads

    def start(self) -> Message:
        """Build the judge: ready, or refused."""
        try:
            self._evaluator = self._plan.evaluator(self._threads)
        except Exception as error:
            return "refused", _in_words(error)
        return "ready", os.getpid()

    def result(self, request: Request) -> Message:
        """Ask the judge: an answer, or failed with an error of ours."""
        try:
            return "answer", self._evaluator.result(request)
        except PruneZeroError as error:
            return "failed", error
        except Exception as error:
            told = SearchError(f"a worker cannot answer {request.key} ({_in_words(error)})")
            told.add_note(traceback.format_exc())
            return "failed", told


def _in_words(error: Exception) -> str:
    return (
        str(error)
        if isinstance(error, PruneZeroError)
        else f"{type(error).__name__}: {reason(error)}"
    )
