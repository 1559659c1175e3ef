"""Which units stay, and what becomes of the columns that do? Parts of exported pages for units.

Tests of the constants of `unit_words.py` are settled in a page.
"""

import math
from typing import Any

import torch
from torch import Tensor

from prunezero.report.export.page_parts import RefusalError, matrix
from prunezero.report.export.unit_parts import Group, centred, removed_count
from prunezero.report.export.unit_words import (
    COMPARE,
    LEAST,
    MEASURE,
    MULTIPLE_OF,
    PROTECT_FIRST,
    PROTECT_LAST,
    REFIT_DAMPING,
    UNIT,
    UPDATE,
)


def total(groups: list[Group]) -> float:
    """What all units of some groups cost."""
    return sum(group.cost[MEASURE] * group.units for group in groups)


def free(group: Group) -> int:
    """How many of its units may go."""
    if PROTECT_FIRST or PROTECT_LAST:
        if group.is_protected:
            return 0
    if UNIT == "head":
        return max(0, group.units - -(-LEAST // group.runs) * group.runs)
    else:
        return max(0, group.units - LEAST)


def stay(group: Group, gone: int) -> int:
    """How many units stay where so many are to go."""
    if UNIT == "head" or MULTIPLE_OF > 1:
        multiple = MULTIPLE_OF // math.gcd(MULTIPLE_OF, group.parts[-1].width)
        step = math.lcm(multiple, group.runs)
        return min(group.units, -(-(group.units - gone) // step) * step)
    else:
        return group.units - gone


def shares(groups: list[Group], sparsity: float) -> dict[str, float]:
    """The share of its units that each group loses by itself, by name.

    Where units of some groups are so large that rounding down leaves much, smaller ones take over.
    """
    if PROTECT_FIRST or PROTECT_LAST:
        left = [group for group in groups if not group.is_protected]
    else:
        left = list(groups)
    wanted = sparsity * total(groups)
    if total(left) < math.floor(wanted):
        raise RefusalError(f"{sparsity:g} cannot go, since too many blocks are protected")
    if len(left) == len(groups) and len({group.cost[MEASURE] for group in groups}) == 1:
        return {group.name: sparsity for group in groups}
    found = dict.fromkeys((group.name for group in groups), 0.0)
    while left:
        largest = max(group.cost[MEASURE] for group in left)
        share = min(1.0, max(0.0, wanted / total(left)))
        for group in [group for group in left if group.cost[MEASURE] == largest]:
            found[group.name] = min(share, free(group) / group.units)
            gone = removed_count(group.units, found[group.name])
            wanted -= largest * (group.units - stay(group, gone))
            left.remove(group)
    return found


def check(groups: list[Group], sparsity: float) -> None:
    """Refuse to remove more than may go."""
    if MEASURE not in groups[0].cost or not total(groups):
        raise RefusalError(f"removing such units saves no {MEASURE}")
    allowed = removed_count(round(total(groups)), sparsity)
    most = sum(group.cost[MEASURE] * free(group) for group in groups)
    if COMPARE == "model":
        is_joint = True
    else:
        is_joint = len({group.cost[MEASURE] for group in groups}) > 1
    if is_joint and most < allowed:
        raise RefusalError(f"{sparsity:g} cannot go: at most {most / total(groups):.4f} can")
    if COMPARE == "group":
        found = shares(groups, sparsity)
        for group in groups:
            if PROTECT_FIRST or PROTECT_LAST:
                if group.is_protected:
                    continue
            left = group.units - removed_count(group.units, found[group.name])
            if left < LEAST:
                raise RefusalError(f"{left} units of {group.name} would be left; remove less")


def choose(groups: list[Group], scores: list[Tensor], sparsity: float) -> list[Tensor]:
    """Which units of each group stay, bool [units]; ties lose the lower index first."""
    if COMPARE == "group":
        share = shares(groups, sparsity)
        gone = [removed_count(group.units, share[group.name]) for group in groups]
    else:
        gone = gone_of_all(groups, scores, removed_count(round(total(groups)), sparsity))
    kept = []
    for group, values, count in zip(groups, scores, gone, strict=True):
        stays = torch.ones(group.units, dtype=torch.bool)
        stays[lowest_first(group, values)[: group.units - stay(group, count)]] = False
        kept.append(stays.to(group.parts[-1].module.weight.device))
    return kept


def lowest_first(group: Group, scores: Tensor) -> Tensor:
    """Places of units in the order in which they go; -0.0 equals 0.0."""
    if UNIT == "head":
        # One of each key-value head goes before any of them loses more.
        parts = (scores + 0.0).reshape(group.runs, -1)
        firsts = torch.arange(group.runs)[:, None] * parts.shape[1]
        return (torch.sort(parts, dim=1, stable=True).indices + firsts).T.reshape(-1)
    else:
        return torch.sort(scores + 0.0, stable=True).indices


def gone_of_all(groups: list[Group], scores: list[Tensor], allowed: float) -> list[int]:
    """How many units of each group go where all compete: the lowest whose cost is still allowed.

    What no longer fits is passed over, so a large unit does not keep small ones from going.
    """
    turns = []
    for group, values in zip(groups, scores, strict=True):
        rising = values[lowest_first(group, values)[: free(group)]]
        if UNIT == "head":
            rising = rising.reshape(-1, group.runs).mean(1)
        turns.append(rising)
    owners = torch.cat([torch.full((len(one),), place) for place, one in enumerate(turns)])
    costs = [group.cost[MEASURE] * group.runs for group in groups]
    gone = [0] * len(groups)
    for owner in owners[torch.sort(torch.cat(turns) + 0.0, stable=True).indices].tolist():
        if costs[owner] <= allowed:
            allowed -= costs[owner]
            gone[owner] += groups[owner].runs
        elif allowed < min(costs):
            break
    return gone


def mend(group: Group, stays: Tensor, stats: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What becomes of the reader of a group: its weight [out, in], and what its bias takes over."""
    reader = group.parts[-1]
    seen, weight = stats[reader.name], matrix(reader.module)
    kept = stays.repeat_interleave(reader.width)
    after = weight.masked_fill(~kept, 0.0)
    if "refit" in UPDATE:
        if "bias" in UPDATE:
            gram = centred(seen)
        else:
            gram = seen["gram"]
        if not kept.all():
            after = refit(weight, kept, gram, reader.name)
    if not torch.isfinite(after).all():
        raise RefusalError(f"the weight of {reader.name} holds NaN or infinite numbers")
    if "bias" in UPDATE:
        mean = (seen["input_sum"] / seen["tokens"]).float()
        return after, (weight.float() - after.float()) @ mean
    else:
        return after, None


def refit(weight: Tensor, kept: Tensor, gram: Tensor, name: str) -> Tensor:
    """The weight [out, in] whose columns that stay give the least squared change of outputs."""
    damped = gram.to(torch.float64, copy=True)
    diagonal = damped.diagonal().clone()
    dead = diagonal == 0
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    damped.diagonal().copy_(diagonal + REFIT_DAMPING * diagonal.mean())
    factor, failed = torch.linalg.cholesky_ex(damped[kept][:, kept])
    if failed:
        raise RefusalError(f"the Gram matrix of {name} is not positive definite")
    found = torch.zeros_like(weight)
    solved = torch.cholesky_solve(damped[kept] @ weight.double().T, factor)
    found[:, kept] = solved.T.to(weight.dtype)
    return found


def put(module: Any, weight: Tensor, change: Tensor | None) -> None:
    """Give a matrix its mended numbers, in place."""
    matrix(module).copy_(weight)
    if change is not None:
        module.bias.copy_(module.bias + change)
