"""Parents, selected by tournament: the best of every skeleton, and the best of every kind.

Evolution that keeps only the best soon breeds one family. Here candidates retire with age, and the
archive of kinds, after MAP-Elites (Mouret & Clune 2015, arXiv:1504.04909), keeps for every size,
signal and behaviour the best that was found, so that a short formula without gradients stays in.
And a rank is worth less where many are of one size, after the adaptive parsimony of PySR (Cranmer
2023, arXiv:2305.01582), so that the short formulas that stay in also have children.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.history import History
from prunezero.searching.spaces.space import SearchSpace

# Sizes of formulas that are told apart.
_SIZES = (4, 8, 12)
# Generations after which a candidate has children only as the best of its kind, or by its KL.
_RETIRES = 20
# What a crowd costs: a rank counts 1 + 4 times the fraction of the pool that has its size, so twice
# where a quarter has it, and never five times: the best still loses to its next few at most.
_CROWDING = 4

Kind = tuple[int, str, int]


@dataclass(frozen=True)
class ParentPool:
    """The candidates that may have children in one generation, the best first in each list."""

    islands: tuple[list[Candidate], ...]
    """by layer error; slot s breeds on island s modulo their number, and the best of every kind,
    wherever it was found, on all of them"""
    everyone: list[Candidate]
    """by layer error, of all islands"""
    quick_kl: list[Candidate]
    """by KL to the dense model, of all islands"""
    tournament: int
    """how many are drawn to find one parent"""

    @classmethod
    def among(cls, history: History, space: SearchSpace, generation: int) -> ParentPool:
        """The parents of a generation; places of those that retired go to younger ones."""
        best = list(history.best_of_each(kind))
        count, oldest = space.islands, generation - _RETIRES
        islands = tuple(
            _united(
                history.population(space.population, island=(which, count), oldest=oldest), best
            )
            for which in range(count)
        )
        everyone = _united(*islands)
        return cls(islands, everyone, history.ranked("kl"), space.tournament)

    def parent(self, slot: int | None, rng: random.Random, *, quick_kl: float = 0.5) -> Candidate:
        """The winner of a tournament among candidates that are ordered by the same rung.

        It is the one of the best rank, where those of crowded sizes count as if they ranked lower.

        Args:
            slot: of the child, which says the island; None looks on all of them.
            quick_kl: chance that the tournament is among those that were run on the model.
        """
        ranked = self.everyone if slot is None else self.islands[slot % len(self.islands)]
        if len(self.quick_kl) > 1 and rng.random() < quick_kl:
            ranked = self.quick_kl
        ranked = ranked or self.everyone
        crowds = Counter(one.complexity for one in ranked)

        def cost(rank: int) -> tuple[int, int]:
            crowd = crowds[ranked[rank].complexity]
            return (rank + 1) * (len(ranked) + _CROWDING * crowd), rank

        return ranked[min((rng.randrange(len(ranked)) for _ in range(self.tournament)), key=cost)]


def kind(candidate: Candidate) -> Kind:
    """Size, costliest signal, and behaviour of a candidate."""
    size = sum(candidate.complexity > limit for limit in _SIZES)
    return size, candidate.signal, candidate.behaviour


def _united(*lists: list[Candidate]) -> list[Candidate]:
    found = {candidate.slot: candidate for candidates in lists for candidate in candidates}
    return sorted(found.values(), key=lambda one: (one.layer_error or 0.0, one.slot))
