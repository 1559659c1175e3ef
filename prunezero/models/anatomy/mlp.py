"""Neurons: the channels inside an MLP, found by structure and proved by a probe.

A neuron is a channel that some rows make and one column reads, token by token, and that nothing
else of its block sees: its rows and its column may leave, and nothing but the neuron is missing.
Which channels are such shows on a copy of the block with random weights
(`prunezero/models/editing/permuting.py`), never in names. Where channels mix tokens, as those of
attention do, they are no neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

from prunezero.errors import ModelError
from prunezero.models.anatomy.channels import inside_blocks, is_among, names_of, permutables_of
from prunezero.models.anatomy.groups import Group, Member, unit_cost
from prunezero.models.anatomy.linears import Linear, find_blocks, refuse_experts
from prunezero.models.editing.permuting import PermutableChannels
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.unequal.layers import SkippedMLP


def neuron_groups(linears: Sequence[Linear], language_model: LanguageModel) -> list[Group]:
    """The neurons of each MLP that has a part among some linear maps, in the order of the model.

    Raises:
        ModelError: a block has no neurons that could be proved to be such, or experts; or some
            matrices of an MLP are among the linear maps and others, which go with them, are not.
    """
    wanted = {linear.name for linear in linears}
    groups: list[Group] = []
    for inside in inside_blocks(linears, language_model):
        found = _groups_of_block(language_model, inside)
        groups += [group for group in found if is_among(group, wanted)]
    if not groups:
        raise ModelError(
            f"none of the layers that are pruned is part of an MLP, so no neuron can go; choose "
            f"other targets, such as '{linears[0].name.rsplit('.', 2)[0]}'"
        )
    return groups


def _groups_of_block(language_model: LanguageModel, inside: Sequence[Linear]) -> list[Group]:
    refuse_experts(inside, "unit neuron does")
    block = find_blocks(language_model.model)[inside[0].block]
    if any(isinstance(module, SkippedMLP) for module in block.modules()):
        return []
    found = [
        one
        for one in permutables_of(language_model, inside)
        if one.heads is None and not one.mixes_tokens
    ]
    if not found:
        raise ModelError(
            f"block {inside[0].block} of {type(language_model.model).__name__} has no channels "
            "that are made by some rows, read by one column and seen by nothing else, so no neuron "
            "of it can go; this layout is not supported"
        )
    members = [_members(permutable) for permutable in found]
    return [
        Group(
            name=name,
            block=parts[-1].linear.block,
            kind="neuron",
            shape=(parts[-1].units,),
            members=parts,
            cost=unit_cost(parts),
            least=1,
        )
        for parts, name in zip(members, names_of(members), strict=True)
    ]


def _members(permutable: PermutableChannels) -> tuple[Member, ...]:
    count = permutable.channels
    made = [
        Member(linear, "producer", units=count, start=start)
        for linear, start in permutable.producers
    ]
    return (*made, Member(permutable.consumer, "consumer", units=count))
