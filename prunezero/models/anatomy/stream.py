"""Channels of the residual stream, found by structure and proved by a probe.

Embeddings begin the stream, and blocks read and write it: a channel has a column of every matrix
that reads it, a row of every one that writes it, and an entry of every norm on it, of every
embedding and of the output head. It may leave all of them at once, and nothing else.

Which axes those are shows when embeddings hand on their channels in another order. Where linear
maps give zeros, those at which the new order arrives read the stream. Where the others then give
noise in the new order, norms at which it arrives are on the stream, as those of queries and keys
are not. The proof is to move all of these axes: the logits of the real model must not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError, reason
from prunezero.models.anatomy.block_probe import logits_of, probe_ids, relative_change
from prunezero.models.anatomy.channels import is_among
from prunezero.models.anatomy.groups import Group, Member, Part
from prunezero.models.anatomy.linears import Linear, find_linears, is_linear, refuse_experts
from prunezero.models.editing.permuting import ROUNDING, ROUNDING_OF_LOGITS
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import sliced
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.hooks import removing

# Under this name a model keeps its group, whatever its weights become.
_FOUND = "_prunezero_stream"
NAME = "stream"


def channel_groups(linears: Sequence[Linear], language_model: LanguageModel) -> list[Group]:
    """The channels of the residual stream, one group for the whole model.

    Raises:
        ModelError: they could not be proved to be such, or some linear maps on the stream are not
            among the given ones.
    """
    model = language_model.model
    shapes = [(name, one.shape) for name, one in model.named_parameters()]
    known = vars(model).get(_FOUND, (None,))
    if known[0] != shapes:
        known = vars(model)[_FOUND] = shapes, _found(language_model)
    group: Group = known[1]
    if not is_among(group, {linear.name for linear in linears}):
        raise ModelError(
            "none of the layers that are pruned reads or writes the residual stream, so no channel "
            "of it can go; leave targets out"
        )
    return [group]


@dataclass
class _Seen:
    """What arrived at modules, by name."""

    inputs: dict[str, Tensor] = field(default_factory=dict)

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A hook that notes the first input of a module."""

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self.inputs.setdefault(name, args[0])

        return note


@dataclass(frozen=True)
class _Probe:
    """A model whose embeddings and linear maps can be told what to give."""

    language_model: LanguageModel
    linears: Mapping[str, Linear]
    norms: Mapping[str, nn.Module]
    """modules with vectors as long as the stream is wide"""
    tables: Mapping[str, nn.Module]
    """embeddings"""
    width: int
    ids: Tensor
    order: Tensor
    """another order of the channels"""

    def seen(self, answers: Mapping[str, Tensor], order: Tensor | None) -> dict[str, Tensor]:
        """What arrives at linear maps and norms, whose vectors are constant meanwhile.

        Args:
            answers: what linear maps give; zeros where they are not named.
            order: of the channels that embeddings hand on; None leaves it.
        """
        seen = _Seen()
        handles = []
        for name, linear in self.linears.items():
            handles.append(linear.module.register_forward_pre_hook(seen.hook(name)))
            handles.append(linear.module.register_forward_hook(_giving(answers.get(name))))
        for name, module in self.norms.items():
            handles.append(module.register_forward_pre_hook(seen.hook(name)))
        if order is not None:
            handles += [
                module.register_forward_hook(_reordering(order)) for module in self.tables.values()
            ]
        with removing(handles), _constant(self.norms.values()):
            logits_of(self.language_model, self.ids)
        return seen.inputs

    def follows(self, before: Tensor, after: Tensor | None) -> bool:
        """Whether something arrived in the other order that was not the same in both."""
        if after is None or before.shape[-1] != self.width or before.shape != after.shape:
            return False
        moved = before.index_select(-1, self.order)
        return self.is_same(after, moved) and not self.is_same(after, before)

    def is_same(self, now: Tensor, then: Tensor) -> bool:
        """Whether two tensors differ by rounding alone."""
        rounding = ROUNDING_OF_LOGITS.get(self.language_model.dtype, ROUNDING)
        return relative_change(now, then) <= rounding


def _giving(answer: Tensor | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def give(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if answer is None:
            return torch.zeros_like(output)
        return answer.to(output).reshape(output.shape)

    return give


def _reordering(order: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def reorder(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.index_select(-1, order)

    return reorder


@contextmanager
def _constant(modules: Any) -> Iterator[None]:
    """Within it, all vectors of some modules are constant, so that no order shows in them."""
    before = [(one, dict(one._parameters)) for one in modules]
    try:
        for module, own in before:
            for name, vector in own.items():
                if vector is not None:
                    same = torch.full_like(vector, 0.5)
                    module._parameters[name] = nn.Parameter(same, requires_grad=False)
        yield
    finally:
        for module, own in before:
            module._parameters.update(own)


def _found(language_model: LanguageModel) -> Group:
    """The group of a model.

    Raises:
        ModelError: see `channel_groups`.
    """
    probe = _probe(language_model)
    plain, moved = probe.seen({}, None), probe.seen({}, probe.order)
    readers = [name for name, one in plain.items() if probe.follows(one, moved.get(name))]
    readers = [name for name in readers if name in probe.linears]
    writers = [
        name
        for name, one in probe.linears.items()
        if name not in readers and one.weight.shape[0] == probe.width
    ]
    noise = _noise(probe)
    reordered = {
        name: one.index_select(-1, probe.order) if name in writers else one
        for name, one in noise.items()
    }
    before, after = probe.seen(noise, None), probe.seen(reordered, probe.order)
    norms = [
        name for name in probe.norms if name in before and probe.follows(before[name], after[name])
    ]
    members, inputs = [], set()
    for name in probe.linears:
        if name in writers:
            members.append(Member(probe.linears[name], "producer", units=probe.width))
        elif name in readers:
            is_again = id(plain[name]) in inputs
            inputs.add(id(plain[name]))
            reader = probe.linears[name]
            members.append(Member(reader, "consumer", probe.width, is_again=is_again))
    parts = _parts(language_model.model, probe, norms)
    group = Group(
        name=NAME,
        block=0,
        kind="channel",
        shape=(probe.width,),
        members=tuple(members),
        cost=_cost(language_model.model, members, parts, probe.width),
        least=1,
        parts=parts,
    )
    _refuse_other_logits(language_model, group, probe)
    _refuse_other_widths(language_model, group, probe)
    return group


def _probe(language_model: LanguageModel) -> _Probe:
    model = language_model.model
    linears = {linear.name: linear for linear in find_linears(model)}
    refuse_experts(linears.values(), "unit channel does")
    tables = {name: one for name, one in model.named_modules() if isinstance(one, nn.Embedding)}
    head = model.get_output_embeddings()
    widths = {one.embedding_dim for one in tables.values()}
    widths |= set() if head is None else {head.weight.shape[1]}
    if head is None or len(widths) != 1:
        raise _unsupported(
            language_model,
            f"has embeddings and an output head of the widths {', '.join(map(str, sorted(widths)))}"
            if head is not None
            else "has no output head",
        )
    (width,) = widths
    generator = torch.Generator().manual_seed(0)
    ids = probe_ids(language_model, generator)
    order = torch.randperm(width, generator=generator)
    device = language_model.device
    return _Probe(
        language_model,
        linears,
        {name: one for name, one in model.named_modules() if _is_norm(one, width)},
        tables,
        width,
        ids,
        order.to(device),
    )


def _is_norm(module: nn.Module, width: int) -> bool:
    own = list(module.parameters(recurse=False))
    is_known = is_linear(module) or isinstance(module, nn.Embedding)
    return bool(own) and not is_known and all(one.shape == (width,) for one in own)


def _noise(probe: _Probe) -> dict[str, Tensor]:
    """Random outputs [1, length, out] of all linear maps."""
    generator = torch.Generator().manual_seed(1)
    length = probe.ids.shape[1]
    return {
        name: torch.randn(1, length, one.weight.shape[0], generator=generator).to(probe.ids.device)
        for name, one in probe.linears.items()
    }


def _parts(model: Any, probe: _Probe, norms: Sequence[str]) -> tuple[Part, ...]:
    head = model.get_output_embeddings()
    (name,) = (name for name, module in model.named_modules() if module is head)
    tables = [Part(f"{table}.weight", 1) for table in probe.tables]
    vectors = [
        Part(f"{norm}.{vector}", 0)
        for norm in norms
        for vector, _ in probe.norms[norm].named_parameters(recurse=False)
    ]
    return (*tables, *vectors, Part(f"{name}.weight", 1))


def _axes(members: Sequence[Member], parts: Sequence[Part]) -> dict[str, int]:
    """The axis of each parameter along which channels lie, as its module holds it, by name."""
    axes = {part.name: part.axis for part in parts}
    for member in members:
        linear, axis = member.linear, member.axis
        axes[f"{linear.name}.weight"] = axis if isinstance(linear.module, nn.Linear) else 1 - axis
        if axis == 0 and linear.bias is not None:
            axes[f"{linear.name}.bias"] = 0
    return axes


def _cost(
    model: Any, members: Sequence[Member], parts: Sequence[Part], width: int
) -> dict[str, float]:
    """What goes for good with one channel, by measure; what is shared counts once."""
    tensors = {id(one): one for one in map(model.get_parameter, _axes(members, parts))}
    weights = sum(member.rest for member in members)
    head = model.get_output_embeddings().weight.shape[0]
    return {
        "weights": float(weights),
        "parameters": float(sum(one.numel() // width for one in tensors.values())),
        "flops": 2.0 * (weights + head),
    }


def _refuse_other_logits(language_model: LanguageModel, group: Group, probe: _Probe) -> None:
    """Refuse a model that computes something else once its channels stand in another order.

    Raises:
        ModelError: it does.
    """
    before = logits_of(language_model, probe.ids)
    with _moved(language_model.model, _axes(group.members, group.parts), probe.order):
        after = logits_of(language_model, probe.ids)
    if not probe.is_same(after, before):
        raise _unsupported(
            language_model, "computes something else once all channels stand in another order"
        )


@contextmanager
def _moved(model: Any, axes: Mapping[str, int], order: Tensor) -> Iterator[None]:
    """Within it, some parameters stand in another order along an axis; none is written to."""
    before: dict[str, nn.Parameter] = {name: model.get_parameter(name) for name in axes}
    # A tensor that two modules share stays one.
    moved = {
        id(before[name]): nn.Parameter(before[name].detach().index_select(axis, order), False)
        for name, axis in axes.items()
    }
    try:
        _hold(model, {name: moved[id(one)] for name, one in before.items()})
        yield
    finally:
        _hold(model, before)


def _hold(model: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        path, _, key = name.rpartition(".")
        model.get_submodule(path)._parameters[key] = parameter


def _refuse_other_widths(language_model: LanguageModel, group: Group, probe: _Probe) -> None:
    """Refuse a model that does not run with fewer channels.

    Raises:
        ModelError: it does not.
    """
    kept = torch.arange(group.units, device=probe.ids.device) > 0
    try:
        with sliced(language_model, Selection((group,), (kept,))):
            logits_of(language_model, probe.ids)
    except RuntimeError as error:
        raise _unsupported(
            language_model, f"does not run with one channel fewer ({reason(error)})"
        ) from error


def _unsupported(language_model: LanguageModel, what: str) -> ModelError:
    return ModelError(
        f"{type(language_model.model).__name__} {what}, so no channel of its residual stream can "
        "go; this layout is not supported"
    )
