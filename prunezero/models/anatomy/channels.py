"""Channels that a block makes and reads itself: what neurons and heads have in common.

Which of them may be moved, and so may leave, shows on a copy of the block with random weights
(`prunezero/models/editing/permuting.py`); a model is probed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from prunezero.errors import ModelError
from prunezero.models.anatomy.groups import Group, Member
from prunezero.models.anatomy.linears import Linear, by_block, find_linears
from prunezero.models.editing.permuting import PermutableChannels, find_all_permutables
from prunezero.models.loading.language_model import LanguageModel

# Under this name a model keeps what a probe found of its blocks, whatever its weights become.
_FOUND = "_prunezero_channels"


def inside_blocks(
    linears: Sequence[Linear], language_model: LanguageModel
) -> Iterator[list[Linear]]:
    """All linear maps of each block that some of the given ones are in, in the order of those."""
    blocks = by_block(find_linears(language_model.model))
    for block in by_block(linears):
        yield blocks[block]


def permutables_of(
    language_model: LanguageModel, inside: Sequence[Linear]
) -> list[PermutableChannels]:
    """The permutable channels of a block, see `find_permutables`; a model is probed once.

    Args:
        inside: all linear maps of the block.
    """
    known = vars(language_model.model).setdefault(_FOUND, {})
    block, shapes = inside[0].block, shapes_of(inside)
    if known.get(block, (None,))[0] != shapes:
        blocks = by_block(find_linears(language_model.model))
        for index, found in find_all_permutables(language_model, blocks).items():
            known[index] = shapes_of(blocks[index]), found
    permutables: list[PermutableChannels] = known[block][1]
    return permutables


def shapes_of(inside: Sequence[Linear]) -> list[tuple[str, torch.Size]]:
    """Names and shapes of linear maps, which what a probe finds of them follows from."""
    return [(linear.name, linear.weight.shape) for linear in inside]


def names_of(parts: Sequence[Sequence[Member]]) -> list[str]:
    """What the members of each group of a block are called together.

    That is the path that their matrices share; the consumer's where that tells too little. The
    consumer is the last of the members.
    """
    shared = []
    for members in parts:
        words = zip(*(member.linear.name.split(".") for member in members), strict=False)
        same = [word for word, *others in words if {word} == {word, *others}]
        is_block = bool(same) and same[-1].isdigit()
        shared.append(members[-1].linear.name if is_block else ".".join(same))
    counts = Counter(shared)
    return [
        name if counts[name] == 1 else members[-1].linear.name
        for name, members in zip(shared, parts, strict=True)
    ]


def is_among(group: Group, wanted: set[str], *, how: str = "") -> bool:
    """Whether a group is to be pruned: all its matrices are, or none.

    Args:
        wanted: names of the linear maps that are to be pruned.
        how: its matrices hang together, in a sentence; else each unit takes a part of all along.

    Raises:
        ModelError: some are and others are not.
    """
    names = {member.linear.name for member in group.members}
    left = sorted(names - wanted)
    if left and len(left) < len(names):
        said = how or f"a {group.called} of {group.name} takes a part of it along"
        raise ModelError(
            f"'{left[0]}' is not among the layers that are pruned, but {said}; choose or ignore "
            f"{', '.join(sorted(names))} together"
        )
    return not left
