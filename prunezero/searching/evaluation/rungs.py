"""Climb the ladder of `fitness.py`, computing nothing that is known already.

Answers come from the journal of the search, else from the archive of all searches, else from
judges: one in this process, or many in others (`hiring/`). Wherever they come from, they are kept
and handed over in the order in which they were asked for, so a search cannot tell the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from prunezero.errors import ScoreError
from prunezero.formula.criterion import Criterion
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.searching.evaluation.archive import Archive
from prunezero.searching.evaluation.evaluator import Judge, ProbeMask, Question
from prunezero.searching.evaluation.journal import Journal
from prunezero.searching.experiment.budgets import with_names
from prunezero.searching.experiment.task import Rule, Task


class Judges(Protocol):
    """Whoever answers questions."""

    @property
    def threads(self) -> int:
        """On how many threads each computes; the last bits of sums depend on it."""
        ...

    def answers(self, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
        """One answer to each question, in their order, each as soon as it can be had."""
        ...

    def close(self) -> None:
        """Let go of processes and machines."""
        ...


class OneJudge:
    """The judge of this process; computes an answer when it is asked for the next one."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    @property
    def threads(self) -> int:
        """Those of this process."""
        return torch.get_num_threads()

    def answers(self, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
        """One answer to each question, in their order."""
        return self._judge.answers(questions)

    def close(self) -> None:
        """Nothing is held."""


class Ladder:
    """The rungs of one search."""

    def __init__(
        self,
        judge: Judge,
        journal: Journal,
        judges: Judges | None = None,
        archive: Archive | None = None,
    ) -> None:
        """Set it up.

        Args:
            judge: of this process; it takes the probes.
            journal: of the search; keeps every answer that the search was given.
            judges: who answers all else; None leaves it to `judge`.
            archive: of all searches; asked before the judges.
        """
        self._judge = judge
        self._judges = judges or OneJudge(judge)
        self._journal = journal
        self._archive = archive

    @property
    def task(self) -> Task:
        """What the search looks for."""
        return self._judge.task

    def probe(self, rule: Rule | Criterion) -> ProbeMask | None:
        """Rung 0: the mask on the probe; None for a rule whose scores rank nothing there."""
        rule = Rule(rule) if isinstance(rule, Criterion) else rule
        compare = rule.choices.get("compare", self.task.space.compare)
        return self._judge.probe(rule.criterion, compare, tuple(sorted(rule.own.items())))

    def errors(self, rules: Sequence[Rule]) -> Iterator[dict[str, Any]]:
        """Rung 1: `layer_error` and `seconds`, or a `fault`."""
        return self._answers([Question.of(recipe) for recipe in self._masking(rules)])

    def tunings(self, rules: Sequence[Rule], trials: int) -> Iterator[dict[str, Any]]:
        """The `formula` of each rule with the numbers that make its layer error least."""
        recipes = self._masking(rules)
        return self._answers([Question.of(recipe, trials=trials) for recipe in recipes])

    def _masking(self, rules: Sequence[Rule]) -> list[Recipe]:
        """Of each rule what makes the mask; how the weights that stay are mended is not seen."""
        return [self.task.recipe(Rule(rule.criterion, _of_mask(rule)), "it") for rule in rules]

    def rows(self, recipes: Sequence[Recipe], splits: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Higher rungs: one row of results on the pruned model for each recipe, or a `fault`.

        Perplexity that is not finite becomes None.
        """
        answers = self._answers([Question.of(recipe, splits) for recipe in recipes])
        for recipe, answer in zip(recipes, answers, strict=True):
            yield answer if "fault" in answer else self._named(answer) | {"recipe": recipe.name}

    def measure(self, recipe: Recipe, splits: Sequence[str]) -> dict[str, Any]:
        """The row of one recipe.

        Raises:
            ScoreError: the criterion fails on some layer, or memory or time are short.
        """
        row = self._without_fault(Question.of(recipe, splits), f"recipe {recipe.name}")
        return self._named(row) | {"recipe": recipe.name}

    def measure_dense(self, splits: Sequence[str]) -> dict[str, Any]:
        """The row of the dense model.

        Raises:
            ScoreError: memory or time are short.
        """
        return self._named(self._without_fault(Question.of(None, splits), "the dense model"))

    def close(self) -> None:
        """Let go of the judges and of the journal."""
        self._judges.close()
        self._journal.close()

    def _named(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with models by the names that this search has for them."""
        return with_names(row, self._judge.names)

    def _without_fault(self, question: Question, whose: str) -> dict[str, Any]:
        # No search goes by it, and without it no search ends: a known fault is tried once more.
        answer = next(self._answers([question], trust_faults=False))
        if "fault" in answer:
            raise ScoreError(f"{whose} cannot be measured: {answer['fault']}")
        return answer

    def _answers(
        self, questions: Sequence[Question], *, trust_faults: bool = True
    ) -> Iterator[dict[str, Any]]:
        known = [self._journal.known(question.kind, question.key) for question in questions]
        if not trust_faults:
            known = [None if one is None or "fault" in one else one for one in known]
        found = [self._found(question) for question in questions]
        waiting = [
            question
            for question, *answers in zip(questions, known, found, strict=True)
            if answers == [None, None]
        ]
        computed = self._judges.answers(waiting)
        for question, replayed, answer in zip(questions, known, found, strict=True):
            if replayed is not None:
                yield replayed | {"is_replayed": True}
                continue
            if answer is None:
                answer = next(computed)
                self._keep(question, answer)
            yield self._journal.write(question.kind, question.key, answer)

    def _found(self, question: Question) -> dict[str, Any] | None:
        return None if self._archive is None else self._archive.known(question.kind, question.key)

    def _keep(self, question: Question, answer: dict[str, Any]) -> None:
        # What failed here, perhaps for lack of memory, may go well elsewhere.
        if self._archive is not None and "fault" not in answer:
            self._archive.write(question.kind, question.key, answer)


def _of_mask(rule: Rule) -> dict[str, Any]:
    return {key: rule.choices[key] for key in ("compare", "criteria") if key in rule.choices}
