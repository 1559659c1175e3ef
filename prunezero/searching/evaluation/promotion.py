"""Who climbs to the next rung? The best of the one below, and a third by luck.

How many climb follows from how well the lower rung foretells the upper one
(`rung_correlation.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from prunezero.searching.evaluation.rung_correlation import fidelity, width
from prunezero.searching.evaluation.rungs import Ladder
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.history import Memory, beside_mask
from prunezero.searching.strategies.evolution import generator

# Candidates of each search that stand on validation text, the best on search text.
FINALISTS = 3
# Masks that differ on fewer of the probed weights are not both worth a measurement.
_MIN_DIFFERENCE = 0.02
# How many times the best value of a rung a candidate may have to be promoted by luck.
_NEAR = 1.3
# How many times the size of the population are looked at for one that is unlike all others.
_LOOKED_AT = 4


def to_glance(ladder: Ladder, memory: Memory, generation: int) -> list[Candidate]:
    """Those whose distance to the dense model is looked at next, on a little text."""
    space = ladder.task.space
    count = width(space.glanced, fidelity(memory.candidates, "layer_error", "kl"))
    chosen = _promoted(ladder, memory, ("layer_error", "kl"), count, generation)
    waiting = [
        one
        for one in memory.candidates
        if one.generation == generation and one.status == "new" and one.kl is None
    ]
    # What others hold good is looked at, whatever the layer error says of it.
    known = [one for one in waiting if one.origin == "seed"]
    # What is done beside masking is not seen by the layer error, and formulas of some layers move
    # it little.
    unseen = [one for one in waiting if one.origin == "choose"][: space.glanced]
    asked = [*known, *unseen]
    return chosen + _unlike(ladder, asked, chosen, len(asked))


def to_measure(ladder: Ladder, memory: Memory, generation: int) -> list[Candidate]:
    """Those whose perplexity is measured next, on all search text."""
    rungs = ("kl", "search_perplexity")
    count = width(ladder.task.space.measured, fidelity(memory.candidates, *rungs))
    return _promoted(ladder, memory, rungs, count, generation)


def to_judge(memory: Memory) -> list[Candidate]:
    """Those that are among the best on search text, and not yet on validation text."""
    return [
        one
        for one in memory.ranked("search_perplexity")[:FINALISTS]
        if one.validation_perplexity is None and one.status == "new"
    ]


def _promoted(
    ladder: Ladder, memory: Memory, rungs: tuple[str, str], count: int, generation: int
) -> list[Candidate]:
    """The best by the lower rung that wait for the upper one, a third of them by luck.

    The lucky ones are drawn from those that come near the best, this generation's first, so that a
    candidate which the lower rung underrates has a chance, and the rung itself is put to the test.
    Of those that do nearly the same, one climbs at most.
    """
    lower, upper = rungs
    ranked = memory.ranked(lower)
    there = [one for one in ranked if getattr(one, upper) is not None]
    waiting = [one for one in ranked if getattr(one, upper) is None and one.status == "new"]
    lucky = max(1, count // 3) if count > 1 else 0
    chosen = _unlike(ladder, waiting, there, count - lucky)
    near = [one for one in waiting if getattr(one, lower) <= _NEAR * getattr(ranked[0], lower)]
    near = [one for one in near if one not in chosen]
    generator(ladder.task.seed, generation, f"promote to {upper}").shuffle(near)
    near.sort(key=lambda one: one.generation != generation)
    return chosen + _unlike(ladder, near, [*there, *chosen], lucky)


def _unlike(
    ladder: Ladder, candidates: Sequence[Candidate], others: Sequence[Candidate], count: int
) -> list[Candidate]:
    """The first of the candidates that do nearly the same as none of the others, nor each other."""
    found: list[Candidate] = []
    for candidate in candidates[: _LOOKED_AT * ladder.task.space.population]:
        if len(found) == count:
            break
        if _differs(ladder, candidate, [*others, *found]):
            found.append(candidate)
    return found


def _differs(ladder: Ladder, candidate: Candidate, others: Sequence[Candidate]) -> bool:
    """Whether none of the others does nearly the same."""
    probe = ladder.probe(candidate.rule)
    for other in others:
        if beside_mask(other.rule) == beside_mask(candidate.rule):
            theirs = ladder.probe(other.rule)
            if probe and theirs and probe.differs(theirs) < _MIN_DIFFERENCE:
                return False
    return True
