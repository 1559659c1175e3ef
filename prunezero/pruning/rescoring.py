"""Units that go one after another, while the columns that stay are refitted and scored anew.

What the removal of one unit costs, once the others are refitted (Lr0, and Lrb where a bias is
refitted too), says little of what the removal of several costs where their channels are correlated.
So the unit of the lowest score goes, the inverse Gram matrix is downdated, and the others are
scored by what they then hold. Where units stand in strata, one of each goes at a time.

Source: Kurtic et al. 2023, ZipLM, arXiv:2302.04089, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunezero.errors import ScoreError
from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.groups import Group
from prunezero.scoring.score import score_units
from prunezero.scoring.selection import lowest_first
from prunezero.scoring.statistics import Statistics
from prunezero.scoring.torch_text import feature_function
from prunezero.scoring.unit_features import Reader, diagonal_blocks, full_inverse, unit_feature

# Features that are taken anew, and the inverse that they look at.
RESCORED = {"Lr0": "inverse", "Lrb": "centred_inverse"}
# Groups with fewer units lose them one by one.
_FEW = 64


@dataclass
class _State:
    """What is left of a matrix while units go."""

    places: Tensor
    """int64, the units that are left"""
    inverse: Tensor
    """[in, in] float64, of their channels alone"""
    columns: Tensor
    """[in, out] float64, of their channels, refitted"""
    width: int
    """channels of a unit"""

    def losses(self, name: str) -> Tensor:
        """What the outputs lose with each unit, float32 [units, 1].

        Args:
            name: a key of `RESCORED`, whose torch text says it.
        """
        units = len(self.places)
        inverse = diagonal_blocks(self.inverse, units, self.width)
        columns = self.columns.reshape(units, self.width, -1)
        return feature_function(name)(**{"reader": columns, RESCORED[name]: inverse})

    def remove(self, gone: Tensor) -> None:
        """Take units out, bool [units], and refit the columns that stay."""
        channels = gone.repeat_interleave(self.width)
        stays = ~channels
        across = self.inverse[stays][:, channels]
        share = torch.linalg.solve(self.inverse[channels][:, channels], across.T).T
        self.columns = self.columns[stays] - share @ self.columns[channels]
        self.inverse = self.inverse[stays][:, stays] - share @ across.T
        self.places = self.places[~gone]


def rescored(
    group: Group,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    *,
    damping: float,
    at_once: int,
) -> Tensor:
    """Scores [units] whose order is the one in which units go; each is the score it went by.

    A score that is not above that of a unit of its stratum that went before counts as the next
    number above it. The last of each stratum, which stay as long as any do, have the next numbers.

    Args:
        at_once: units that go before the others are scored anew.

    Raises:
        ScoreError: the formula does not look at one of `RESCORED`, or at both, or ranks nothing.
        StatisticsError: as `unit_feature`.
    """
    name = _rescored_feature(criterion)
    reader = reader_of(group, statistics)
    others = {
        other: unit_feature(other, reader, damping=damping)
        for other in criterion.features
        if other != name
    }
    columns = reader.weight.double()[:, : reader.units * reader.width].T
    inverse = full_inverse(reader, damping, is_centred=RESCORED[name] == "centred_inverse")
    device = columns.device
    state = _State(torch.arange(group.units, device=device), inverse, columns, reader.width)
    scores = torch.empty(group.units, dtype=torch.float32, device=device)
    count, strata = (at_once if group.units >= _FEW else 1), group.strata
    highest = [-math.inf] * strata
    while len(state.places):
        features = {other: value[state.places] for other, value in others.items()}
        features[name] = state.losses(name)
        shape = state.columns.reshape(len(state.places), -1)
        values = (
            score_units(criterion, shape, features, group=group.name, kind=group.called)
            if len(state.places) > strata
            else torch.full((strata,), -torch.inf, device=device)
        )
        turn = max(strata, min(count // strata * strata, len(values) - strata))
        lowest = lowest_first(values, strata)[:turn]
        for place, value in zip(
            state.places[lowest].tolist(), values[lowest].tolist(), strict=True
        ):
            stratum = place // (group.units // strata)
            highest[stratum] = scores[place] = _above(highest[stratum], value)
        gone = torch.zeros(len(values), dtype=torch.bool, device=device)
        gone[lowest] = True
        state.remove(gone)
    # Of a group that is one stratum's last, nothing was scored.
    return scores.nan_to_num(neginf=0.0)


def _rescored_feature(criterion: Criterion) -> str:
    found = [name for name in criterion.features if name in RESCORED]
    if len(found) != 1:
        raise ScoreError(
            f"criterion {criterion.text}: rescore scores units anew by what refitted columns lose, "
            f"so the formula has to hold one of {' and '.join(RESCORED)}"
        )
    return found[0]


def _above(highest: float, value: float) -> float:
    """The value, or the next number of float32 above the highest before it."""
    if not math.isfinite(highest):
        return value
    return max(value, float(np.nextafter(np.float32(highest), np.float32(np.inf))))


def reader_of(group: Group, statistics: Mapping[str, Statistics]) -> Reader:
    """What reads the units of a group, and what it saw."""
    member = group.reader
    return Reader(
        member.linear.weight,
        statistics.get(member.linear.name),
        member.units,
        member.width,
        group.cost,
        group.name,
    )
