"""What does a part of the depth do to a model: to the stream that it adds to, and to the loss?

A part is an attention, an MLP, a layer, or several neighbouring ones. The stream before and behind
a layer is what its block is handed and returns; that between the halves of a block is what it
returns without the other half. The loss without a part is measured, by a forward pass for each: it
begins at the block of that part, since those before it compute what they did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prunezero.errors import ModelError
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_blocks
from prunezero.models.anatomy.sub_blocks import SubBlock, find_sub_blocks, sub_blocks_of
from prunezero.models.editing.skipping import skipped
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.hooks import removing
from prunezero.models.observing.walk import answering, hidden_of, split_call, with_hidden
from prunezero.models.text.windows import check_windows
from prunezero.scoring.statistics import BLOCK_SUMS, Statistics, contribution


@dataclass
class _Stream:
    """The residual stream of one sequence, in places."""

    before: list[Tensor] = field(default_factory=list)
    """each block, [1, length, hidden]"""
    behind: list[Tensor] = field(default_factory=list)
    """each block"""
    without: dict[str, Tensor] = field(default_factory=dict)
    """what its block returns without a sub-block, by the name of that"""
    returned: list[Any] = field(default_factory=list)
    """what each block returned, hidden states and whatever is beside"""


def depth_statistics(
    language_model: LanguageModel,
    groups: Sequence[Group],
    windows: Tensor,
    sums: Iterable[str],
    *,
    gone: Sequence[Group] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Statistics]:
    """What parts of the depth do to sequences, by the names of their groups.

    Args:
        language_model: dense; its weights are the same afterwards.
        groups: the parts.
        windows: calibration token ids [count, length].
        sums: names in `BLOCK_SUMS`.
        gone: parts that the model does without by then; distances are to the model with all.
        progress: told (what, done, total) as the work goes on.

    Raises:
        TextError: the model cannot be run on these ids.
        StatisticsError: a number is not finite.
        ModelError: the model changes the stream between its blocks.
    """
    check_windows(windows, language_model)
    names = frozenset(sums)
    sources = {BLOCK_SUMS[name].source for name in names}
    every = find_sub_blocks(language_model)
    parts = {group.name: sub_blocks_of(language_model, [group]) for group in groups}
    off = sub_blocks_of(language_model, gone) if gone else []
    halves = _halves(parts.values(), every) if "stream" in sources else {}
    found = {group.name: Statistics.empty(names, 1, 1, language_model.device) for group in groups}
    with torch.no_grad():
        for done, ids in enumerate(windows, start=1):
            ids = ids[None].to(language_model.device)
            dense = None
            if "divergences" in sources:
                dense = _log_chances(language_model, ids)
            with skipped(language_model, off):
                stream = _stream(language_model, ids, halves)
                for group, inside in parts.items():
                    if "stream" in sources:
                        before, behind = _around(stream, inside, every)
                        added = contribution("stream", behind, names, inputs=before, layer=group)
                        found[group].add(added)
                    if sources - {"stream"}:
                        _add_losses(found[group], language_model, ids, stream, inside, dense, group)
            if progress is not None:
                progress("sequences seen along the depth", done, len(windows))
    return found


def _halves(
    parts: Iterable[Sequence[SubBlock]], every: Sequence[SubBlock]
) -> dict[int, list[SubBlock]]:
    """By block, the sub-blocks without which it has to be run to see the stream around others."""
    found: dict[int, list[SubBlock]] = {}
    for inside in parts:
        if len(inside) == 1:
            one = inside[0]
            found.setdefault(one.block, []).append(one if one.follows else _other(one, every))
    return found


def _other(one: SubBlock, every: Sequence[SubBlock]) -> SubBlock:
    return next(other for other in every if other.block == one.block and other.name != one.name)


def _around(
    stream: _Stream, inside: Sequence[SubBlock], every: Sequence[SubBlock]
) -> tuple[Tensor, Tensor]:
    """The stream before and behind neighbouring sub-blocks."""
    first, last = inside[0], inside[-1]
    if len(inside) > 1:
        return stream.before[first.block], stream.behind[last.block]
    if first.follows:
        return stream.without[first.name], stream.behind[first.block]
    return stream.before[first.block], stream.without[_other(first, every).name]


def _stream(
    language_model: LanguageModel, ids: Tensor, halves: dict[int, list[SubBlock]]
) -> _Stream:
    """The stream of one sequence through the model as it is."""
    stream = _Stream()

    def after(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        state, rest, named = split_call(args, kwargs)
        last = stream.behind[-1] if stream.behind else state
        if not torch.allclose(state, last, rtol=0.0, atol=0.0, equal_nan=True):
            raise ModelError(
                f"{type(language_model.model).__name__} changes hidden states between its blocks; "
                "this layout is not supported"
            )
        for one in halves.get(len(stream.before), []):
            with skipped(language_model, [one]):
                stream.without[one.name] = hidden_of(block.forward(state, *rest, **named))
        stream.before.append(state)
        stream.behind.append(hidden_of(output))
        stream.returned.append(output)

    blocks = find_blocks(language_model.model)
    hooks = [block.register_forward_hook(after, with_kwargs=True) for block in blocks]
    with removing(hooks):
        language_model.model.base_model(ids, use_cache=False)
    return stream


def _add_losses(
    statistics: Statistics,
    language_model: LanguageModel,
    ids: Tensor,
    stream: _Stream,
    inside: Sequence[SubBlock],
    dense: Tensor | None,
    name: str,
) -> None:
    """Add the nats of each predicted token where some sub-blocks add nothing."""
    with (
        skipped(language_model, inside),
        _from_block(language_model, min(one.block for one in inside), stream),
    ):
        log_chances = _log_chances(language_model, ids)
    losses = cross_entropy(log_chances, ids[0, 1:], reduction="none")
    statistics.add(contribution("losses", losses[:, None], statistics.sums, layer=name))
    if dense is not None:
        distances = (dense.exp() * (dense - log_chances)).sum(-1)
        added = contribution("divergences", distances[:, None], statistics.sums, layer=name)
        statistics.add(added)


@contextmanager
def _from_block(language_model: LanguageModel, block: int, stream: _Stream) -> Iterator[None]:
    """Within it, the blocks before this one compute nothing, and it is handed what it was."""
    state = stream.before[block]

    def answer(*args: Any, **kwargs: Any) -> Any:
        return with_hidden(stream.returned[0], state)

    with answering(find_blocks(language_model.model)[:block], answer):
        yield


def _log_chances(language_model: LanguageModel, ids: Tensor) -> Tensor:
    """Logarithms of the model's chances of each next token, [length - 1, vocabulary]."""
    logits = language_model.model(ids, use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)
