"""Group and Member: units that may go, and the parts of weight matrices that go with each.

A unit is whatever leaves a model as one: a single weight, or a neuron with its row of one matrix
and its column of the next. Units of one place form a group. A unit's part of one matrix is a
member; turned so that units are rows, members of all kinds look alike. Other tensors that lose a
slice with each unit are parts.

    down_proj [out, in], one column a neuron    ->  [neurons, out]
    q_proj [out, in], `width` rows a head       ->  [heads, width * in]
    any matrix, where each weight is a unit     ->  [out, in]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from prunezero.errors import SelectionError

if TYPE_CHECKING:
    from prunezero.models.anatomy.experts import MoeLayer
    from prunezero.models.anatomy.linears import Linear
    from prunezero.models.loading.language_model import LanguageModel

# What a matrix does for the units of a group: their rows make them, or their columns read them.
Role = Literal["producer", "consumer"]


@dataclass(frozen=True)
class Member:
    """The part of one weight matrix that goes with the units of a group."""

    linear: Linear
    """its weight is [out, in]"""
    role: Role
    """what the matrix does for the units"""
    units: int
    """how many units have a part in it"""
    start: int = 0
    """its first row or column that belongs to a unit; fused matrices hold several members"""
    width: int = 1
    """neighbouring rows or columns of one unit: 1, or the size of a head"""
    strata: int = 1
    """in so many equal runs they stand, one behind the other"""
    gap: int = 0
    """rows or columns between two runs that belong to no unit, where matrices are interleaved"""
    is_again: bool = False
    """whether a member before it reads the very same inputs"""

    @property
    def run(self) -> int:
        """How many rows or columns stand side by side."""
        return self.units // self.strata * self.width

    @property
    def axis(self) -> int:
        """The axis of the weight along which units lie: 0 where rows make them, else 1."""
        return 0 if self.role == "producer" else 1

    @property
    def rest(self) -> int:
        """How many weights of the matrix belong to one unit."""
        return self.width * self.linear.weight.shape[1 - self.axis]

    def oriented(self, values: Tensor) -> Tensor:
        """Values [out, in] of the matrix, turned so that each unit is a row: [units, rest]."""
        return self._turned(values).reshape(self.units, self.rest)

    def kept_rows(self, kept: Tensor) -> Tensor:
        """Which rows or columns of the matrix stay, bool [rows] or [columns] along `axis`.

        Args:
            kept: bool [units], True = stays.
        """
        stays = torch.ones(self.linear.weight.shape[self.axis], dtype=torch.bool)
        parts = kept.cpu().repeat_interleave(self.width)
        places = torch.arange(len(parts))
        stays[self.start + places + places // self.run * self.gap] = parts
        return stays

    def mask(self, kept: Tensor) -> Tensor:
        """The mask of the matrix, bool [out, in], in which the parts of units stay or go.

        Args:
            kept: bool, True = stays: [units], or [units, rest] for each weight by itself. What
                belongs to no unit stays.
        """
        mask = kept.new_ones(self.linear.weight.shape)
        part = self._turned(mask)
        rows = kept.reshape(self.units, -1).expand(self.units, self.rest)
        part.copy_(rows.reshape(part.shape))
        return mask

    def _turned(self, values: Tensor) -> Tensor:
        """A view of the part of units, [strata, run, rest of a row or column]."""
        turned = values if self.axis == 0 else values.T
        period = self.run + self.gap
        part = turned.narrow(0, self.start, self.strata * period - self.gap)
        return part.unfold(0, self.run, period).transpose(1, 2)


@dataclass(frozen=True)
class Part:
    """A parameter that is no linear map of a block, of which every unit has one slice."""

    name: str
    """of the parameter in the model, such as model.norm.weight"""
    axis: int
    """along which units lie, as the module holds it"""


@dataclass(frozen=True)
class Group:
    """Units of one place in a model, which compete among themselves or with those of others."""

    name: str
    """such as model.layers.3.mlp; for single weights, that of their linear map"""
    block: int
    """index of the decoder block it is in"""
    kind: str
    """what its units are, a word of `unit`"""
    shape: tuple[int, ...]
    """of its scores: (units,), or (out, in) where every weight is a unit"""
    members: tuple[Member, ...]
    """all that goes when one of its units goes"""
    cost: Mapping[str, float] = field(default_factory=dict)
    """what one unit costs, by measure; units themselves cost 1"""
    least: int = 0
    """units that stay in any case: a block without one computes nothing"""
    multiple_of: int = 1
    """the number of units that stay is a multiple of this, for the sake of kernels"""
    is_protected: bool = False
    """whether nothing may go"""
    strata: int = 1
    """equal parts in which neighbouring units stand, and of each of which as many stay"""
    first: int = 0
    """units that went when its slope was measured, those of a first step; 0 where none was"""
    parts: tuple[Part, ...] = ()
    """what goes as well, beside members: of embeddings, norms and the output head"""
    basis: Tensor | None = field(default=None, compare=False)
    """the directions that are its units, as orthonormal columns [width of the stream, units] in
    float64 on the CPU; None where they are not known yet, and where units are no directions"""

    mixture: MoeLayer | None = field(default=None, compare=False)
    """the router and experts that its units are; None where units are no experts"""
    means: Tensor | None = field(default=None, compare=False)
    """what experts that go are answered for by, [experts, hidden]; None where others are chosen in
    their place"""
    skip_below: float | None = field(default=None, compare=False)
    """the threshold by which tokens skip experts that stay; None where they skip none"""

    @property
    def is_turned(self) -> bool:
        """Whether its units are directions of the stream, which no rows or columns are."""
        return self.kind == "direction"

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from all others of a model: one place may hold units of several kinds."""
        return self.kind, self.name

    @property
    def units(self) -> int:
        """How many units it has."""
        return math.prod(self.shape)

    @property
    def step(self) -> int:
        """The number of units that stay is a multiple of this."""
        return math.lcm(self.multiple_of, self.strata)

    @property
    def fewest(self) -> int:
        """How many units stay in any case."""
        return -(-self.least // self.strata) * self.strata

    @property
    def reader(self) -> Member:
        """The part of the one matrix that reads what its units hand on."""
        (member,) = (member for member in self.members if member.role == "consumer")
        return member

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        if self.mixture is not None:
            return self.mixture.router_weight.device
        return self.members[0].linear.weight.device

    @property
    def called(self) -> str:
        """What a unit of it is called in a sentence."""
        return self.kind.replace("_", " ")

    @property
    def has_rows(self) -> bool:
        """Whether a unit is whole rows and columns of its members, which can be taken out."""
        return len(self.shape) == 1

    def cost_of(self, measure: str) -> float:
        """What one unit costs in a measure.

        Raises:
            SelectionError: removing such units saves nothing of that kind.
        """
        costs = {"units": 1.0, **self.cost}
        if measure not in costs:
            raise SelectionError(
                f"removing a {self.kind} of {self.name} saves no {measure}; a budget for it may be "
                f"in {', '.join(costs)}"
            )
        return costs[measure]


def linears_of(groups: Sequence[Group]) -> list[Linear]:
    """The linear maps that the groups' units have a part in, each once."""
    found = (member.linear for group in groups for member in group.members)
    return list({linear.name: linear for linear in found}.values())


def weight_groups(
    linears: Sequence[Linear], language_model: LanguageModel | None = None
) -> list[Group]:
    """Each matrix as a group whose units are its single weights."""
    return [
        Group(
            name=linear.name,
            block=linear.block,
            kind="weight",
            shape=tuple(linear.weight.shape),
            members=(Member(linear, "producer", units=linear.weight.shape[0]),),
            cost={"weights": 1.0},
        )
        for linear in linears
    ]


def unit_cost(members: Sequence[Member], *, cached: int = 0) -> dict[str, float]:
    """What goes for good with one unit of some members, by measure.

    Weights; parameters, which are weights and the biases of rows; for each token FLOPs, two for
    each weight, and bytes of keys and values, where there are any.

    Args:
        cached: how many numbers of keys and values it holds for each token.
    """
    weights = sum(member.rest for member in members)
    made = (member for member in members if member.role == "producer")
    biases = sum(member.width for member in made if member.linear.bias is not None)
    cost = {"weights": weights, "parameters": weights + biases, "flops": 2 * weights}
    if cached:
        cost["kv bytes"] = cached * members[0].linear.weight.element_size()
    return {measure: float(amount) for measure, amount in cost.items()}
