"""Who is drawn to have children: the best, and of equal ranks those whose size is rare."""

from __future__ import annotations

import random
from collections import Counter

from prunezero.formula import Criterion
from prunezero.searching.candidate import Candidate
from prunezero.searching.memory import Memory
from prunezero.searching.proposing.population import Breeders
from prunezero.searching.space import SearchSpace

TOURNAMENT = 5
DRAWS = 4000
LONG = "abs(W)*X + {number}*R1*C1 + abs(W)*R1"
SHORT = "abs(W)*sqrt(X)"


def breeders(texts: list[str]) -> Breeders:
    pool = [
        Candidate(slot, 0, Criterion.parse(text), "random", (), "new", mask=str(slot))
        for slot, text in enumerate(texts)
    ]
    return Breeders((pool,), pool, [], TOURNAMENT)


def ranks_drawn(pool: Breeders) -> list[int]:
    rng = random.Random(1)
    return [pool.parent(0, rng).slot for _ in range(DRAWS)]


def plain_ranks(count: int) -> list[int]:
    """The winners of tournaments that look at nothing but the rank."""
    rng = random.Random(1)
    return [min(rng.randrange(count) for _ in range(TOURNAMENT)) for _ in range(DRAWS)]


def test_a_lone_short_formula_of_middling_rank_has_clearly_more_children() -> None:
    texts = [LONG.format(number=number) for number in range(2, 42)]
    texts[20] = SHORT
    drawn, plain = Counter(ranks_drawn(breeders(texts))), Counter(plain_ranks(40))
    assert drawn[20] > 4 * plain[20] > 0
    # and the best are still the most wanted
    assert drawn[0] > drawn[20] and drawn[0] > 0.75 * plain[0]


def test_where_all_are_of_one_size_nothing_changes_at_all() -> None:
    pool = breeders([LONG.format(number=number) for number in range(2, 42)])
    sizes = {one.criterion.complexity for one in pool.everyone}
    assert len(sizes) == 1
    assert ranks_drawn(pool) == plain_ranks(40)


def test_sizes_are_counted_in_the_pool_of_the_tournament() -> None:
    """On text, long ones are rare; by layer error they are the crowd."""
    texts = [LONG.format(number=number) for number in range(2, 32)] + [SHORT] * 2
    crowd = breeders(texts).everyone
    glanced = [*crowd[30:], *crowd[:1]]
    both = Breeders((crowd,), crowd, glanced, TOURNAMENT)
    rng = random.Random(0)
    drawn = Counter(both.parent(0, rng, glanced=1.0).slot for _ in range(DRAWS))
    alone = Counter(ranks_drawn(Breeders((glanced,), glanced, [], TOURNAMENT)))
    assert set(drawn) == {30, 31, 0}
    assert abs(drawn[0] - alone[0]) < 0.05 * DRAWS


def test_breeders_of_an_empty_memory_are_nobody() -> None:
    pool = Breeders.among(Memory(), SearchSpace.load("tiny"))
    assert pool.everyone == [] and pool.glanced == []
