"""How much each unit of a group matters: one function for each domain of formulas."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.groups import Group, Member
from prunezero.pruning.recipes.word_options import Depth, Neurons, Options
from prunezero.scoring.score import score, score_depth, score_units
from prunezero.scoring.statistics import Statistics

# How the scores [members, units] of several matrices become one [units].
COMBINE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda scores: scores.sum(0),
    "mean": lambda scores: scores.mean(0),
    "max": lambda scores: scores.amax(0),
}


def weight_scores(
    group: Group,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    *,
    damping: float,
    options: Options | None = None,
) -> Tensor:
    """The scores [out, in] of single weights: their group is one matrix.

    Raises:
        ScoreError, StatisticsError: as `score`.
    """
    linear = group.members[0].linear
    known = statistics.get(linear.name)
    return score(criterion, linear.weight, known, damping=damping, layer=linear.name)


def row_scores(
    group: Group,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    *,
    damping: float,
    options: Neurons,
) -> Tensor:
    """The scores [units] of units that are rows and columns of several matrices.

    Each matrix that is asked about is scored by itself, turned so that units are rows; what a unit
    hands on is what its consumer saw. The scores of several are combined as the options say.

    Raises:
        ScoreError, StatisticsError: as `score_units`.
    """
    (reader,) = (member for member in group.members if member.role == "consumer")
    scores = [
        score_units(
            criterion,
            member.oriented(member.linear.weight),
            statistics.get(reader.linear.name),
            damping=damping,
            group=group.name,
            kind=group.kind,
        )
        for member in group.members
        if _is_asked(member, options.members)
    ]
    # One by itself keeps all its bits.
    return scores[0] if len(scores) == 1 else COMBINE[options.combine](torch.stack(scores))


def depth_scores(
    group: Group,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    *,
    damping: float,
    options: Depth,
) -> Tensor:
    """The score [1] of one part of the depth.

    Raises:
        ScoreError, StatisticsError: as `score_depth`.
    """
    given = {
        "parameters": group.cost["parameters"],
        "flops": group.cost["flops"],
        "noise": _noise(group.name, options.seed),
    }
    known = statistics.get(group.name)
    return score_depth(criterion, known, given, group=group.name, kind=group.kind)


def _noise(name: str, seed: int) -> float:
    """A number from 0 to 1 that looks random, and is the same on every machine."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _is_asked(member: Member, word: str) -> bool:
    return word == "all" or word == {"consumer": "consumer", "producer": "producers"}[member.role]
