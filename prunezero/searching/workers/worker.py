"""Worker: an evaluator elsewhere, built from the experiment and asked one request at a time.

Names and numbers only travel to other processes and machines. Sums over calibration text are not
among them: they are in the cache on disk, where the coordinator has put them.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunezero.errors import PruneZeroError, SearchError, differences, reason
from prunezero.models.text.mixing import names_of_sources
from prunezero.pruning.testbed import Testbed, set_up
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.request import Request
from prunezero.searching.experiment.config import SearchConfig
from prunezero.searching.experiment.provenance import conditions
from prunezero.searching.experiment.task import Task
from prunezero.searching.experiment.testbeds import beside

# What a worker says: ready and its process id, refused and why, result and it, or failed and the
# error. Whoever listens adds died and why.
Message = tuple[str, Any]


@dataclass(frozen=True)
class EvaluatorPlan:
    """What a worker builds its evaluator from."""

    config: SearchConfig
    """the experiment, its models and text by names that lead there from any folder"""
    conditions: Mapping[str, Any]
    """what results depend on, as the coordinator has it"""

    @classmethod
    def of(cls, config: SearchConfig, testbeds: Sequence[Testbed]) -> EvaluatorPlan:
        """The plan of the evaluator of this experiment on these testbeds."""
        first = testbeds[0].language_model
        places = {
            "model": _from_anywhere(config.model),
            "also_model": tuple(map(_from_anywhere, config.also_model)),
            "text": ",".join(map(_from_anywhere, names_of_sources(config.text))),
            "dtype": first.dtype_word,
            # Every worker takes the one that it sees.
            "device": first.device.type,
        }
        return cls(config.model_copy(update=places), conditions(config, testbeds))

    @property
    def device(self) -> str:
        """Type of the device that the evaluator computes on."""
        return self.config.device

    def evaluator(self, threads: int) -> Evaluator:
        """The evaluator; from here on this process computes on so many threads.

        Raises:
            SearchError: the names lead to other models or text here, or the packages differ.
            PruneZeroError: models or text cannot be loaded.
        """
        torch.set_num_threads(threads)
        config = self.config
        first = set_up(
            config.model, config.text, config.settings, dtype=config.dtype, device=config.device
        )
        testbeds = [first, *beside(first, config.also_model, device=config.device)]
        told = differences(self.conditions, conditions(config, testbeds))
        if told:
            raise SearchError(
                f"the worker would answer otherwise than the search ({told}); give every machine "
                "the same packages, and the same files under the same path"
            )
        return Evaluator(Task(config), testbeds)


def _from_anywhere(name: str) -> str:
    """The name, and of a file or folder its absolute path: workers start in other folders."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != "demo" and path.exists() else name


class WorkerLoop:
    """The life of a worker: it builds its evaluator and answers. Errors are said, never raised."""

    def __init__(self, plan: EvaluatorPlan, threads: int) -> None:
        """Sit down; nothing is loaded yet."""
        self._plan = plan
        self._threads = threads

    def start(self) -> Message:
        """Build the evaluator: ready, or refused."""
        try:
            self._evaluator = self._plan.evaluator(self._threads)
        except Exception as error:
            return "refused", _in_words(error)
        return "ready", os.getpid()

    def result(self, request: Request) -> Message:
        """Ask the evaluator: an answer, or failed with an error of ours."""
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
