"""Per-layer formulas: kinds of projection that have one of their own, and what becomes of it.

Where all layers compete, scores of two formulas do not compare, so there a kind has the formula of
the others times a factor, and keeps that factor when the formula changes.
"""

from __future__ import annotations

import random
from contextlib import suppress

from prunezero.errors import CriterionError
from prunezero.formula.criterion import Criterion
from prunezero.formula.ranking import ranking_form
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.rule import Rule, factor_of, rescaled, scaled
from prunezero.searching.experiment.task import Task
from prunezero.searching.strategies.genetics import as_seen, mutate
from prunezero.searching.strategies.parents import ParentPool

# By what the scores of a kind are multiplied.
_FACTORS = (0.8, 0.9, 1.1, 1.25)


def with_own_formula(
    task: Task, parent: Candidate, parent_pool: ParentPool, rng: random.Random
) -> Rule:
    """The parent with another formula for one kind: another candidate's for it, or a mutant."""
    rule, pattern = parent.rule, rng.choice(task.criteria)
    before = rule.per_layer.get(pattern, rule.criterion)
    compare = task.competing(rule.choices)
    if compare == "model":
        now = factor_of(before, rule.criterion) or 1.0
        after = scaled(rule.criterion, now * rng.choice(_FACTORS))
    elif rng.random() < 0.5:
        donor = parent_pool.parent(None, rng, quick_kl=1.0).rule
        after = donor.per_layer.get(pattern, donor.criterion)
    else:
        after = mutate(before, task.space, rng, compare=compare)
    return settled(task, rule.with_per_layer({**rule.per_layer, pattern: after or before}))


def with_formula(task: Task, rule: Rule, criterion: Criterion) -> Rule:
    """The rule with another formula, and the choices around it as they fit that one."""
    own = rule.per_layer
    if task.competing(rule.choices) == "model":
        own = rescaled(own, rule.criterion, criterion)
    return settled(task, Rule(criterion, rule.choices).with_per_layer(own))


def settled(task: Task, rule: Rule) -> Rule:
    """The rule without what no mask sees of its kinds' formulas, nor what the space cannot hold.

    So a rule whose kinds rank as all others do is that of its formula alone.
    """
    compare = task.competing(rule.choices)
    own = {}
    for pattern, criterion in rule.per_layer.items():
        if compare != "model":
            # One that ranks nothing is kept, and fails by name.
            with suppress(CriterionError):
                criterion = as_seen(criterion, task.space, compare)
        if task.space.holds(criterion) and not _ranks_alike(criterion, rule.criterion, compare):
            own[pattern] = criterion
    return rule.with_per_layer(own)


def _ranks_alike(one: Criterion, other: Criterion, compare: str) -> bool:
    if one == other or compare == "model":
        return one == other
    try:
        return bool(ranking_form(one.sympy, compare) == ranking_form(other.sympy, compare))
    except CriterionError:
        return False
