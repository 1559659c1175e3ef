"""Who has children: the best, the young, one of every kind, and on every island its own."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from typing import Any

import pytest

from prunezero.formula import Criterion
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.task import Task
from prunezero.searching.history import History
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.strategies.evolution import Proposal, evolve
from prunezero.searching.strategies.parents import ParentPool
from tests.searching.testbed import tiny_space

TOURNAMENT = 5
DRAWS = 4000
LONG = "abs(W)*X + {number}*R1*C1 + abs(W)*R1"
SHORT = "abs(W)*sqrt(X)"


def parent_pool(texts: list[str]) -> ParentPool:
    pool = [
        Candidate(slot, 0, Criterion.parse(text), "random", (), "new", mask=str(slot))
        for slot, text in enumerate(texts)
    ]
    return ParentPool((pool,), pool, [], TOURNAMENT)


def ranks_drawn(pool: ParentPool) -> list[int]:
    rng = random.Random(1)
    return [pool.parent(0, rng).slot for _ in range(DRAWS)]


def plain_ranks(count: int) -> list[int]:
    """The winners of tournaments that look at nothing but the rank."""
    rng = random.Random(1)
    return [min(rng.randrange(count) for _ in range(TOURNAMENT)) for _ in range(DRAWS)]


def test_a_lone_short_formula_of_middling_rank_has_clearly_more_children() -> None:
    texts = [LONG.format(number=number) for number in range(2, 42)]
    texts[20] = SHORT
    drawn, plain = Counter(ranks_drawn(parent_pool(texts))), Counter(plain_ranks(40))
    assert drawn[20] > 4 * plain[20] > 0
    # and the best are still the most wanted
    assert drawn[0] > drawn[20] and drawn[0] > 0.75 * plain[0]


def test_where_all_are_of_one_size_nothing_changes_at_all() -> None:
    pool = parent_pool([LONG.format(number=number) for number in range(2, 42)])
    sizes = {one.criterion.complexity for one in pool.everyone}
    assert len(sizes) == 1
    assert ranks_drawn(pool) == plain_ranks(40)


def test_sizes_are_counted_in_the_pool_of_the_tournament() -> None:
    """On text, long ones are rare; by layer error they are the crowd."""
    texts = [LONG.format(number=number) for number in range(2, 32)] + [SHORT] * 2
    crowd = parent_pool(texts).everyone
    quick_kl = [*crowd[30:], *crowd[:1]]
    both = ParentPool((crowd,), crowd, quick_kl, TOURNAMENT)
    rng = random.Random(0)
    drawn = Counter(both.parent(0, rng, quick_kl=1.0).slot for _ in range(DRAWS))
    alone = Counter(ranks_drawn(ParentPool((quick_kl,), quick_kl, [], TOURNAMENT)))
    assert set(drawn) == {30, 31, 0}
    assert abs(drawn[0] - alone[0]) < 0.05 * DRAWS


def test_breeders_of_an_empty_memory_are_nobody() -> None:
    pool = ParentPool.among(History(), SearchSpace.load("tiny"), 0)
    assert pool.everyone == [] and pool.quick_kl == []


# Of one size, one signal and one behaviour, and no two of one skeleton.
ALIKE = [f"abs(W)*X*{word}({name})" for word in ("exp", "tanh") for name in ("R1", "C1", "R2")]


def remembered(history: History, text: str, generation: int, error: float, **fields: Any) -> int:
    """Take in one more candidate with a mask of its own; its slot."""
    slot = history.slot
    fields |= {"mask": str(slot), "layer_error": error}
    history.keep(Candidate(slot, generation, Criterion.parse(text), "random", (), "new", **fields))
    history.slot += 1
    return slot


def breeding_slots(history: History, generation: int, **space: Any) -> set[int]:
    pool = ParentPool.among(history, tiny_space(**{"islands": 1, **space}), generation)
    return {one.slot for one in pool.everyone}


def old_best_and_young(born: int) -> History:
    """The best three from the beginning, three that are worse from a later generation."""
    history = History()
    for place, text in enumerate(ALIKE):
        remembered(history, text, 0 if place < 3 else born, 0.1 + 0.1 * place)
    return history


def test_the_old_retire_and_younger_ones_take_their_places() -> None:
    history = old_best_and_young(100)
    # the best of all stays, as the best of its kind
    assert breeding_slots(history, 101, population=3) == {0, 3, 4, 5}
    assert breeding_slots(history, 101, population=2) == {0, 3, 4}


def test_age_is_counted_to_the_generation_that_is_bred() -> None:
    """Though nobody younger was found since."""
    history = old_best_and_young(1)
    assert breeding_slots(history, 20, population=3) == {0, 1, 2}
    assert breeding_slots(history, 21, population=3) == {0, 3, 4, 5}
    assert breeding_slots(history, 22, population=3) == {0}


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (LONG.format(number=2), {}),
        ("abs(W)*G*exp(R1)", {}),
        (ALIKE[3], {"behaviour": 2}),
    ],
    ids=["size", "signal", "behaviour"],
)
def test_the_best_of_every_kind_breeds_however_bad_and_old_it_is(
    text: str, fields: dict[str, int]
) -> None:
    history = History()
    worst = remembered(history, text, 0, 0.9, **fields)
    for place, alike in enumerate(ALIKE[:3]):
        remembered(history, alike, 99, 0.1 + 0.1 * place)
    assert breeding_slots(history, 100, population=2) == {worst, 1, 2}
    # and another one like it does not, nor does one more of the crowd
    remembered(history, text.replace("R1", "C1"), 0, 0.95, **fields)
    assert breeding_slots(history, 100, population=2) == {worst, 1, 2}


def children(count: int = 400, **space: Any) -> list[tuple[int, Proposal]]:
    """Slots and children of one generation, whose parents are of one kind and on two islands."""
    history = History()
    for place, text in enumerate(ALIKE):
        remembered(history, text, 0, 0.1 + 0.1 * place)
    fields = {"fresh": 0, "chosen": 0, "crossover": 0.5, "tournament": 1, **space}
    task = Task(tiny_space(**fields), 0.5, "free", 0, ())
    found = []
    for proposal in islice(evolve(task, history, 1), count):
        if proposal is not None:
            found.append((history.slot, proposal))
        history.slot += 1
    return found


# The best of the one kind there is lives on all islands.
EVERYWHERE = 0


def test_a_child_has_its_mother_from_its_own_island() -> None:
    mothers = {0: Counter[int](), 1: Counter[int]()}
    for slot, child in children():
        mothers[slot % 2][child.parents[0]] += 1
    assert set(mothers[0]) == {0, 2, 4} and set(mothers[1]) == {1, 3, 5, EVERYWHERE}
    together = {child.parents[0] for slot, child in children(islands=1) if slot % 2}
    assert together == {0, 1, 2, 3, 4, 5}


def test_some_fathers_come_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign() -> tuple[int, int]:
        """Fathers from another island, and all."""
        crossed = [(slot, one.parents[1]) for slot, one in children() if one.origin == "cross"]
        away = [
            slot for slot, father in crossed if father not in (EVERYWHERE, *range(slot % 2, 6, 2))
        ]
        return len(away), len(crossed)

    away, crossed = foreign()
    # a tenth are drawn from everywhere, of whom about half are from elsewhere
    assert crossed > 150 and 0 < away < 0.12 * crossed
    monkeypatch.setattr("prunezero.searching.strategies.evolution._MIGRATION", 0.0)
    assert foreign()[0] == 0
