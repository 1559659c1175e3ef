"""Who proposes the next formula: breeding from what was seen, or tuning of what is best.

Every draw has its own generator, seeded by (search seed, slot, purpose). No state is carried from
one proposal to the next, so a search that is resumed proposes exactly what it would have proposed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunezero.errors import CriterionError
from prunezero.formula.criterion import Criterion
from prunezero.searching.candidate import Candidate
from prunezero.searching.genetics import cross, mutate, random_criterion, tunable
from prunezero.searching.space import SearchSpace


@dataclass(frozen=True)
class Proposal:
    """A formula that nobody has judged yet."""

    criterion: Criterion
    origin: str
    """random, mutate, cross or tune"""
    parents: tuple[int, ...]
    """slots of the candidates it was made from"""


def generator(seed: int, slot: int, purpose: str) -> random.Random:
    """The generator of one draw; the same for the same three, in every process."""
    digest = hashlib.blake2b(f"{seed}/{slot}/{purpose}".encode(), digest_size=8)
    return random.Random(int.from_bytes(digest.digest(), "big"))


def breed(
    space: SearchSpace,
    screened: Sequence[Candidate],
    measured: Sequence[Candidate],
    rng: random.Random,
) -> Proposal | None:
    """A child of candidates that did well, or a fresh formula; None when no formula came out.

    Args:
        screened: candidates with a layer error, best first.
        measured: candidates with a perplexity, best first. The two are never ranked together:
            each parent is drawn from one of them.
    """
    kind = rng.random()
    if not screened or kind < space.fresh:
        return _proposal(random_criterion(space, rng), "random")
    mother = _parent(space, screened, measured, rng)
    if kind < space.fresh + space.crossover:
        father = _parent(space, screened, measured, rng)
        child = cross(mother.criterion, father.criterion, space, rng)
        return _proposal(child, "cross", mother.slot, father.slot)
    return _proposal(mutate(mother.criterion, space, rng), "mutate", mother.slot)


def _parent(
    space: SearchSpace,
    screened: Sequence[Candidate],
    measured: Sequence[Candidate],
    rng: random.Random,
) -> Candidate:
    """The winner of a tournament among candidates of one rung."""
    pool = measured if len(measured) > 1 and rng.random() < 0.5 else screened
    return pool[min(rng.randrange(len(pool)) for _ in range(space.tournament))]


def _proposal(criterion: Criterion | None, origin: str, *parents: int) -> Proposal | None:
    return None if criterion is None else Proposal(criterion, origin, parents)


class Tuning:
    """Optuna's TPE over the numbers of one formula, judged by the layer error.

    Ask and tell alternate, so the sampler, which is seeded, repeats itself when told the same.
    """

    def __init__(self, parent: Candidate, space: SearchSpace, seed: int) -> None:
        self.parent = parent
        self._space = space
        self._filled, self._values = tunable(parent.criterion)
        self._seed = seed
        self._study: Any = None
        self._trial: Any = None

    def ask(self) -> Proposal | None:
        """The formula with other numbers; None when it has none, or they make no formula."""
        if not self._values:
            return None
        if self._study is None:
            self._study = _study(self._seed)
        self._trial = self._study.ask()
        numbers = [
            value * self._trial.suggest_float(f"factor{index}", 0.3, 2.0)
            for index, value in enumerate(self._values)
        ]
        try:
            criterion = Criterion.from_sympy(self._filled(numbers))
        except CriterionError:
            return None
        if not self._space.holds(criterion):
            return None
        return Proposal(criterion, "tune", (self.parent.slot,))

    def tell(self, error: float | None) -> None:
        """Report the layer error of the last formula asked for; None when it has none."""
        import optuna

        if self._trial is not None:
            state = optuna.trial.TrialState
            if error is None:
                self._study.tell(self._trial, state=state.FAIL)
            else:
                self._study.tell(self._trial, error)
            self._trial = None


def _study(seed: int) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        seed=seed, multivariate=True, constant_liar=False, n_startup_trials=4
    )
    return optuna.create_study(direction="minimize", sampler=sampler)
