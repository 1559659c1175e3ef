"""Which formulas do some kinds of projection have of their own, and what becomes of them?

Where all layers compete, scores of two formulas do not compare, so there a kind has the formula of
the others times a factor, and keeps that factor when the formula changes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from prunezero.errors import CriterionError
from prunezero.formula.canonical import number
from prunezero.formula.criterion import Criterion
from prunezero.searching.candidate import Candidate
from prunezero.searching.proposing.genetics import mutate
from prunezero.searching.proposing.population import Breeders
from prunezero.searching.task import Rule, Task, rescaled

# By what the scores of a kind are multiplied.
_FACTORS = (0.8, 0.9, 1.1, 1.25)


def specialised(task: Task, parent: Candidate, breeders: Breeders, rng: random.Random) -> Rule:
    """The parent with another formula for one kind: another candidate's for it, or a mutant."""
    own = dict(parent.choices.get("criteria", {}))
    pattern = rng.choice(task.criteria)
    before = _formula_for(pattern, parent)
    own.pop(pattern, None)
    compare = task.competing(parent.choices)
    after = before
    if compare == "model":
        with suppress(CriterionError):
            after = Criterion.from_sympy(number(rng.choice(_FACTORS)) * before.sympy)
    elif rng.random() < 0.5:
        after = _formula_for(pattern, breeders.parent(None, rng, glanced=1.0))
    else:
        after = mutate(before, task.space, rng, compare=compare) or before
    if after != parent.criterion:
        own[pattern] = after.text
    return Rule(parent.criterion, _with(parent.choices, own))


def _formula_for(pattern: str, candidate: Candidate) -> Criterion:
    text = candidate.choices.get("criteria", {}).get(pattern)
    return candidate.criterion if text is None else Criterion.parse(text)


def around(rule: Rule, criterion: Criterion, compare: str) -> dict[str, Any]:
    """The choices of a rule, for another formula in its place."""
    if compare != "model":
        return dict(rule.choices)
    given = rule.choices.get("criteria", {})
    parsed = {pattern: Criterion.parse(text) for pattern, text in given.items()}
    own = rescaled(parsed, rule.criterion, criterion)
    return _with(rule.choices, {pattern: one.text for pattern, one in own.items()})


def _with(choices: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, Any]:
    others = {key: value for key, value in choices.items() if key != "criteria"}
    return {**others, "criteria": dict(sorted(own.items()))} if own else others
