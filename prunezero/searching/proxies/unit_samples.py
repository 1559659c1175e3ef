"""Proxy for units: which of them a recipe takes, and what the outputs of their blocks lose by it.

Units are few, so nothing is sampled: the selection is that of the pruning itself, where all of a
budget is chosen by scores. The error of a group is

    tr D W_R S W_R' D,   S = H_RR          where the columns that stay are left as they are,
                         S = (H^-1)_RR^-1  where they are refitted by least squares,

with W_R the columns that go of the matrix that reads the units, H the Gram matrix of what it reads
(without its mean, where biases take that over) and D the root mean square of the loss gradient at
its outputs. It is summed over groups and divided by what all outputs hold, since K-FAC makes such
losses comparable between places, and who loses how much is what a search over units is about.

Where it was measured how far the model moves when the first step of each group goes (`SLOPE`), that
makes them comparable instead: the error of a group is scaled so that its first step, by M2 and
refitted, costs what was measured, and the sum foretells the distance to the dense model in nats.

A part of the depth has one number, the distance of the model without it to the dense one, and the
error of several is their sum: that they add up is the assumption of every one-shot choice.

Sources: Martens & Grosse 2015, K-FAC, arXiv:1503.05671; Kurtic et al. 2023, ZipLM,
arXiv:2302.04089, for S.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prunezero.errors import FactorizationError
from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.groups import Group
from prunezero.pruning.budget import Budget
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.scoring.second_order import DAMPING, damped_gram
from prunezero.scoring.selection import lowest_first
from prunezero.scoring.statistics import Statistics, sum_of
from prunezero.scoring.tables import Tables
from prunezero.scoring.unit_features import centred
from prunezero.searching.proxies.samples import ROW_WEIGHTS

# What is looked at to say how bad it is that a part of the depth goes.
DISTANCE = "divergence_without_sum"
# Who goes first where the distance without the first units is measured.
_FIRST = Criterion.parse("M2")


@dataclass(frozen=True)
class UnitSamples:
    """All units of a model that a search may take, and what is known of them."""

    groups: tuple[Group, ...]
    blocks: int
    """of the model"""
    statistics: Mapping[str, Statistics]
    """by the name of a linear map; of parts of the depth, by that of a group"""
    tables: Tables = field(default_factory=Tables)
    """of the features and reductions that formulas share"""
    _readings: dict[tuple[str, float, bool], _Reading] = field(default_factory=dict, init=False)
    """by group, damping, and whether inputs are without their mean"""
    _scales: dict[str, float] = field(default_factory=dict, init=False)
    """by group, see `_scale`"""

    def scores(
        self, criteria: Sequence[Criterion], damping: float
    ) -> Iterator[Sequence[Tensor] | None]:
        """Nothing: formulas of units are scored one by one."""
        return iter([None] * len(criteria))

    def masks_under(
        self,
        recipe: Recipe,
        budgets: Iterable[Budget],
        scores: Sequence[Tensor] | None = None,
    ) -> Iterator[list[Tensor]]:
        """The units that stay under each budget, bool of each group's shape.

        How the budget is spread by measured losses is not seen: groups that do not compete lose
        equal shares here.

        Raises:
            ScoreError, StatisticsError: as the scores of the recipe's unit.
        """
        kind, options = recipe.unit.row, recipe.unit.options
        groups = kind.limited(self.groups, options, self.blocks)
        known = {
            group.name: kind.scores(
                group,
                recipe.criterion,
                self.statistics,
                damping=recipe.damping,
                options=options,
                tables=self.tables,
            )
            for group in groups
        }
        for budget in budgets:
            asked = replace(budget, measure=recipe.unit.measure)
            chosen = kind.select(
                groups, lambda group: known[group.name], asked, compare=recipe.compare
            )
            yield list(chosen.kept)

    def error(self, recipe: Recipe, masks: Sequence[Tensor]) -> float:
        """The share of the blocks' outputs that is lost, gradient-weighted.

        Raises:
            FactorizationError: a Gram matrix cannot be inverted.
        """
        if recipe.unit.row.is_of_depth:
            return self._distance(masks)
        lost = whole = 0.0
        is_measured = all(group.first for group in self.groups)
        for group, kept in zip(self.groups, masks, strict=True):
            reading = self._reading(group, recipe.damping, "bias" in recipe.updates)
            whole += reading.whole
            if not bool(kept.all()):
                gone = (~kept).repeat_interleave(group.reader.width)
                part = reading.lost(gone, is_refitted="refit" in recipe.updates)
                lost += part * self._scale(group) if is_measured else part
        return lost if is_measured else lost / max(whole, 1e-30)

    def _scale(self, group: Group) -> float:
        """Nats per token for what the outputs lose, by the first step of a group."""
        if group.name not in self._scales:
            known, kind = self.statistics, UNITS[group.kind]
            scores = kind.scores(group, _FIRST, known, damping=DAMPING, options=kind.options())
            gone = torch.zeros(group.units, dtype=torch.bool)
            gone[lowest_first(scores, group.strata)[: group.first]] = True
            columns = gone.repeat_interleave(group.reader.width)
            lost = self._reading(group, DAMPING, False).lost(columns, is_refitted=True)
            self._scales[group.name] = group.cost["slope"] * group.first / max(lost, 1e-30)
        return self._scales[group.name]

    def _reading(self, group: Group, damping: float, is_centred: bool) -> _Reading:
        key = group.name, damping, is_centred
        if key not in self._readings:
            known = self.statistics[group.reader.linear.name]
            self._readings[key] = _Reading.of(group, known, damping, is_centred)
        return self._readings[key]

    def _distance(self, masks: Sequence[Tensor]) -> float:
        sizes = [float(sum_of(self.statistics[group.name], DISTANCE)) for group in self.groups]
        gone = [int((~kept).sum()) for kept in masks]
        lost = sum(size * count for size, count in zip(sizes, gone, strict=True))
        return max(lost, 0.0) / max(sum(map(abs, sizes)), 1e-30)


@dataclass(frozen=True)
class _Reading:
    """What one matrix makes of units that it reads."""

    columns: Tensor
    """float64 [in, out], weighted by outputs"""
    gram: Tensor
    """float64 [in, in], damped as the refit has it"""
    inverse: Tensor
    """of it, float64 [in, in]"""
    ridge: float
    """what was added to the diagonal"""
    whole: float
    """energy of all outputs"""

    @classmethod
    def of(cls, group: Group, known: Statistics, damping: float, is_centred: bool) -> _Reading:
        """What the reader of a group makes of it.

        Raises:
            FactorizationError: its Gram matrix cannot be inverted.
        """
        linear, count = group.reader.linear, group.units * group.reader.width
        gram = sum_of(known, "gram").double() / known.tokens
        if is_centred:
            total = sum_of(known, "input_sum")
            gram = centred(sum_of(known, "gram"), total, known.tokens) / known.tokens
        weight = linear.weight.detach().double()
        if ROW_WEIGHTS in known.sums:
            weight = weight * (known.sums[ROW_WEIGHTS].double() / known.tokens).sqrt()[:, None]
        matrix = damped_gram(gram, damping)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed) != 0:
            raise FactorizationError(f"the Gram matrix of {group.name} is not positive definite")
        ridge = float((matrix.diagonal() - gram.diagonal()).mean())
        whole = float((weight * (weight @ gram)).sum())
        return cls(weight.T[:count], matrix, torch.cholesky_inverse(factor), ridge, whole)

    def lost(self, gone: Tensor, *, is_refitted: bool) -> float:
        """Energy of the outputs that columns made which go, bool [in]."""
        columns = self.columns[gone]
        if not is_refitted:
            inside = self.gram[gone][:, gone]
            energy = (columns * (inside @ columns)).sum()
            return float(energy - self.ridge * columns.square().sum())
        factor = torch.linalg.cholesky(self.inverse[gone][:, gone])
        return float(torch.linalg.solve_triangular(factor, columns, upper=False).square().sum())
