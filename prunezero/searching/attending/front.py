"""Pareto front: which of several points are best where two objectives disagree?

All objectives are lower-is-better. A point dominates another one that it is nowhere worse than, and
better somewhere. Ranks are peeled off: what nobody dominates is rank 0, what only rank 0 dominates
is rank 1. Of one rank, those in sparse places come first.

Source: Deb et al. 2002, NSGA-II, IEEE Transactions on Evolutionary Computation 6(2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = Sequence[float]


def dominates(one: Point, other: Point) -> bool:
    """Whether a point is nowhere worse than another one, and better somewhere."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def pareto_ranks(points: Sequence[Point]) -> list[int]:
    """The rank of each point; 0 is the front. Equal points share a rank."""
    ranks = [-1] * len(points)
    left = set(range(len(points)))
    rank = 0
    while left:
        front = {
            one for one in left if not any(dominates(points[two], points[one]) for two in left)
        }
        for one in front:
            ranks[one] = rank
        left -= front
        rank += 1
    return ranks


def crowding_distances(points: Sequence[Point]) -> list[float]:
    """How far apart the neighbours of each point of one rank are, summed over objectives.

    Each objective is scaled by its range; the outermost points are infinitely far from others.
    """
    found = [0.0] * len(points)
    for axis in range(len(points[0]) if points else 0):
        order = sorted(range(len(points)), key=lambda place: (points[place][axis], place))
        low, high = points[order[0]][axis], points[order[-1]][axis]
        found[order[0]] = found[order[-1]] = math.inf
        if high == low:
            continue
        for before, place, after in zip(order, order[1:], order[2:], strict=False):
            found[place] += (points[after][axis] - points[before][axis]) / (high - low)
    return found


def best_first(points: Sequence[Point]) -> list[int]:
    """Places of the points by rank, sparse places first, and what came first at ties."""
    ranks = pareto_ranks(points)
    distances = [0.0] * len(points)
    for rank in set(ranks):
        members = [place for place, own in enumerate(ranks) if own == rank]
        crowding = crowding_distances([points[place] for place in members])
        for place, distance in zip(members, crowding, strict=True):
            distances[place] = distance
    return sorted(range(len(points)), key=lambda place: (ranks[place], -distances[place], place))


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Places of the points that nobody dominates, in order of the first objective."""
    ranks = pareto_ranks(points)
    return sorted(
        (place for place, rank in enumerate(ranks) if rank == 0),
        key=lambda place: (tuple(points[place]), place),
    )
