"""Which experts stay? Parts of exported pages for experts."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from prunezero.report.export.expert_words import COMPARE, MEASURE
from prunezero.report.export.page_parts import RefusalError


@dataclass
class Mixture:
    """A router and the experts that it chooses from."""

    name: str
    block: int
    module: Any
    router: Any
    experts: Any
    # how many experts there are
    units: int
    # in how many equal parts they stand, of each of which as many stay
    strata: int
    # how many stay in any case
    least: int
    # what one expert costs, by measure
    cost: dict[str, float]
    # whether nothing may go
    is_protected: bool


def removed_count(size: float, share: float) -> int:
    """How much of a size a share is, rounded down: 29 of 100 at 0.29, as the decimal says."""
    return math.floor(size * Fraction(str(share)))


def total(mixtures: list[Mixture]) -> float:
    """What all experts of some mixtures cost."""
    return sum(one.cost[MEASURE] * one.units for one in mixtures)


def free(mixture: Mixture) -> int:
    """How many of its experts may go."""
    return 0 if mixture.is_protected else max(0, mixture.units - mixture.least)


def stay(mixture: Mixture, gone: int) -> int:
    """How many experts stay where so many are to go."""
    step = mixture.strata
    return min(mixture.units, -(-(mixture.units - gone) // step) * step)


def shares(mixtures: list[Mixture], sparsity: float) -> dict[str, float]:
    """The share of its experts that each mixture loses by itself, by name."""
    left = [one for one in mixtures if not one.is_protected]
    wanted = sparsity * total(mixtures)
    if total(left) < math.floor(wanted):
        raise RefusalError(f"{sparsity:g} cannot go, since too many blocks are protected")
    if len(left) == len(mixtures) and len({one.cost[MEASURE] for one in mixtures}) == 1:
        return {one.name: sparsity for one in mixtures}
    found = dict.fromkeys((one.name for one in mixtures), 0.0)
    while left:
        largest = max(one.cost[MEASURE] for one in left)
        share = min(1.0, max(0.0, wanted / total(left)))
        for one in [one for one in left if one.cost[MEASURE] == largest]:
            found[one.name] = min(share, free(one) / one.units)
            gone = removed_count(one.units, found[one.name])
            wanted -= largest * (one.units - stay(one, gone))
            left.remove(one)
    return found


def check(mixtures: list[Mixture], sparsity: float) -> None:
    """Refuse to remove more than may go."""
    most = sum(one.cost[MEASURE] * free(one) for one in mixtures)
    is_joint = COMPARE == "model" or len({one.cost[MEASURE] for one in mixtures}) > 1
    if is_joint and most < removed_count(round(total(mixtures)), sparsity):
        raise RefusalError(f"{sparsity:g} cannot go: at most {most / total(mixtures):.4f} can")
    if COMPARE == "group":
        found = shares(mixtures, sparsity)
        for one in mixtures:
            left = one.units - removed_count(one.units, found[one.name])
            if left < one.least and not one.is_protected:
                raise RefusalError(f"{left} experts of {one.name} would be left; remove less")


def choose(mixtures: list[Mixture], scores: list[Tensor], sparsity: float) -> list[Tensor]:
    """Which experts of each mixture stay, bool [experts]; ties lose the lower index first."""
    if COMPARE == "group":
        share = shares(mixtures, sparsity)
        gone = [
            0 if one.is_protected else removed_count(one.units, share[one.name]) for one in mixtures
        ]
    else:
        gone = gone_of_all(mixtures, scores, removed_count(round(total(mixtures)), sparsity))
    kept = []
    for one, values, count in zip(mixtures, scores, gone, strict=True):
        stays = torch.ones(one.units, dtype=torch.bool)
        stays[lowest_first(one, values)[: one.units - stay(one, count)]] = False
        kept.append(stays)
    return kept


def lowest_first(mixture: Mixture, scores: Tensor) -> Tensor:
    """Places of experts in the order in which they go, one of each part; -0.0 equals 0.0."""
    parts = (scores + 0.0).reshape(mixture.strata, -1)
    firsts = torch.arange(mixture.strata)[:, None] * parts.shape[1]
    return (torch.sort(parts, dim=1, stable=True).indices + firsts).T.reshape(-1)


def gone_of_all(mixtures: list[Mixture], scores: list[Tensor], allowed: float) -> list[int]:
    """How many experts of each mixture go where all compete: the lowest that are allowed."""
    turns = []
    for one, values in zip(mixtures, scores, strict=True):
        rising = values[lowest_first(one, values)[: free(one)]]
        turns.append(rising.reshape(-1, one.strata).mean(1))
    owners = torch.cat([torch.full((len(one),), place) for place, one in enumerate(turns)])
    costs = [one.cost[MEASURE] * one.strata for one in mixtures]
    gone = [0] * len(mixtures)
    for owner in owners[torch.sort(torch.cat(turns) + 0.0, stable=True).indices].tolist():
        if costs[owner] <= allowed:
            allowed -= costs[owner]
            gone[owner] += mixtures[owner].strata
        elif allowed < min(costs):
            break
    return gone
