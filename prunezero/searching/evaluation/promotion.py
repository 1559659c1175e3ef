"""Promotion: who climbs to the next rung; the best of the one below, and a third at random.

How many climb follows from how well the lower rung foretells the upper one
(`rung_correlation.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from prunezero.searching.evaluation.rung_correlation import rung_correlation, width
from prunezero.searching.evaluation.rungs import Rungs
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.history import History, beside_mask
from prunezero.searching.strategies.evolution import generator

# Candidates of each search that stand on validation text, the best on search text.
FINALISTS = 3
# Masks that differ on fewer of the probed weights are not both worth a measurement.
_MIN_DIFFERENCE = 0.02
# How many times the best value of a rung a candidate may have to be promoted at random.
_NEAR = 1.3
# How many times the size of the population are looked at for one that is unlike all others.
_LOOKED_AT = 4


def to_quick_kl(rungs: Rungs, history: History, generation: int) -> list[Candidate]:
    """Those whose distance to the dense model is looked at next, on a little text."""
    space = rungs.task.space
    count = width(space.quick_kl, rung_correlation(history.candidates, "layer_error", "kl"))
    chosen = _promoted(rungs, history, ("layer_error", "kl"), count, (generation, "kl"))
    waiting = [
        one
        for one in history.candidates
        if one.generation == generation and one.status == "new" and one.kl is None
    ]
    # What others hold good is looked at, whatever the layer error says of it.
    known = [one for one in waiting if one.origin == "seed"]
    # What is done beside masking is not seen by the layer error, and formulas of some layers move
    # it little.
    unseen = [one for one in waiting if one.origin == "choose"][: space.quick_kl]
    asked = [*known, *unseen]
    return chosen + _unlike(rungs, asked, chosen, len(asked))


def to_measure(rungs: Rungs, history: History, generation: int) -> list[Candidate]:
    """Those that are measured next, on all search text."""
    # Who was stopped early there is ranked behind whom it could not reach.
    pair = ("kl", "search_rank")
    count = width(rungs.task.space.measured, rung_correlation(history.candidates, *pair))
    return _promoted(rungs, history, pair, count, (generation, "search_perplexity"))


def to_validate(history: History) -> list[Candidate]:
    """Those that are among the best on search text, and not yet on validation text."""
    return [
        one
        for one in history.ranked("search_fitness")[:FINALISTS]
        if one.validation_fitness is None
        and one.validation_at_least is None
        and one.status == "new"
    ]


def _promoted(
    rungs: Rungs, history: History, pair: tuple[str, str], count: int, draw: tuple[int, str]
) -> list[Candidate]:
    """The best by the lower rung that wait for the upper one, a third of them at random.

    The random ones are drawn from those that come near the best, this generation's first, so that a
    candidate which the lower rung underrates has a chance, and the rung itself is put to the test.
    Of those that do nearly the same, one climbs at most.

    Args:
        pair: fields of the two rungs.
        draw: the generation, and the upper rung's name in the seed, whatever is measured there.
    """
    generation, name = draw
    lower, upper = pair
    ranked = history.ranked(lower)
    there = [one for one in ranked if getattr(one, upper) is not None]
    waiting = [one for one in ranked if getattr(one, upper) is None and one.status == "new"]
    at_random = max(1, count // 3) if count > 1 else 0
    chosen = _unlike(rungs, waiting, there, count - at_random)
    near = [one for one in waiting if getattr(one, lower) <= _NEAR * getattr(ranked[0], lower)]
    near = [one for one in near if one not in chosen]
    generator(rungs.task.seed, generation, f"promote to {name}").shuffle(near)
    near.sort(key=lambda one: one.generation != generation)
    return chosen + _unlike(rungs, near, [*there, *chosen], at_random)


def _unlike(
    rungs: Rungs, candidates: Sequence[Candidate], others: Sequence[Candidate], count: int
) -> list[Candidate]:
    """The first of the candidates that do nearly the same as none of the others, nor each other."""
    found: list[Candidate] = []
    for candidate in candidates[: _LOOKED_AT * rungs.task.space.population]:
        if len(found) == count:
            break
        if _differs(rungs, candidate, [*others, *found]):
            found.append(candidate)
    return found


def _differs(rungs: Rungs, candidate: Candidate, others: Sequence[Candidate]) -> bool:
    """Whether none of the others does nearly the same."""
    probe = rungs.probe(candidate.rule)
    for other in others:
        if beside_mask(other.rule) == beside_mask(candidate.rule):
            theirs = rungs.probe(other.rule)
            if probe and theirs and probe.differs(theirs) < _MIN_DIFFERENCE:
                return False
    return True
