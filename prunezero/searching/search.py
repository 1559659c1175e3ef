"""The search itself: propose, screen, measure, remember, and yield every candidate.

A generation proposes formulas until enough of them have a mask that was never seen; a formula whose
mask is known costs a few milliseconds and nothing of the budget. Then the few that earned it are
measured on the model, and the next generation breeds from what is known by then.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from prunezero.errors import ScoreError
from prunezero.searching.candidate import Candidate
from prunezero.searching.ladder import Ladder, ProbeMask
from prunezero.searching.space import SearchSpace
from prunezero.searching.strategies import Proposal, Tuning, breed, generator

# Proposals for one new mask before a space counts as exhausted.
_MAX_PROPOSALS = 40
# Masks that differ on fewer of the probed weights are not both worth a measurement.
_MIN_DIFFERENCE = 0.02
# How many times the best layer error a candidate may have to be measured by luck.
_NEAR = 1.3


@dataclass
class _Memory:
    """What was found so far, best first on each rung."""

    space: SearchSpace
    slot: int = 0
    new: int = 0
    formulas: dict[str, Candidate] = field(default_factory=dict)
    masks: dict[str, Candidate] = field(default_factory=dict)
    probes: dict[int, ProbeMask] = field(default_factory=dict)
    screened: list[Candidate] = field(default_factory=list)
    measured: list[Candidate] = field(default_factory=list)

    @property
    def population(self) -> list[Candidate]:
        return self.screened[: self.space.population]

    def keep(self, candidate: Candidate, probe: ProbeMask | None) -> None:
        self.formulas[candidate.criterion.text] = candidate
        if probe is None or candidate.layer_error is None:
            return
        self.masks[probe.digest] = candidate
        self.probes[candidate.slot] = probe
        insort(self.screened, candidate, key=lambda one: (one.layer_error, one.slot))

    def keep_measured(self, candidate: Candidate) -> None:
        insort(self.measured, candidate, key=lambda one: (one.search_perplexity, one.slot))

    def is_worth_measuring(self, candidate: Candidate) -> bool:
        """Whether no measured candidate has nearly the same mask."""
        probe = self.probes[candidate.slot]
        return all(
            probe.differs(self.probes[other.slot]) >= _MIN_DIFFERENCE for other in self.measured
        )


def search(
    ladder: Ladder, *, budget: int | None = None, stop: Callable[[], bool] = lambda: False
) -> Iterator[Candidate]:
    """Look for formulas; yields each candidate when screened, and again when it is measured.

    The same task yields the same candidates in the same order, however often it is interrupted and
    resumed from its journal.

    Args:
        budget: candidates with a new mask to screen; None goes on until `stop` or exhaustion.
        stop: asked before every piece of work; True ends the search.
    """
    memory = _Memory(ladder.task.space)
    for generation in itertools.count():
        before = memory.new
        yield from _screened(ladder, memory, generation, budget, stop)
        if memory.new == before or stop():
            return
        for candidate in _promoted(ladder, memory, generation):
            if stop():
                return
            measured = _measured(ladder, candidate)
            if measured is not None:
                memory.keep_measured(measured)
                yield measured
        if budget is not None and memory.new >= budget:
            return


def _screened(
    ladder: Ladder,
    memory: _Memory,
    generation: int,
    budget: int | None,
    stop: Callable[[], bool],
) -> Iterator[Candidate]:
    """Candidates of one generation, until enough of them are new."""
    space = ladder.task.space
    wanted = memory.new + space.generation
    if budget is not None:
        wanted = min(wanted, budget)
    tuning = _tuning(ladder, memory, generation)
    tuned = round(space.tuned * space.generation) if tuning is not None else 0
    seeds = iter(ladder.task.seeds if generation == 0 else ())
    for attempt in range(_MAX_PROPOSALS * space.generation):
        if memory.new >= wanted or stop():
            return
        slot = memory.slot
        memory.slot += 1
        seed = next(seeds, None)
        if seed is not None:
            proposal: Proposal | None = Proposal(seed, "seed", ())
        elif tuning is not None and attempt < tuned:
            proposal = tuning.ask()
        else:
            rng = generator(ladder.task.seed, slot, "breed")
            pool = memory.population if generation else []
            proposal = breed(space, pool, memory.measured, rng)
        candidate = _judged(ladder, memory, proposal, slot, generation) if proposal else None
        if tuning is not None and attempt < tuned:
            tuning.tell(candidate.layer_error if candidate else None)
        if candidate is not None:
            yield candidate


def _tuning(ladder: Ladder, memory: _Memory, generation: int) -> Tuning | None:
    space = ladder.task.space
    if not memory.measured or not space.tuned:
        return None
    seed = generator(ladder.task.seed, generation, "tune").randrange(2**31)
    return Tuning(memory.measured[0], space, seed)


def _judged(
    ladder: Ladder, memory: _Memory, proposal: Proposal, slot: int, generation: int
) -> Candidate:
    """The candidate that a proposal becomes: invalid, known, or new with its layer error."""
    candidate = Candidate(
        slot, generation, proposal.criterion, proposal.origin, proposal.parents, "known"
    )
    twin = memory.formulas.get(proposal.criterion.text)
    if twin is not None:
        return replace(candidate, mask=twin.mask, layer_error=twin.layer_error)
    probe = ladder.probe(proposal.criterion)
    if probe is None:
        candidate = replace(candidate, status="invalid")
        memory.keep(candidate, None)
        return candidate
    twin = memory.masks.get(probe.digest)
    if twin is not None:
        candidate = replace(candidate, mask=probe.digest, layer_error=twin.layer_error)
        memory.formulas[proposal.criterion.text] = candidate
        return candidate
    found = ladder.error(proposal.criterion)
    candidate = replace(
        candidate,
        status="invalid" if found["layer_error"] is None else "new",
        mask=probe.digest,
        layer_error=found["layer_error"],
        seconds=found["seconds"],
        is_replayed=found.get("is_replayed", False),
    )
    memory.new += candidate.status == "new"
    memory.keep(candidate, probe)
    return candidate


def _promoted(ladder: Ladder, memory: _Memory, generation: int) -> Iterator[Candidate]:
    """The candidates that earned a measurement: the best by error, and one by luck.

    The lucky one is drawn from those whose error comes near the best, so that a formula that the
    layer error underrates has a chance, and the error itself is put to the test.
    """
    count = ladder.task.space.measured
    for place in range(count):
        measured = {candidate.slot for candidate in memory.measured}
        waiting = [
            candidate
            for candidate in memory.population
            if candidate.slot not in measured and memory.is_worth_measuring(candidate)
        ]
        if not waiting:
            return
        is_last = place == count - 1 and count > 1
        limit = _NEAR * (memory.screened[0].layer_error or 0.0)
        near = [one for one in waiting if (one.layer_error or 0.0) <= limit] or waiting[:1]
        rng = generator(ladder.task.seed, generation, "promote")
        yield rng.choice(near) if is_last else waiting[0]


def _measured(ladder: Ladder, candidate: Candidate) -> Candidate | None:
    """The candidate with its perplexity on search text; None when that is not finite."""
    recipe = ladder.task.recipe(candidate.criterion, f"candidate-{candidate.slot}")
    try:
        row = ladder.measure(recipe, ("search",))
    except ScoreError:
        return None
    if row["search_perplexity"] is None:
        return None
    return replace(
        candidate,
        search_perplexity=row["search_perplexity"],
        seconds=candidate.seconds + row["seconds"],
        is_replayed=row.get("is_replayed", False),
    )
