"""Selection: which units of a model stay, by group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from prunezero.errors import SelectionError
from prunezero.models.anatomy.groups import Group


@dataclass(frozen=True)
class Selection:
    """What is kept of some groups; a group that is not in it is not decided yet."""

    groups: tuple[Group, ...] = ()
    kept: tuple[Tensor, ...] = ()
    """of each group, bool of its shape: True = stays"""

    def __post_init__(self) -> None:
        for group, kept in self:
            _refuse_what_may_not_go(group, kept)

    def __iter__(self) -> Iterator[tuple[Group, Tensor]]:
        return iter(zip(self.groups, self.kept, strict=True))

    def __or__(self, other: Selection) -> Selection:
        """Both; of groups in both, what the other says."""
        both = {group.key: (group, kept) for part in (self, other) for group, kept in part}
        return Selection(*map(tuple, zip(*both.values(), strict=True)))

    def of(self, groups: Sequence[Group]) -> Selection:
        """The part of it that speaks of these groups."""
        keys = {group.key for group in groups}
        parts = [(group, kept) for group, kept in self if group.key in keys]
        return Selection(*map(tuple, zip(*parts, strict=True)))

    def with_rows(self) -> Selection:
        """The part of it whose units are whole rows and columns, which can be taken out."""
        return self.of([group for group in self.groups if group.has_rows])

    def undecided(self, groups: Sequence[Group]) -> list[Group]:
        """Those of the groups that it does not speak of."""
        keys = {group.key for group in self.groups}
        return [group for group in groups if group.key not in keys]

    def matrix_masks(self) -> dict[str, Tensor]:
        """The masks of these matrices, bool [out, in], by name: a weight stays if its units do.

        Directions of the stream have none, since every weight has a part in each of them.
        """
        masks: dict[str, Tensor] = {}
        for group, kept in self:
            for member in () if group.is_turned else group.members:
                name, mask = member.linear.name, member.mask(kept)
                masks[name] = masks[name] & mask if name in masks else mask
        return masks

    def total(self, measure: str = "units") -> float:
        """What all units cost together, those that go among them.

        Raises:
            SelectionError: as `Group.cost_of`.
        """
        return sum(group.cost_of(measure) * group.units for group in self.groups)

    def removed(self, measure: str = "units") -> float:
        """What the units cost together that go.

        Raises:
            SelectionError: as `Group.cost_of`.
        """
        return sum(group.cost_of(measure) * int((~kept).sum()) for group, kept in self)


def _refuse_what_may_not_go(group: Group, kept: Tensor) -> None:
    """Refuse a choice that the model would not survive, or that no kernel takes."""
    if tuple(kept.shape) != group.shape:
        raise SelectionError(
            f"the choice for {group.name} is of shape {tuple(kept.shape)}, but its units are of "
            f"shape {group.shape}"
        )
    count = int(kept.sum())
    if count == group.units:
        return
    if group.is_protected:
        raise SelectionError(f"{group.name} is protected, but {group.units - count} units would go")
    if count < group.fewest or count % group.step:
        raise SelectionError(
            f"{count} units of {group.name} would stay; at least {group.fewest} have to, and a "
            f"multiple of {group.step}"
        )
    counts = kept.reshape(group.strata, -1).sum(1).tolist()
    if len(set(counts)) > 1:
        raise SelectionError(
            f"of the {group.strata} parts of {group.name} {', '.join(map(str, counts))} units "
            "would stay; of each as many have to"
        )
