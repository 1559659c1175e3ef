"""Who climbs: the best, some at random, and of those that do nearly the same only one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from prunezero.formula import Criterion
from prunezero.searching.evaluation.evaluator import ProbeMask
from prunezero.searching.evaluation.promotion import to_measure, to_quick_kl
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.history import History
from tests.searching.testbed import bare_task, tiny_space

# Probed weights; masks that differ on fewer than 20 of them do nearly the same.
PROBED = 1000
# Of whom a third climbs at random.
QUICK = 6


class Probed:
    """Rungs that know masks alone, those of formulas by their texts."""

    def __init__(self, masks: Mapping[str, set[int]], *, seed: int = 0) -> None:
        self.task = bare_task(tiny_space(quick_kl=QUICK, measured=QUICK), seed=seed)
        self._masks = masks

    def probe(self, rule: Rule) -> ProbeMask:
        mask = sorted(self._masks[rule.criterion.text])
        bits = np.zeros(PROBED, dtype=bool)
        bits[mask] = True
        return ProbeMask(str(mask), bits)


def apart(count: int) -> list[set[int]]:
    """Masks of which any two differ on 40 weights."""
    return [set(range(20 * place, 20 * place + 20)) for place in range(count)]


def near(mask: set[int], *, by: int) -> set[int]:
    """The mask, but for so many weights that no other mask has."""
    return mask | set(range(PROBED - by, PROBED))


def race(
    masks: Sequence[set[int]], errors: Sequence[float], *, seed: int = 0, **changes: Any
) -> tuple[Any, History]:
    """Rungs and a history of candidates with these masks and layer errors, in order of slots.

    Args:
        changes: further fields, each a dict from slot to value.
    """
    history, mask_of = History(), {}
    for slot, error in enumerate(errors):
        formula = Criterion.parse(f"abs(W)*X + {slot + 1}*R1")
        mask_of[formula.text] = masks[slot]
        fields: Any = {"mask": str(slot), "layer_error": error}
        one = Candidate(slot, 0, formula, "random", (), "new", **fields)
        own = {key: of[slot] for key, of in changes.items() if slot in of}
        history.keep(replace(one, **own))
    history.slot = len(errors)
    return Probed(mask_of, seed=seed), history


def slots(candidates: Sequence[Candidate]) -> list[int]:
    return [one.slot for one in candidates]


def rising(count: int, step: float = 0.001) -> list[float]:
    return [0.1 + step * place for place in range(count)]


def test_what_a_search_starts_from_gets_a_quick_kl_whatever_the_layer_error_says_of_it() -> None:
    masks = apart(30)
    masks[29] = near(masks[27], by=10)
    seeds = dict.fromkeys(range(20, 30), "seed")
    rungs, history = race(masks, rising(30, step=0.1), origin=seeds)
    # The best four; nobody comes near them. Of seeds that do nearly the same only one climbs.
    assert slots(to_quick_kl(rungs, history, 0)) == [*range(4), *range(20, 29)]
    assert slots(to_quick_kl(rungs, history, 1)) == [*range(4)]


def test_the_best_climb_and_a_third_at_random_from_those_that_come_near() -> None:
    # the last ten are beyond 1.3 times the best
    errors = [*rising(20), *rising(10, step=0.01)[::-1]]
    errors[20:] = [error + 0.1 for error in errors[20:]]
    drawn = []
    for seed in range(20):
        rungs, history = race(apart(30), errors, seed=seed)
        found = slots(to_quick_kl(rungs, history, 0))
        assert found[:4] == [0, 1, 2, 3] and len(set(found)) == QUICK
        drawn.append(found[4:])
    at_random = {slot for pair in drawn for slot in pair}
    assert at_random <= set(range(4, 20)) and len(at_random) > 8
    # not simply the next ones
    assert max(at_random) > 15


def test_who_climbs_at_random_is_a_function_of_the_seed_and_of_the_generation() -> None:
    def found(seed: int, generation: int) -> list[int]:
        rungs, history = race(apart(30), rising(30), seed=seed)
        return slots(to_quick_kl(rungs, history, generation))

    assert found(3, 0) == found(3, 0)
    assert found(3, 0) != found(4, 0) and found(3, 0) != found(3, 1)


def test_who_climbs_at_random_is_of_this_generation_first() -> None:
    rungs, history = race(apart(30), rising(30), generation={25: 7, 28: 7})
    found = slots(to_quick_kl(rungs, history, 7))
    assert found[:4] == [0, 1, 2, 3] and set(found[4:]) == {25, 28}


@pytest.mark.parametrize(("by", "is_seen"), [(19, False), (20, True)])
def test_the_best_that_do_nearly_the_same_do_not_both_climb(by: int, is_seen: bool) -> None:
    masks = apart(30)
    masks[1] = near(masks[0], by=by)
    rungs, history = race(masks, rising(30))
    found = slots(to_quick_kl(rungs, history, 0))
    assert (found[:4] == [0, 1, 2, 3]) == is_seen
    assert is_seen or found[:4] == [0, 2, 3, 4]


def test_one_that_does_what_had_a_quick_kl_before_does_not_climb() -> None:
    masks = apart(30)
    masks[0] = near(masks[20], by=5)
    rungs, history = race(masks, rising(30), kl={20: 0.5})
    assert slots(to_quick_kl(rungs, history, 0))[:4] == [1, 2, 3, 4]


def test_none_that_does_what_the_best_do_climbs_at_random() -> None:
    masks = apart(4)
    # all others but two do nearly what one of the best does
    masks += [near(masks[place % 4], by=5) for place in range(20)]
    masks += [set(range(500, 530)), set(range(540, 570))]
    for seed in range(5):
        rungs, history = race(masks, rising(26), seed=seed)
        found = slots(to_quick_kl(rungs, history, 0))
        assert found[:4] == [0, 1, 2, 3] and set(found[4:]) == {24, 25}


def test_of_those_that_do_nearly_the_same_one_climbs_at_random() -> None:
    masks = apart(4)
    masks += [set(range(500, 530)) | {600 + place} for place in range(20)]
    for seed in range(5):
        rungs, history = race(masks, rising(24), seed=seed)
        found = slots(to_quick_kl(rungs, history, 0))
        assert found[:4] == [0, 1, 2, 3] and len(found) == 5


def test_other_choices_that_mask_alike_climb_once_unless_they_mend_otherwise() -> None:
    masks = apart(30)
    masks[28] = near(masks[0], by=5)
    masks[29] = near(masks[0], by=6)
    origins = dict.fromkeys((28, 29), "choose")
    errors = [*rising(28), 0.9, 0.9]
    rungs, history = race(masks, errors, origin=origins, choices={28: {"compare": "layer"}})
    assert not {28, 29} & set(slots(to_quick_kl(rungs, history, 0)))
    rungs, history = race(masks, errors, origin=origins, choices={28: {"update": ["admm"]}})
    assert {28, 29} & set(slots(to_quick_kl(rungs, history, 0))) == {28}


def test_the_rung_above_is_climbed_by_the_same_rules() -> None:
    masks = apart(30)
    masks[1] = near(masks[0], by=5)
    rungs, history = race(masks, rising(30), kl=dict(enumerate(rising(30))))
    found = slots(to_measure(rungs, history, 0))
    assert found[:4] == [0, 2, 3, 4] and len(set(found) - {1}) == QUICK
