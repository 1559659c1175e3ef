"""Rungs: candidates climb from cheap measurements to costly ones, and nothing is computed twice.

    rung 0  the mask on a few rows of a few layers: have we seen it before?
    rung 1  the layer error: gradient-weighted, on sampled rows of every layer (`proxies/`)
    rung 2  a quick KL from the dense model to the pruned one, on a quarter of the search text
    rung 3  the search's objective, usually perplexity, of the pruned model on all search text
    rung 4  the objective on validation text, which no other rung looks at: it says what is best

Each rung only decides who may climb to the next (`promotion.py`); numbers of different rungs are
never compared. Results come from the journal of the search, else from the archive of all searches,
else from evaluators: one in this process, or a pool of workers (`workers/`). Wherever they come
from, they are kept and handed over in the order of the requests, so a search cannot tell the
difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from prunezero.errors import ScoreError
from prunezero.formula.criterion import Criterion
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.scoring.second_order import DAMPED
from prunezero.searching.evaluation.archive import Archive
from prunezero.searching.evaluation.early_stop import STOPPED, stopped
from prunezero.searching.evaluation.evaluator import Evaluator, ProbeMask
from prunezero.searching.evaluation.journal import Journal
from prunezero.searching.evaluation.request import Request
from prunezero.searching.experiment.budgets import with_names
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.task import Task


class Evaluators(Protocol):
    """Requests in, results out: an `Evaluator` of this process, or a `WorkerPool`."""

    @property
    def threads(self) -> int:
        """On how many threads each computes; the last bits of sums depend on it."""
        ...

    def results(self, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
        """One result to each request, in their order, each as soon as it can be had."""
        ...

    def close(self) -> None:
        """Let go of processes and machines."""
        ...


class Rungs:
    """The rungs of one search."""

    def __init__(
        self,
        evaluator: Evaluator,
        journal: Journal,
        evaluators: Evaluators | None = None,
        archive: Archive | None = None,
    ) -> None:
        """Set it up.

        Args:
            evaluator: of this process; it takes the probes.
            journal: of the search; keeps every result that the search was given.
            evaluators: who computes all else; None leaves it to `evaluator`.
            archive: of all searches; asked before the evaluators.
        """
        self._evaluator = evaluator
        self._evaluators = evaluators or evaluator
        self._journal = journal
        self._archive = archive

    @property
    def task(self) -> Task:
        """What the search looks for."""
        return self._evaluator.task

    def probe(self, rule: Rule | Criterion) -> ProbeMask | None:
        """Rung 0: the mask on the probe; None for a rule whose scores rank nothing there."""
        rule = Rule(rule) if isinstance(rule, Criterion) else rule
        return self._evaluator.probe(Rule(rule.criterion, shown_by_mask(rule)))

    def errors(self, rules: Sequence[Rule]) -> Iterator[dict[str, Any]]:
        """Rung 1: `layer_error` and `seconds`, or a `fault`."""
        return self._results([Request.of(recipe) for recipe in self._masking(rules)])

    def tunings(self, rules: Sequence[Rule], trials: int) -> Iterator[dict[str, Any]]:
        """The `formula` of each rule with the numbers that make its layer error least."""
        recipes = self._masking(rules)
        return self._results([Request.of(recipe, trials=trials) for recipe in recipes])

    def _masking(self, rules: Sequence[Rule]) -> list[Recipe]:
        """Of each rule what the layer error sees; how single weights are mended it does not."""
        also = set() if self.task.space.unit == "weight" else {"update", "damping"}
        seen = [
            {key: value for key, value in rule.choices.items() if key in also} | shown_by_mask(rule)
            for rule in rules
        ]
        return [
            self.task.recipe(Rule(rule.criterion, choices), "it")
            for rule, choices in zip(rules, seen, strict=True)
        ]

    def rows(
        self, recipes: Sequence[Recipe], splits: Sequence[str], *, rival: Sequence[float] = ()
    ) -> Iterator[dict[str, Any]]:
        """Higher rungs: one row of results on the pruned model for each recipe, or a `fault`.

        Perplexity that is not finite becomes None.

        Args:
            rival: by window what the objective is, turned, of who has to be reached; who surely
                does not is measured no further, and its row says so (`early_stop.py`).
        """
        requests = [Request.of(recipe, splits, rival=rival) for recipe in recipes]
        results = self._results(requests)
        for recipe, result in zip(recipes, results, strict=True):
            yield result if "fault" in result else self._named(result) | {"recipe": recipe.name}

    def measure(self, recipe: Recipe, splits: Sequence[str]) -> dict[str, Any]:
        """The row of one recipe.

        Raises:
            ScoreError: the criterion fails on some layer, or memory or time are short.
        """
        row = self._without_fault(Request.of(recipe, splits), f"recipe {recipe.name}")
        return self._named(row) | {"recipe": recipe.name}

    def measure_dense(self, splits: Sequence[str]) -> dict[str, Any]:
        """The row of the dense model.

        Raises:
            ScoreError: memory or time are short.
        """
        return self._named(self._without_fault(Request.of(None, splits), "the dense model"))

    def close(self) -> None:
        """Let go of the evaluators and of the journal."""
        self._evaluators.close()
        self._journal.close()

    def _named(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with models by the names that this search has for them."""
        return with_names(row, self._evaluator.names)

    def _without_fault(self, request: Request, whose: str) -> dict[str, Any]:
        # No search goes by it, and without it no search ends: a known fault is tried once more.
        result = next(self._results([request], trust_faults=False))
        if "fault" in result:
            raise ScoreError(f"{whose} cannot be measured: {result['fault']}")
        return result

    def _results(
        self, requests: Sequence[Request], *, trust_faults: bool = True
    ) -> Iterator[dict[str, Any]]:
        known = [self._journal.known(request.kind, request.key) for request in requests]
        if not trust_faults:
            known = [None if one is None or "fault" in one else one for one in known]
        found = [self._found(request) for request in requests]
        waiting = [
            request
            for request, *results in zip(requests, known, found, strict=True)
            if results == [None, None]
        ]
        computed = self._evaluators.results(waiting)
        for request, replayed, result in zip(requests, known, found, strict=True):
            if replayed is not None:
                yield replayed | {"is_replayed": True}
                continue
            if result is None:
                result = next(computed)
                self._keep(request, result)
            yield self._journal.write(request.kind, request.key, result)

    def _found(self, request: Request) -> dict[str, Any] | None:
        if self._archive is None:
            return None
        known = self._archive.known(request.kind, request.key)
        if known is not None or not request.rival:
            return known
        # A whole measurement holds what an early stop would have left of it.
        whole = self._archive.known(request.kind, request.whole.key)
        if whole is None:
            return None
        return stopped(whole, request.splits[0], self.task.objective, request.rival)

    def _keep(self, request: Request, result: dict[str, Any]) -> None:
        # What failed here, perhaps for lack of memory, may go well elsewhere.
        if self._archive is not None and "fault" not in result:
            asked = request if STOPPED in result else request.whole
            self._archive.write(request.kind, asked.key, result)


def shown_by_mask(rule: Rule) -> dict[str, Any]:
    """The choices of a rule that its mask shows; its damping where a formula looks at a factor."""
    looks_at_factor = any(not DAMPED.isdisjoint(one.features) for one in rule.formulas)
    keys = ("compare", "criteria", "unit", *(["damping"] if looks_at_factor else []))
    return {key: rule.choices[key] for key in keys if key in rule.choices}
