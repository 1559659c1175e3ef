"""Neurons: the channels inside an MLP, found by structure and proved by a probe.

A neuron is a channel that some rows make and one column reads, token by token, and that nothing
else of its block sees: its rows and its column may leave, and nothing but the neuron is missing.
Which channels are such shows on a copy of the block with random weights
(`prunezero/models/editing/permuting.py`), never in names. Where channels mix tokens, as those of
attention do, they are no neurons.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from prunezero.errors import ModelError
from prunezero.models.anatomy.groups import Group, Member, unit_cost
from prunezero.models.anatomy.linears import Linear, find_blocks, find_linears
from prunezero.models.editing.permuting import PermutableChannels, find_permutables
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.unequal.layers import SkippedMLP

# Under this name a model keeps what a probe found of its blocks, whatever its weights become.
_FOUND = "_prunezero_neurons"


def neuron_groups(linears: Sequence[Linear], language_model: LanguageModel) -> list[Group]:
    """The neurons of each MLP that has a part among some linear maps, in the order of the model.

    Raises:
        ModelError: a block has no neurons that could be proved to be such, or experts; or some
            matrices of an MLP are among the linear maps and others, which go with them, are not.
    """
    wanted = {linear.name for linear in linears}
    by_block: dict[int, list[Linear]] = defaultdict(list)
    for linear in find_linears(language_model.model):
        by_block[linear.block].append(linear)
    groups: list[Group] = []
    for block in dict.fromkeys(linear.block for linear in linears):
        found = _groups_of_block(language_model, by_block[block])
        groups += [group for group in found if _is_among(group, wanted)]
    if not groups:
        raise ModelError(
            f"none of the layers that are pruned is part of an MLP, so no neuron can go; choose "
            f"other targets, such as '{linears[0].name.rsplit('.', 2)[0]}'"
        )
    return groups


def _groups_of_block(language_model: LanguageModel, inside: Sequence[Linear]) -> list[Group]:
    for linear in inside:
        if "expert" in linear.name:
            raise ModelError(
                f"'{linear.name}' belongs to an expert; unit neuron does not speak of mixtures of "
                "experts yet"
            )
    block = find_blocks(language_model.model)[inside[0].block]
    if any(isinstance(module, SkippedMLP) for module in block.modules()):
        return []
    found = _channels(language_model, inside)
    if not found:
        raise ModelError(
            f"block {inside[0].block} of {type(language_model.model).__name__} has no channels "
            "that are made by some rows, read by one column and seen by nothing else, so no neuron "
            "of it can go; this layout is not supported"
        )
    names = _names(found)
    return [_group(permutable, name) for permutable, name in zip(found, names, strict=True)]


def _channels(language_model: LanguageModel, inside: Sequence[Linear]) -> list[PermutableChannels]:
    """The channels of a block that are neurons; a model is probed once."""
    known = vars(language_model.model).setdefault(_FOUND, {})
    block, shapes = inside[0].block, [(linear.name, linear.weight.shape) for linear in inside]
    if known.get(block, (None,))[0] != shapes:
        found = [
            permutable
            for permutable in find_permutables(language_model, inside)
            if permutable.heads is None and not permutable.mixes_tokens
        ]
        known[block] = shapes, found
    channels: list[PermutableChannels] = known[block][1]
    return channels


def _group(permutable: PermutableChannels, name: str) -> Group:
    count = permutable.channels
    made = [
        Member(linear, "producer", units=count, start=start)
        for linear, start in permutable.producers
    ]
    members = (*made, Member(permutable.consumer, "consumer", units=count))
    return Group(
        name=name,
        block=permutable.consumer.block,
        kind="neuron",
        shape=(count,),
        members=members,
        cost=unit_cost(members),
        least=1,
    )


def _names(found: Sequence[PermutableChannels]) -> list[str]:
    """What the members of each are called together, or its consumer where that tells too little."""
    shared = []
    for permutable in found:
        layers = [permutable.consumer, *(layer for layer, _ in permutable.producers)]
        words = zip(*(layer.name.split(".") for layer in layers), strict=False)
        same = [word for word, *others in words if {word} == {word, *others}]
        is_block = bool(same) and same[-1].isdigit()
        shared.append(permutable.consumer.name if is_block else ".".join(same))
    counts = Counter(shared)
    return [
        name if counts[name] == 1 else permutable.consumer.name
        for name, permutable in zip(shared, found, strict=True)
    ]


def _is_among(group: Group, wanted: set[str]) -> bool:
    """Whether a group is to be pruned: all its matrices are, or none.

    Raises:
        ModelError: some are and others are not.
    """
    names = {member.linear.name for member in group.members}
    left = sorted(names - wanted)
    if left and len(left) < len(names):
        raise ModelError(
            f"'{left[0]}' is not among the layers that are pruned, but a neuron of {group.name} "
            f"takes a part of it along; choose or ignore {', '.join(sorted(names))} together"
        )
    return not left
