"""Evolution, the usual strategy: who proposes the next rules; `catalogue.py` lists the others.

Every draw has its own generator, seeded by (search seed, slot, purpose), and everything else
follows from the memory, so a search that is resumed proposes exactly what it would have proposed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from prunezero.errors import CriterionError, RecipeError
from prunezero.formula.criterion import Criterion
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.task import Task
from prunezero.searching.history import History
from prunezero.searching.strategies.genetics import as_seen, cross, mutate, random_criterion
from prunezero.searching.strategies.parents import ParentPool
from prunezero.searching.strategies.per_layer import with_formula, with_own_formula

# By what the share of some layers in the sparsity is multiplied.
_SHARES = (0.8, 0.9, 1.1, 1.25)
# Share of fathers from the whole archipelago.
_MIGRATION = 0.1


@dataclass(frozen=True)
class Proposal:
    """A rule that nobody has measured yet."""

    rule: Rule
    origin: str
    """what made it, see `Candidate.origin`"""
    parents: tuple[int, ...] = ()
    """slots of the candidates it was made from"""


Proposals = Iterator[Proposal | None]
# The proposals of one generation, endless unless a strategy says otherwise; None where a draw came
# to nothing. The memory grows between them, and its `slot` is that of the next proposal.
Propose = Callable[[History, int], Proposals]


@dataclass(frozen=True)
class Strategy:
    """Who proposes, and what proposals go through."""

    start: Callable[[Task], Propose]
    """begins a search and gives who draws the proposals of each of its generations"""
    note: str
    """what it is, in one line"""
    is_screened: bool = True
    """whether candidates climb the rungs; else all are measured at once, repeated masks too"""
    is_exhaustive: bool = False
    """whether it ends by itself when nothing is left, however many known masks come in a row"""
    generation: int | None = None
    """candidates of one generation; None leaves it to the space"""
    forgets_masks: bool = False
    """whether a mask that was seen before costs as much as a new one"""


def ending(propose: Propose) -> str:
    """What a started strategy says of its end; nothing before it ended, or where it says nothing.

    One that ends by itself starts with an object whose attribute `ending` is that sentence.
    """
    return str(getattr(propose, "ending", ""))


def generator(seed: int, slot: int, purpose: str) -> random.Random:
    """The generator of one draw; the same for the same three, in every process."""
    digest = hashlib.blake2b(f"{seed}/{slot}/{purpose}".encode(), digest_size=8)
    return random.Random(int.from_bytes(digest.digest(), "big"))


def without_state(propose: Callable[[Task, History, int], Proposals]) -> Callable[[Task], Propose]:
    """The start of a strategy that remembers nothing beside the memory of the search."""
    return lambda task: partial(propose, task)


def evolve(task: Task, history: History, generation: int) -> Proposals:
    """Seeds first; then children of the best on their islands, other choices, fresh formulas."""
    if generation == 0:
        yield from (Proposal(seed, "seed") for seed in task.seeds)
        yield from fresh(task, history, generation)
    parent_pool = ParentPool.among(history, task.space, generation)
    while True:
        yield _bred(task, history.slot, parent_pool)


def fresh(task: Task, history: History, generation: int) -> Proposals:
    """Fresh formulas only, drawn alike in every generation."""
    while True:
        yield _fresh(task, generator(task.seed, history.slot, "breed"))


def child_of(
    task: Task, criterion: Criterion | None, origin: str, *parents: Candidate
) -> Proposal | None:
    """A formula made from these candidates, the first of which gives the choices around it."""
    if criterion is None:
        return None
    rule = with_formula(task, parents[0].rule, criterion) if parents else Rule(criterion)
    return Proposal(rule, origin, tuple(parent.slot for parent in parents))


def _fresh(task: Task, rng: random.Random) -> Proposal | None:
    return child_of(task, random_criterion(task.space, rng, compare=task.competing({})), "random")


def _bred(task: Task, slot: int, parent_pool: ParentPool) -> Proposal | None:
    space = task.space
    rng = generator(task.seed, slot, "breed")
    kind = rng.random() - space.fresh
    if kind < 0 or not parent_pool.everyone:
        return _fresh(task, rng)
    if kind < space.chosen and (task.options or task.ratios or task.criteria):
        return _chosen(task, parent_pool.parent(slot, rng, quick_kl=1.0), parent_pool, rng)
    mother = parent_pool.parent(slot, rng)
    compare = task.competing(mother.choices)
    if kind > 1 - space.fresh - space.crossover:
        father = parent_pool.parent(None if rng.random() < _MIGRATION else slot, rng)
        child = cross(mother.criterion, father.criterion, space, rng, compare=compare)
        return child_of(task, child, "cross", mother, father)
    return child_of(task, mutate(mother.criterion, space, rng, compare=compare), "mutate", mother)


def _chosen(
    task: Task, parent: Candidate, parent_pool: ParentPool, rng: random.Random
) -> Proposal | None:
    """The parent with another value at one of the keys that the space leaves open."""
    apart = [key for key in ("ratios", "criteria") if getattr(task, key)]
    key = rng.choice([*sorted(task.options), *apart])
    if key == "ratios":
        return _moved(task, parent, rng)
    if key == "criteria":
        rule = with_own_formula(task, parent, parent_pool, rng)
        return None if rule == parent.rule else Proposal(rule, "choose", (parent.slot,))
    before = task.recipe(parent.rule, "candidate")
    rules = []
    for value in task.options[key]:
        rule = _with_choices(task, parent, {**parent.choices, key: value})
        # Compared as recipes: a value has several spellings, and one of them is to leave it out.
        with suppress(RecipeError):
            if task.recipe(rule, "candidate") != before:
                rules.append(rule)
    return Proposal(rng.choice(rules), "choose", (parent.slot,)) if rules else None


def _moved(task: Task, parent: Candidate, rng: random.Random) -> Proposal | None:
    """The parent with more or less taken from some layers, as a table of ratios."""
    choices = dict(parent.choices)
    given = choices.get("allocate")
    # Another allocation, such as owl with a spread of its own, gives way to a table.
    table = given.get("table", {}) if isinstance(given, Mapping) else {}
    ratios = dict(table.get("ratios", {}))
    pattern = rng.choice(task.ratios)
    ratios[pattern] = round(ratios.get(pattern, 1.0) * rng.choice(_SHARES), 3)
    choices["allocate"] = {"table": {"ratios": ratios}}
    if choices.get("compare", task.space.compare) == "model":
        # There all layers compete, and no table says how much each loses.
        choices["compare"] = "row"
    rule = _with_choices(task, parent, choices)
    try:
        task.recipe(rule, "candidate")
    except RecipeError:
        return None
    return Proposal(rule, "choose", (parent.slot,))


def _with_choices(task: Task, parent: Candidate, choices: Mapping[str, Any]) -> Rule:
    """The parent under other choices, without what no mask sees where other weights now compete."""
    rule, compare = Rule(parent.criterion, choices), task.competing(choices)
    if compare != task.competing(parent.choices):
        # What some layers have of their own was chosen for the other competition.
        rule = rule.with_per_layer({})
        with suppress(CriterionError):
            seen = as_seen(rule.criterion, task.space, compare)
            rule = Rule(seen, rule.choices) if task.space.holds(seen) else rule
    return rule
