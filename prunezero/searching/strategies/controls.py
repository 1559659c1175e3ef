"""Controls, strategies to compare with: genetic programming as Pruner-Zero has it, and Optuna.

A search that is said to be efficient has to be compared with something. These two see the same
formulas as evolution does; neither knows of published formulas, of skeletons or of kinds.
"""

from __future__ import annotations

import math
import random
from typing import Any

from prunezero.errors import CriterionError
from prunezero.formula.canonical import combine
from prunezero.formula.constants import number
from prunezero.formula.criterion import Criterion
from prunezero.formula.functions import REDUCTIONS
from prunezero.formula.vocabulary import OPERATORS
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.task import Task
from prunezero.searching.history import History
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.strategies.evolution import (
    Proposal,
    Proposals,
    Propose,
    child_of,
    generator,
)
from prunezero.searching.strategies.genetics import as_seen, cross, mutate, random_criterion

# Individuals of a generation, draws of a tournament, and the share of children by crossover.
# Source: Dong et al. 2024, Pruner-Zero, arXiv:2406.02924.
POPULATION = 50
_TOURNAMENT = 10
_CROSSOVER = 0.5
# A word of Optuna's that stands for a constant, whose value is a choice of its own.
_NUMBER = "number"


def breed_plainly(task: Task, history: History, generation: int) -> Proposals:
    """Endless individuals of one generation of plain genetic programming, whose size is POPULATION.

    The fitness is the search's objective on search text. Parents are the individuals of the last
    generation and the best so far, which is not measured again. Formulas stay as they were drawn,
    but for what SymPy simplifies.
    """
    parents = _parents(history, generation)
    while True:
        yield _plain_child(task, generator(task.seed, history.slot, "breed"), parents)


def _parents(history: History, generation: int) -> list[Candidate]:
    everyone = history.candidates
    parents = [one for one in everyone if one.generation == generation - 1]
    best = min(everyone, key=_fitness, default=None)
    return parents if best is None or best in parents else [*parents, best]


def _fitness(candidate: Candidate) -> tuple[float, int]:
    """What was measured, and the slot among equals; what could not be measured is the worst."""
    value = candidate.search_fitness
    return math.inf if value is None else value, candidate.slot


def _plain_child(task: Task, rng: random.Random, parents: list[Candidate]) -> Proposal | None:
    space = task.space
    if not parents:
        return child_of(task, random_criterion(space, rng, as_ranked=False), "random")
    mother = _winner(parents, rng)
    if rng.random() < _CROSSOVER:
        father = _winner(parents, rng)
        child = cross(mother.criterion, father.criterion, space, rng, as_ranked=False)
        return child_of(task, child, "cross", mother, father)
    return child_of(task, mutate(mother.criterion, space, rng, as_ranked=False), "mutate", mother)


def _winner(parents: list[Candidate], rng: random.Random) -> Candidate:
    return min((rng.choice(parents) for _ in range(_TOURNAMENT)), key=_fitness)


def suggest(task: Task) -> Propose:
    """Optuna's tree-structured Parzen estimator, one categorical choice for each place of a tree.

    A generation is asked for together, and is told its layer errors when the next one begins; a
    known mask has the error of its duplicate, and what ranks nothing is worse than all else:
    if it had no result, the words that never rank would stay the least known, and be chosen for it.

    Source: Bergstra et al. 2011, Algorithms for hyper-parameter optimization.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=task.seed)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    worst, dropped = optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.FAIL
    waiting: list[tuple[Any, Rule]] = []
    told: set[str] = set()

    def propose(history: History, generation: int) -> Proposals:
        errors = {one.mask: one.layer_error for one in history.ranked("layer_error")}
        for trial, rule in waiting:
            if rule.text in told:
                study.tell(trial, state=dropped)
                continue
            told.add(rule.text)
            error = _error(history.duplicate(rule), errors)
            study.tell(trial, error, state=worst if error is None else None)
        waiting.clear()
        while True:
            trial = study.ask()
            criterion = _written(trial, task)
            if criterion is None:
                study.tell(trial, state=worst)
                yield None
            else:
                waiting.append((trial, Rule(criterion)))
                yield Proposal(Rule(criterion), "optuna")

    return propose


def _error(candidate: Candidate | None, errors: dict[str, float | None]) -> float | None:
    if candidate is None or candidate.layer_error is not None:
        return None if candidate is None else candidate.layer_error
    # A duplicate in the same generation had no error yet when it was found to be one.
    return errors.get(candidate.mask)


def _written(trial: Any, task: Task) -> Criterion | None:
    """The formula that a trial spells, word by word; None if it is none of the space."""
    space = task.space
    try:
        criterion = Criterion.from_sympy(_spelled(trial, space, "n0", space.fresh_depth))
        criterion = as_seen(criterion, space, task.competing({}))
    except CriterionError:
        return None
    return criterion if space.holds(criterion) else None


def _spelled(trial: Any, space: SearchSpace, place: str, depth: int) -> Any:
    """The sub-formula at a place such as `n0.1`, of at most `depth` levels.

    A number is offered where an operator has a first operand already, and at the root nothing that
    is the same for all that competes: else four formulas of five would rank nothing.
    """
    is_whole = place == "n0"
    leaves = {one.text: one.sympy for one in space.terminals if space.holds(one) or not is_whole}
    operators = [name for name in space.operators if not (is_whole and name in REDUCTIONS)]
    numbers = [_NUMBER] if space.constants and place.endswith(".1") else []
    word = trial.suggest_categorical(place, [*leaves, *numbers, *(operators if depth > 1 else [])])
    if word in leaves:
        return leaves[word]
    if word == _NUMBER:
        return number(trial.suggest_categorical(f"{place}.{_NUMBER}", list(space.constants)))
    first = _spelled(trial, space, f"{place}.0", depth - 1)
    if word == "power":
        exponent = trial.suggest_categorical(f"{place}.exponent", list(space.exponents))
        return combine(OPERATORS[word], first, number(exponent))
    if OPERATORS[word].arity == 1:
        return combine(OPERATORS[word], first)
    return combine(OPERATORS[word], first, _spelled(trial, space, f"{place}.1", depth - 1))
