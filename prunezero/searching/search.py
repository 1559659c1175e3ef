"""The search itself: propose, screen, tune, promote, remember, and yield every candidate.

A generation proposes rules until enough of them have a mask that was never seen; a rule whose mask
is known costs a few milliseconds and nothing of the budget. The new ones get a layer error, the
best skeletons better numbers, and then many get a quick KL, few are measured on all search text,
and the best of those once more on validation text, which alone says what is best. Each rung orders
candidates by its own number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prunezero.formula.criterion import Criterion
from prunezero.models.measures import TO_DENSE
from prunezero.pruning.compare import QUICK_KL
from prunezero.searching.evaluation.early_stop import STOPPED
from prunezero.searching.evaluation.promotion import FINALISTS, to_measure, to_quick_kl, to_validate
from prunezero.searching.evaluation.rungs import Rungs, shown_by_mask
from prunezero.searching.experiment.candidate import BOUNDS, Candidate
from prunezero.searching.history import History, skeleton
from prunezero.searching.strategies.catalogue import find_strategy
from prunezero.searching.strategies.evolution import Proposal, Strategy, ending
from prunezero.searching.strategies.per_layer import with_formula

# Proposals for one new mask before a space counts as exhausted.
_MAX_PROPOSALS = 40
# Steps of a mask's distance from that of |W| * X.
_DISTANCES = (0.01, 0.05, 0.15)
# Why a rule has no mask on the probe.
_RANKS_NOTHING = "on the probe its scores are not finite, or all alike"

Stop = Callable[[], bool]


def search(
    rungs: Rungs,
    *,
    strategy: str | None = None,
    max_candidates: int | None = None,
    stop: Stop = lambda: False,
    ended: Callable[[str], None] = lambda sentence: None,
) -> Iterator[Candidate]:
    """Look for rules; yields each candidate when proposed, and again on every rung it reaches.

    The same task yields the same candidates in the same order, however often it is interrupted and
    resumed from its journal, and whoever evaluates.

    Args:
        strategy: see `strategies/catalogue.py`; None takes that of the task.
        max_candidates: with a new mask to screen, or all candidates of a strategy that screens
            none; None goes on until `stop` or exhaustion.
        stop: asked before every piece of work; True ends the search.
        ended: told in one sentence how far a strategy came that has nothing left to propose.
    """
    chosen = find_strategy(strategy or rungs.task.config.strategy)
    run = _Run(rungs, History(forgets_masks=chosen.forgets_masks), chosen, stop)
    for generation in itertools.count():
        before = run.charged
        yield from run.generation(generation, max_candidates)
        is_over = run.charged == before
        if is_over and run.ending and not stop():
            ended(run.ending)
        if is_over or stop() or (max_candidates is not None and run.charged >= max_candidates):
            return


class _Run:
    """One search under way."""

    def __init__(self, rungs: Rungs, history: History, strategy: Strategy, stop: Stop) -> None:
        self.history = history
        self._rungs = rungs
        self._strategy = strategy
        self._propose = strategy.start(rungs.task)
        self._stop = stop
        self._tuned: set[tuple[str, str, str]] = set()
        self._values_of_mask: dict[str, dict[str, Any]] = {}
        self._usual = rungs.probe(rungs.task.usual)
        # Of several models, draws or budgets each is measured by itself, and none says enough.
        task = rungs.task
        self._may_stop_early = task.config.stop_early and task.measures_once
        self._windows: dict[tuple[str, int], dict[str, Any]] = {}

    @property
    def charged(self) -> int:
        """What the budget has paid for."""
        return self.history.new if self._strategy.is_screened else len(self.history.candidates)

    @property
    def ending(self) -> str:
        """What the strategy says once it has nothing left; nothing where it is silent."""
        return ending(self._propose)

    def generation(self, number: int, max_candidates: int | None) -> Iterator[Candidate]:
        """Propose, screen, tune and race the candidates of one generation."""
        if not self._strategy.is_screened:
            yield from self._unscreened(number, max_candidates)
            return
        fresh: list[Candidate] = []
        for candidate in self._proposed(number, self._wanted(max_candidates)):
            if candidate.status == "new":
                fresh.append(candidate)
            else:
                yield candidate
        yield from self._screened(fresh)
        yield from self._with_better_numbers(number, max_candidates)
        rungs, history = self._rungs, self.history
        chosen = to_quick_kl(rungs, history, number)
        yield from self._measured_on(QUICK_KL, chosen)
        # Of search text the best few matter, of validation text the best alone.
        rival = self._rival("search", FINALISTS)
        yield from self._measured_on("search", to_measure(rungs, history, number), rival)
        rival = self._rival("validation", 1)
        yield from self._measured_on("validation", to_validate(history), rival)

    def _unscreened(self, generation: int, max_candidates: int | None) -> Iterator[Candidate]:
        """All candidates of one generation, measured at once; a known mask has its own value."""
        found = list(self._proposed(generation, self._wanted(max_candidates)))
        new = [one for one in found if one.status == "new"]
        measured = self._measured_on("search", new)
        fields = self._fields("search")
        for one in found:
            if one.status == "new":
                now = next(measured, None)
                if now is None:
                    return
                self._values_of_mask[now.mask] = {key: getattr(now, key) for key in fields}
                yield now
            else:
                yield self.history.keep(replace(one, **self._values_of_mask.get(one.mask, {})))

    def _wanted(self, max_candidates: int | None) -> int:
        size = self._strategy.generation or self._rungs.task.space.generation
        return size if max_candidates is None else min(size, max_candidates - self.charged)

    def _proposed(self, generation: int, wanted: int) -> Iterator[Candidate]:
        """Candidates until enough of them have a mask of their own, or count without one."""
        history, strategy = self.history, self._strategy
        limit = None if strategy.is_exhaustive else _MAX_PROPOSALS * max(1, wanted)
        proposals = itertools.islice(self._propose(history, generation), limit)
        # Asked before each draw: a strategy may not make the same proposal twice.
        going_on = iter(lambda: wanted > 0 and not self._stop(), False)
        for _, proposal in zip(going_on, proposals, strict=False):
            slot = history.slot
            history.slot += 1
            if proposal is not None:
                candidate = self._probed(proposal, slot, generation)
                wanted -= candidate.status == "new" or not strategy.is_screened
                yield candidate

    def _probed(self, proposal: Proposal, slot: int, generation: int) -> Candidate:
        """The candidate that a proposal becomes: invalid, known, or new."""
        rule = proposal.rule
        candidate = Candidate(
            slot,
            generation,
            rule.criterion,
            proposal.origin,
            proposal.parents,
            "known",
            rule.choices,
            objective=self._rungs.task.config.objective,
        )
        duplicate = self.history.duplicate(rule)
        if duplicate is not None:
            return self.history.keep_known(candidate, duplicate)
        probe = self._rungs.probe(rule)
        if probe is None:
            return self.history.keep(replace(candidate, status="invalid", fault=_RANKS_NOTHING))
        duplicate = self.history.duplicate(rule, probe.digest)
        if duplicate is not None:
            return self.history.keep_known(candidate, duplicate)
        distance = 1.0 if self._usual is None else probe.differs(self._usual)
        behaviour = sum(distance > limit for limit in _DISTANCES)
        return self.history.keep(
            replace(candidate, status="new", mask=probe.digest, behaviour=behaviour)
        )

    def _screened(self, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        answers = self._rungs.errors([candidate.rule for candidate in candidates])
        yield from self._taken(candidates, answers, {"layer_error": "layer_error"})

    def _with_better_numbers(
        self, generation: int, max_candidates: int | None
    ) -> Iterator[Candidate]:
        """Candidates made of the best skeletons that were not yet tuned."""
        space = self._rungs.task.space
        best = self.history.best_of_each(self._family)
        waiting = [
            candidate
            for candidate in itertools.islice(best, space.population)
            if self._family(candidate) not in self._tuned
        ][: min(space.tuned, self._wanted(max_candidates))]
        self._tuned.update(map(self._family, waiting))
        answers = self._rungs.tunings([candidate.rule for candidate in waiting], space.trials)
        found = []
        for candidate in waiting:
            if self._stop():
                return
            # One that could not be tuned stays as it is, and so is known.
            formula = next(answers).get("formula", candidate.criterion.text)
            rule = with_formula(self._rungs.task, candidate.rule, Criterion.parse(formula))
            if space.holds(rule.criterion):
                slot = self.history.slot
                self.history.slot += 1
                proposal = Proposal(rule, "tune", (candidate.slot,))
                found.append(self._probed(proposal, slot, generation))
        yield from (one for one in found if one.status != "new")
        yield from self._screened([one for one in found if one.status == "new"])

    def _family(self, candidate: Candidate) -> tuple[str, str, str]:
        """What is tuned once: other numbers may be the best where other weights compete."""
        competing = self._rungs.task.competing(candidate.choices)
        damping = str(shown_by_mask(candidate.rule).get("damping", ""))
        return skeleton(candidate.criterion), competing, damping

    def _fields(self, split: str) -> dict[str, str]:
        """What a candidate keeps of an answer on a text: its field, and the answer's key."""
        if split == QUICK_KL:
            return {key: key for key in TO_DENSE}
        own = self._rungs.task.objective
        perplexity = {f"{split}_perplexity": f"{split}_perplexity"}
        return perplexity if own.is_usual else {f"{split}_objective": own.key(split), **perplexity}

    def _measured_on(
        self, split: str, candidates: Sequence[Candidate], rival: Sequence[float] = ()
    ) -> Iterator[Candidate]:
        task = self._rungs.task
        recipes = [task.recipe(one.rule, f"candidate-{one.slot}") for one in candidates]
        answers = self._rungs.rows(recipes, (split,), rival=rival)
        seen = self._with_windows(split, candidates, answers)
        yield from self._taken(candidates, seen, self._fields(split))

    def _with_windows(
        self, split: str, candidates: Sequence[Candidate], answers: Iterator[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """The answers, of which the windows are kept that another candidate may have to reach."""
        for candidate, answer in zip(candidates, answers, strict=True):
            if self._may_stop_early and split != QUICK_KL and "fault" not in answer:
                told = answer.get(STOPPED)
                if told is None:
                    self._windows[split, candidate.slot] = answer
                else:
                    answer = answer | {f"{split}_at_least": told["at_least"]}
            yield answer

    def _rival(self, split: str, place: int) -> list[float]:
        """The objective by window, turned, of who stands at a place from 1; nothing of nobody.

        It is of those measured before, and so is the same whoever measures, and how quickly.
        """
        ranked = self.history.ranked(f"{split}_fitness")
        if not self._may_stop_early or len(ranked) < place:
            return []
        answer = self._windows[split, ranked[place - 1].slot]
        return self._rungs.task.objective.of_windows(answer, split)

    def _taken(
        self,
        candidates: Sequence[Candidate],
        answers: Iterator[dict[str, Any]],
        fields: Mapping[str, str],
    ) -> Iterator[Candidate]:
        """The candidates with their answers; one that fails on some layer is invalid.

        Args:
            fields: of a candidate, and keys of answers; who has no number in the first failed.
        """
        first, decisive = next(iter(fields.items()))
        for candidate in candidates:
            if self._stop():
                return
            answer = next(answers)
            values: dict[str, Any] = {field: answer.get(key) for field, key in fields.items()}
            seconds = answer.get("elapsed", answer.get("seconds", 0.0))
            candidate = replace(
                candidate,
                seconds=candidate.seconds + seconds,
                is_replayed=answer.get("is_replayed", False),
            )
            bounds = {key: answer[key] for key in BOUNDS if key in answer}
            if bounds:
                yield self.history.keep(replace(candidate, **bounds))
            elif values[first] is None:
                self.history.new -= first == "layer_error"
                fault = answer.get("fault", f"its {decisive.replace('_', ' ')} is not finite")
                yield self.history.keep(replace(candidate, status="invalid", fault=fault))
            else:
                yield self.history.keep(replace(candidate, **values))
