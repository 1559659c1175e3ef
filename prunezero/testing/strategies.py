"""Does a strategy keep its promises? For authors of strategies, to be called from a test.

    from prunezero.testing.strategies import broken_promises
    assert broken_promises(MY_STRATEGY, task) == []

A search trusts them all: it can be resumed only if the same memory brings the same proposals.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace

from prunezero.errors import PruneZeroError, reason
from prunezero.formula.criterion import Criterion
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.task import Task
from prunezero.searching.history import History
from prunezero.searching.strategies.evolution import Proposal, Strategy

# Proposals that are looked at, in two generations.
_COUNT = 40
# Draws for one proposal before a strategy counts as silent.
_DRAWS = 50


def broken_promises(strategy: Strategy, task: Task) -> list[str]:
    """What a strategy does that it must not, one sentence each; none for a good one.

    Every proposal is taken for a new mask whose layer error follows from its text, so no model is
    needed.
    """
    found = list(_proposals(strategy, task))
    broken = [sentence for proposal in found for sentence in _faults(proposal, task)]
    if not found:
        broken.append(f"it proposes nothing in {_DRAWS} draws")
    if found != list(_proposals(strategy, task)):
        broken.append("started twice on the same task, it proposes something else")
    return list(dict.fromkeys(broken))


def _proposals(strategy: Strategy, task: Task) -> Iterator[Proposal]:
    history = History()
    propose = strategy.start(task)
    for generation in range(2):
        drawn = itertools.islice(propose(history, generation), _COUNT // 2 * _DRAWS)
        for proposal in itertools.islice((one for one in drawn if one), _COUNT // 2):
            yield proposal
            history.keep(_judged(proposal, history.slot, generation))
            history.slot += 1


def _judged(proposal: Proposal, slot: int, generation: int) -> Candidate:
    """The candidate that the proposal would become, with numbers that follow from its text."""
    rule = proposal.rule
    value = sum(map(ord, rule.text)) % 97 / 97
    candidate = Candidate(
        slot, generation, rule.criterion, proposal.origin, proposal.parents, "new", rule.choices
    )
    return replace(candidate, mask=rule.text, layer_error=value, search_perplexity=1 + value)


def _faults(proposal: Proposal, task: Task) -> Iterator[str]:
    rule = proposal.rule
    if not all(map(task.space.holds, rule.formulas)):
        yield f"{rule.text} is too large for the space, nests what it forbids, or ranks nothing"
    try:
        if Criterion.parse(rule.criterion.text) != rule.criterion:
            yield f"{rule.text} is read back as another formula"
        json.dumps(dict(rule.choices), allow_nan=False)
        task.recipe(rule, "candidate")
    except (PruneZeroError, TypeError, ValueError) as error:
        yield f"{rule.text} is no recipe: {reason(error)}"
