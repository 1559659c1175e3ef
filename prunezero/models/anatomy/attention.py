"""Heads of attention, and those that share keys and values, found and proved by a probe.

A group is a key-value head with all query heads that read it: rows that make its queries, keys and
values, and the columns that read what comes out. It may leave as one, and nothing but the group is
missing. Where every query head has keys and values of its own, a group is a head. Which rows belong
to a group shows on a copy of the block with random weights: those that its channels depend on, and
no others do. Fused and interleaved matrices give several members, or wide ones.

A query head by itself is the rows that make its queries and the columns that read it; the keys and
values of its group stay. Queries are what only their own token sees: keys and values are seen by
later tokens too. Attention repeats keys as often for each group, so as many heads of each stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from prunezero.errors import ModelError
from prunezero.models.anatomy.block_probe import (
    PROBE_TOKENS,
    BlockProbe,
    Call,
    Trace,
    calls_of_blocks,
    probe_of,
    relative_change,
)
from prunezero.models.anatomy.channels import inside_blocks, is_among, names_of, shapes_of
from prunezero.models.anatomy.groups import Group, Member, unit_cost
from prunezero.models.anatomy.linears import Linear, find_blocks, find_linears
from prunezero.models.editing.permuting import ROUNDING
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.unequal.layers import SkippedAttn

# Under this name a model keeps what a probe found of its heads, by kind and block.
_FOUND = "_prunezero_heads"
# And under this one how its blocks are called.
_CALLS = "_prunezero_calls"
# What a probe finds: parts of matrices of the copy, the reader last, and in how many strata.
_Found = tuple[list[Member], int]


def kv_groups(linears: Sequence[Linear], language_model: LanguageModel) -> list[Group]:
    """The key-value groups of each attention that has a part among some linear maps.

    Raises:
        ModelError: a block has no heads that could be proved to be such; or some matrices of an
            attention are among the linear maps and others, which go with them, are not.
    """
    found = _groups(linears, language_model, "kv_group", _groups_in_copy)
    return [
        replace(group, cost=unit_cost(group.members, cached=_cached(group.members)))
        for group in found
    ]


def query_heads(linears: Sequence[Linear], language_model: LanguageModel) -> list[Group]:
    """The query heads of each attention that has a part among some linear maps.

    Its strata are the key-value heads.

    Raises:
        ModelError: as `kv_groups`, or a query head shares its keys and values with no other.
    """
    return _groups(linears, language_model, "head", _heads_in_copy)


def _groups(
    linears: Sequence[Linear],
    language_model: LanguageModel,
    kind: str,
    find: Callable[[BlockProbe, str], _Found],
) -> list[Group]:
    wanted = {linear.name for linear in linears}
    groups: list[Group] = []
    for inside in inside_blocks(linears, language_model):
        block = find_blocks(language_model.model)[inside[0].block]
        if any(isinstance(module, SkippedAttn) for module in block.modules()):
            continue
        members, strata = _attention_of(language_model, inside, kind, find)
        (name,) = names_of([members])
        group = Group(
            name=name,
            block=inside[0].block,
            kind=kind,
            shape=(members[-1].units,),
            members=members,
            cost=unit_cost(members),
            least=1,
            strata=strata,
        )
        groups += [group] if is_among(group, wanted) else []
    if not groups:
        raise ModelError(
            f"none of the layers that are pruned is part of an attention, so no {_WORDS[kind]} "
            f"can go; choose other targets, such as '{linears[0].name.rsplit('.', 2)[0]}'"
        )
    return groups


def _cached(members: Sequence[Member]) -> int:
    """Numbers of keys and values of one group: rows that make it, but for those of its queries."""
    *makers, reader = members
    return sum(member.width for member in makers) - reader.width


def _attention_of(
    language_model: LanguageModel,
    inside: Sequence[Linear],
    kind: str,
    find: Callable[[BlockProbe, str], _Found],
) -> tuple[tuple[Member, ...], int]:
    """The parts of matrices that go with a unit of a block, and its strata; a model is probed once.

    Raises:
        ModelError: no such units could be proved.
    """
    known = vars(language_model.model).setdefault(_FOUND, {})
    block, shapes = inside[0].block, shapes_of(inside)
    if known.get((kind, block), (None,))[0] != shapes:
        probe = probe_of(language_model, block, _calls(language_model)[block])
        where = f"block {block} of {type(language_model.model).__name__}"
        originals = {linear.name: linear for linear in inside}
        members, strata = find(probe, where)
        known[kind, block] = shapes, ([_of(originals, member) for member in members], strata)
    members, strata = known[kind, block][1]
    return tuple(members), strata


def _calls(language_model: LanguageModel) -> dict[int, Call]:
    """How the model calls each of its blocks; asked once for all of them."""
    known = vars(language_model.model).setdefault(_CALLS, {})
    blocks = sorted({linear.block for linear in find_linears(language_model.model)})
    if set(known) != set(blocks):
        ids = torch.arange(PROBE_TOKENS, device=language_model.device)[None]
        known.clear()
        known.update(calls_of_blocks(language_model, ids, blocks)[0])
    calls: dict[int, Call] = known
    return calls


def _groups_in_copy(probe: BlockProbe, where: str) -> _Found:
    """What goes with a key-value group.

    Raises:
        ModelError: see `kv_groups`.
    """
    trace = probe.run()
    reader = _reader_in(probe, trace, where, "kv_group")
    width = _width_of_first(trace, reader.name, _rows_behind)
    return _proved(probe, trace, reader, width, "kv_group"), 1


def _heads_in_copy(probe: BlockProbe, where: str) -> _Found:
    """What goes with a query head, and how many key-value heads there are.

    Raises:
        ModelError: see `query_heads`.
    """
    trace = probe.run()
    reader = _reader_in(probe, trace, where, "head")
    channels = trace.inputs[reader.name].shape[-1]
    together = _width_of_first(trace, reader.name, _rows_behind)
    width = _width_of_first(trace, reader.name, _query_rows)
    if channels % together or together % width or _are_mixed(trace, reader.name, together):
        _refuse_layout(reader, "head")
    if width == together:
        raise ModelError(
            f"in {where} every query head has keys and values of its own, which nothing "
            "would read without it, so no head can go by itself; use unit kv_group"
        )
    strata = channels // together
    return _proved(probe, trace, reader, width, "head", strata), strata


def _reader_in(probe: BlockProbe, trace: Trace, where: str, kind: str) -> Linear:
    """The one matrix of the copy that reads attention.

    Raises:
        ModelError: there is none, or there are several.
    """
    readers = _readers(trace)
    if len(readers) != 1:
        raise ModelError(
            f"{where} has no attention that is read by one matrix, so no {_WORDS[kind]} of it can "
            "go; this layout is not supported"
        )
    return probe.layers[readers[0]]


def _are_mixed(trace: Trace, name: str, width: int) -> bool:
    """Whether some rows are behind several parts of so many input channels each."""
    channels = trace.inputs[name].shape[-1]
    parts = [_rows_behind(trace, name, at, at + width) for at in range(0, channels, width)]
    return any(
        bool((torch.stack([part[other] for part in parts]).sum(0) > 1).any()) for other in parts[0]
    )


def _proved(
    probe: BlockProbe, trace: Trace, reader: Linear, width: int, kind: str, strata: int = 1
) -> list[Member]:
    """The members of units of so many channels.

    Raises:
        ModelError: not all units are like the first, or something else sees their rows.
    """
    channels = trace.inputs[reader.name].shape[-1]
    # A channel by itself is no head: so convolutions mix tokens.
    if width > 1 and channels % width == 0:
        starts = range(0, channels, width)
        behind = [_ROWS[kind](trace, reader.name, at, at + width) for at in starts]
        makers = _makers(probe, behind, strata)
        members = [*makers, Member(reader, "consumer", channels // width, 0, width)]
        if makers and _are_alone(probe, members):
            return members
    _refuse_layout(reader, kind)


def _refuse_layout(reader: Linear, kind: str) -> NoReturn:
    raise ModelError(
        f"the heads that '{reader.name}' reads do not stand side by side in the matrices that make "
        f"them, or something else sees them, so no {_WORDS[kind]} can go; this layout is not "
        "supported"
    )


def _readers(trace: Trace) -> list[str]:
    """The matrices that read attention: the first behind a place where tokens are mixed."""
    behind = {name: _mixed_before(trace, name) for name in trace.inputs}
    mixed = {name: makers for name, (is_mixed, makers) in behind.items() if is_mixed}
    return [name for name, makers in mixed.items() if not makers & mixed.keys()]


def _mixed_before(trace: Trace, name: str) -> tuple[bool, set[str]]:
    """Whether late inputs of a matrix depend on early outputs of others, and on which others."""
    inputs = trace.inputs[name]
    half = inputs.shape[-2] // 2
    gradients = _gradients(trace, name, inputs[..., half:, :])
    is_mixed = any(bool(gradient[..., :half, :].any()) for gradient in gradients.values())
    return is_mixed, {other for other, gradient in gradients.items() if bool(gradient.any())}


def _gradients(trace: Trace, name: str, inputs: Tensor) -> dict[str, Tensor]:
    """How some inputs of a matrix depend on the outputs of the others, by name."""
    outputs = {other: value for other, value in trace.outputs.items() if other != name}
    gradients = torch.autograd.grad(
        inputs.square().sum(),
        list(outputs.values()),
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(outputs, gradients, strict=True))


def _rows_behind(trace: Trace, name: str, start: int, stop: int) -> dict[str, Tensor]:
    """Which rows of the other matrices some input channels depend on, bool [rows] by name."""
    gradients = _gradients(trace, name, trace.inputs[name][..., start:stop])
    return {
        other: gradient.reshape(-1, gradient.shape[-1]).any(0)
        for other, gradient in gradients.items()
    }


def _query_rows(trace: Trace, name: str, start: int, stop: int) -> dict[str, Tensor]:
    """Which rows make the queries behind some input channels, bool [rows] by name.

    What the last token reads depends on the rows of its own, and of earlier tokens on keys and
    values alone.
    """
    rows = {}
    last = trace.inputs[name][..., -1:, start:stop]
    for other, gradient in _gradients(trace, name, last).items():
        seen = (gradient != 0).reshape(-1, *gradient.shape[-2:]).any(0)
        rows[other] = seen[-1] & ~seen[:-1].any(0)
    return rows


def _width_of_first(trace: Trace, name: str, rows_of: _Rows) -> int:
    """How many neighbouring channels share rows with the first one."""
    first = rows_of(trace, name, 0, 1)
    shares, shares_not = 0, trace.inputs[name].shape[-1]
    while shares_not - shares > 1:
        middle = (shares + shares_not) // 2
        rows = rows_of(trace, name, middle, middle + 1)
        if any(bool((rows[other] & first[other]).any()) for other in rows):
            shares = middle
        else:
            shares_not = middle
    return shares_not


_Rows = Callable[[Trace, str, int, int], dict[str, Tensor]]
# By kind of unit: which rows make it, and what a sentence calls it.
_ROWS: dict[str, _Rows] = {"kv_group": _rows_behind, "head": _query_rows}
_WORDS = {"kv_group": "key-value group", "head": "query head"}


def _makers(probe: BlockProbe, behind: Sequence[Mapping[str, Tensor]], strata: int) -> list[Member]:
    """The parts of matrices whose rows make a unit; none where units do not stand in order.

    Args:
        behind: of each unit, the rows that make it, bool [rows] by name.
        strata: runs of units between which other rows may stand.
    """
    units = len(behind)
    makers: list[Member] = []
    for name, first in behind[0].items():
        runs, following = _runs(first), _runs(behind[units // strata % units][name])
        if len(runs) != len(following):
            return []
        parts = []
        for (start, width), (after, _) in zip(runs, following, strict=True):
            gap = after - start - units // strata * width if strata > 1 else 0
            parts.append(Member(probe.layers[name], "producer", units, start, width, strata, gap))
        if any(part.gap < 0 for part in parts):
            return []
        for unit, rows in enumerate(behind):
            kept = torch.arange(units) != unit
            expected = torch.zeros(len(first), dtype=torch.bool)
            for part in parts:
                expected |= ~part.kept_rows(kept)
            if not torch.equal(expected, rows[name].cpu()):
                return []
        makers += parts
    return makers


def _runs(rows: Tensor) -> list[tuple[int, int]]:
    """Neighbouring rows as (first, count), of bool [rows]."""
    runs: list[tuple[int, int]] = []
    for row in rows.nonzero().flatten().tolist():
        if runs and row == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((row, 1))
    return runs


def _are_alone(probe: BlockProbe, members: Sequence[Member]) -> bool:
    """Whether nothing but its reader sees the rows of a group: other rows there change nothing.

    The columns that read the last group are zero meanwhile; the copy is not used afterwards.
    """
    *makers, reader = members
    device = reader.linear.weight.device
    kept = (torch.arange(reader.units) < reader.units - 1).to(device)
    reader.linear.weight.mul_(reader.mask(kept))
    before = probe.run().returned
    generator = torch.Generator().manual_seed(1)
    for member in makers:
        rows = (~member.kept_rows(kept)).nonzero().flatten().to(device)
        noise = torch.randn(len(rows), member.linear.weight.shape[1], generator=generator)
        member.linear.weight[rows] = noise.to(member.linear.weight)
    after = probe.run().returned
    pairs = zip(after, before, strict=True)
    return all(relative_change(now, then) <= ROUNDING for now, then in pairs)


def _of(linears: Mapping[str, Linear], member: Member) -> Member:
    """The same part of the matrix of that name."""
    return replace(member, linear=linears[member.linear.name])
