"""What is best by two objectives: ranks, sparse places and the front, against brute force."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from prunezero.searching.attending.front import (
    best_first,
    crowding_distances,
    dominates,
    pareto_front,
    pareto_ranks,
)


def points_of(seed: int, count: int = 40) -> list[tuple[float, float]]:
    """Points on a coarse grid, so that many are equal in one objective or in both."""
    rng = random.Random(seed)
    return [(rng.randrange(8) / 4, rng.randrange(8) / 4) for _ in range(count)]


def longest_chain(points: list[tuple[float, float]], place: int) -> int:
    """How many points can stand above one, each dominating the next: its rank by definition."""
    array = np.array(points)
    above = [
        other
        for other in range(len(points))
        if (array[other] <= array[place]).all() and (array[other] < array[place]).any()
    ]
    return 1 + max((longest_chain(points, other) for other in above), default=-1)


@pytest.mark.parametrize("seed", range(5))
def test_a_rank_is_the_longest_chain_of_points_that_dominate(seed: int) -> None:
    points = points_of(seed, 18)
    assert pareto_ranks(points) == [longest_chain(points, place) for place in range(len(points))]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nobody_dominates(seed: int) -> None:
    points = points_of(seed)
    front = pareto_front(points)
    for place, point in enumerate(points):
        beaten = any(
            other[0] <= point[0] and other[1] <= point[1] and other != point for other in points
        )
        assert (place in front) == (not beaten)
    assert [points[place] for place in front] == sorted(points[place] for place in front)


def test_equal_points_dominate_each_other_never() -> None:
    assert not dominates((1.0, 2.0), (1.0, 2.0))
    assert dominates((1.0, 1.5), (1.0, 2.0)) and not dominates((0.5, 2.5), (1.0, 2.0))
    assert pareto_ranks([(1.0, 2.0), (1.0, 2.0)]) == [0, 0]


def test_a_crowded_point_is_near_its_neighbours_and_an_outer_one_far_from_all() -> None:
    # Ranges are 4 and 8: neighbours of the second are (3 - 0)/4 and (8 - 3)/8 apart.
    points = [(0.0, 8.0), (1.0, 5.0), (3.0, 3.0), (4.0, 0.0)]
    assert crowding_distances(points) == [math.inf, 3 / 4 + 5 / 8, 3 / 4 + 5 / 8, math.inf]
    assert crowding_distances([(1.0, 1.0)]) == [math.inf]
    assert crowding_distances([]) == []


def test_of_one_rank_the_crowded_come_last() -> None:
    points = [(2.0, 2.0), (2.1, 1.9), (0.0, 4.0), (4.0, 0.0), (5.0, 5.0), (1.0, 2.5)]
    order = best_first(points)
    assert set(order[:2]) == {2, 3} and order[-1] == 4
    # Neighbours of (2, 2) are nearest together.
    assert order[-2] == 0
