"""Sub-blocks: the attention and the MLP of each block, found by structure and proved by a probe.

A decoder block adds to the residual stream what an attention and an MLP make of it. Linear maps
that stand in one child of a block belong together, the last of them that runs writes to the stream,
and the sub-block whose tokens see each other is the attention. On a copy of the block with random
weights it is proved that a sub-block adds nothing once its writer gives zeros, that nothing else
reads the rest of it, and that a block without both hands on what it got. Where that does not hold,
as behind a norm of the sum, the layout is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.block_probe import (
    BlockProbe,
    Trace,
    probe_block,
    probe_ids,
    relative_change,
)
from prunezero.models.anatomy.channels import is_among
from prunezero.models.anatomy.groups import Group, Member
from prunezero.models.anatomy.linears import (
    Linear,
    block_prefix,
    by_block,
    find_blocks,
    find_linears,
    refuse_experts,
)
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.hooks import removing
from prunezero.models.observing.walk import hidden_of

# Largest change, relative to the norm, that is rounding of float32.
ROUNDING = 1e-5
# Under this name a model keeps what a probe found of its blocks, whatever its weights become.
_FOUND = "_prunezero_sub_blocks"


@dataclass(frozen=True)
class SubBlock:
    """An attention or an MLP, with all that goes when it goes."""

    name: str
    """of its module, such as model.layers.3.mlp; of its writer, where it has no module"""
    kind: str
    """attention or mlp"""
    block: int
    """index of its decoder block"""
    linears: tuple[Linear, ...]
    """in the order in which they run"""
    parameters: tuple[str, ...]
    """names of all that nobody reads once it adds nothing, its norms among them"""
    modules: tuple[str, ...]
    """names of the outermost modules that hold no other parameters; one of them holds the writer"""
    follows: bool
    """whether it reads what the other one of its block adds; not where both read the same"""
    hands_on: int | str | None
    """place or name of the argument that its module returns once it adds nothing: the stream, where
    the module itself adds to that; None where it returns zeros"""
    is_tuple: bool
    """whether its module returns more than hidden states"""

    @property
    def writer(self) -> Linear:
        """The linear map whose output is added to the stream."""
        return self.linears[-1]

    @property
    def module(self) -> str:
        """The name of the module that holds the writer, or of the writer."""
        name = self.writer.name
        return next(one for one in self.modules if f"{name}.".startswith(f"{one}."))


def find_sub_blocks(language_model: LanguageModel) -> list[SubBlock]:
    """All sub-blocks of a model, in the order in which they run; a model is probed once.

    Raises:
        ModelError: a block is not an attention and an MLP that add to one stream.
    """
    blocks = by_block(find_linears(language_model.model))
    known = vars(language_model.model).setdefault(_FOUND, {})
    for block, inside in blocks.items():
        modules = [linear.module for linear in inside]
        if known.get(block, (None,))[0] != modules:
            known[block] = modules, _sub_blocks_of(language_model, inside)
    return [one for block in blocks for one in known[block][1]]


def sub_blocks_of(language_model: LanguageModel, groups: Sequence[Group]) -> list[SubBlock]:
    """The sub-blocks that are parts of some groups, in the order in which they run."""
    names = {member.linear.name for group in groups for member in group.members}
    return [one for one in find_sub_blocks(language_model) if one.writer.name in names]


def attention_groups(linears: Sequence[Linear], language_model: LanguageModel) -> list[Group]:
    """Each attention as a group of one unit.

    Raises:
        ModelError: as `block_groups`.
    """
    return _groups(linears, language_model, "attention", ["attention"])


def mlp_groups(linears: Sequence[Linear], language_model: LanguageModel) -> list[Group]:
    """Each MLP as a group of one unit.

    Raises:
        ModelError: as `block_groups`.
    """
    return _groups(linears, language_model, "mlp", ["mlp"])


def block_groups(linears: Sequence[Linear], language_model: LanguageModel) -> list[Group]:
    """Each attention and each MLP as a group of one unit.

    Raises:
        ModelError: as `find_sub_blocks`; or no sub-block is among the linear maps as a whole.
    """
    return _groups(linears, language_model, "block", ["attention", "mlp"])


def layer_groups(linears: Sequence[Linear], language_model: LanguageModel) -> list[Group]:
    """Each whole decoder block as a group of one unit.

    Raises:
        ModelError: as `block_groups`.
    """
    prefix, blocks = block_prefix(language_model.model), find_blocks(language_model.model)
    linears_of_all = (linear for one in find_sub_blocks(language_model) for linear in one.linears)
    groups = [
        _group(
            f"{prefix}.{block}",
            "layer",
            inside,
            sum(parameter.numel() for parameter in blocks[block].parameters()),
        )
        for block, inside in by_block(linears_of_all).items()
    ]
    return _among(groups, linears)


def _groups(
    linears: Sequence[Linear], language_model: LanguageModel, kind: str, parts: Sequence[str]
) -> list[Group]:
    model = language_model.model
    groups = [
        _group(
            one.name,
            kind,
            one.linears,
            sum(model.get_parameter(name).numel() for name in one.parameters),
        )
        for one in find_sub_blocks(language_model)
        if one.kind in parts
    ]
    return _among(groups, linears)


def _group(name: str, kind: str, linears: Sequence[Linear], parameters: int) -> Group:
    # Whole matrices go with their biases, that of the writer too.
    members = tuple(
        Member(linear, "producer", units=1, width=linear.weight.shape[0]) for linear in linears
    )
    weights = float(sum(member.rest for member in members))
    cost = {"weights": weights, "parameters": float(parameters), "flops": 2 * weights}
    return Group(name, linears[0].block, kind, (1,), members, cost)


def _among(groups: Sequence[Group], linears: Sequence[Linear]) -> list[Group]:
    """The groups that are to be pruned: all their matrices are, or none.

    Raises:
        ModelError: of one some are and others are not, or no group is left.
    """
    wanted = {linear.name for linear in linears}
    chosen = [
        group for group in groups if is_among(group, wanted, how=f"it goes with {group.name}")
    ]
    if not chosen:
        together = ", ".join(member.linear.name for member in groups[0].members)
        raise ModelError(
            f"the layers that are pruned hold all of no {groups[0].kind}, so none can go; choose "
            f"other targets, such as {together} together"
        )
    return chosen


def _sub_blocks_of(language_model: LanguageModel, inside: Sequence[Linear]) -> list[SubBlock]:
    """The two sub-blocks of one block, in the order in which they run."""
    refuse_experts(inside, "units of depth do")
    ids = probe_ids(language_model, torch.Generator().manual_seed(0))
    block = inside[0].block
    probe, _ = probe_block(language_model, block, ids)
    probe.block.requires_grad_(True)
    trace = probe.run()
    prefix = f"{block_prefix(language_model.model)}.{block}"
    parts = _parts(trace, prefix, probe)
    kinds = [_kind(trace, part) for part in parts]
    if sorted(kinds) != ["attention", "mlp"]:
        raise _unsupported(
            language_model,
            block,
            f"is made of {', '.join(kinds) or 'nothing that runs'}, not of one attention and one "
            "MLP",
        )
    return _proved(language_model, probe, parts, kinds, prefix)


def _parts(trace: Trace, prefix: str, probe: BlockProbe) -> list[list[Linear]]:
    """Linear maps of the copy that stand in one child of the block, in the order of the run."""
    parts: dict[str, list[Linear]] = defaultdict(list)
    for name in trace.inputs:
        child, _, deeper = name.removeprefix(f"{prefix}.").partition(".")
        parts[child if deeper else ""].append(probe.layers[name])
    order = list(trace.inputs)
    return sorted(parts.values(), key=lambda part: order.index(part[-1].name))


def _kind(trace: Trace, part: Sequence[Linear]) -> str:
    """Whether late tokens at the writer depend on early ones of what the others make."""
    *makers, writer = part
    if not makers:
        return "a single linear map"
    inputs = trace.inputs[writer.name]
    half = inputs.shape[-2] // 2
    gradients = torch.autograd.grad(
        inputs[..., half:, :].sum(),
        [trace.outputs[maker.name] for maker in makers],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    mixes = any(bool(gradient[..., :half, :].any()) for gradient in gradients)
    return "attention" if mixes else "mlp"


def _proved(
    language_model: LanguageModel,
    probe: BlockProbe,
    parts: Sequence[Sequence[Linear]],
    kinds: Sequence[str],
    prefix: str,
) -> list[SubBlock]:
    """The sub-blocks, once it is sure that they go without a trace.

    Raises:
        ModelError: a block without them still changes the stream, or something else reads a part.
    """
    block = parts[0][0].block
    writers = [part[-1].module for part in parts]
    without_both, _ = _answer(probe, writers)
    if _differ(without_both, probe.state):
        raise _unsupported(
            language_model,
            block,
            "changes the stream even where attention and MLP add nothing to it, as a norm of the "
            "sum or a bias behind it does",
        )
    whole, read = _answer(probe, [])
    singles = [_answer(probe, [writer]) for writer in writers]
    # Side by side, both add to the stream what they would add alone.
    is_parallel = not _differ(sum(one - probe.state for one, _ in singles), whole - probe.state)
    found = []
    for place, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
        _, still_read = singles[place]
        linears = {f"{linear.name.removeprefix(f'{prefix}.')}.weight" for linear in part}
        if linears & still_read:
            raise _unsupported(
                language_model, block, f"reads '{min(linears & still_read)}' outside its {kind}"
            )
        of_part = {
            name
            for name, _ in probe.block.named_parameters()
            if name.rpartition(".")[0] in {one.rpartition(".")[0] for one in linears}
        }
        parameters = of_part | (read - still_read)
        one = SubBlock(
            name=_name(part, prefix),
            kind=kind,
            block=block,
            linears=tuple(probe.originals[linear.name] for linear in part),
            parameters=tuple(f"{prefix}.{name}" for name in sorted(parameters)),
            modules=tuple(f"{prefix}.{path}" for path in _holding(probe.block, parameters)),
            follows=place > 0 and not is_parallel,
            hands_on=None,
            is_tuple=False,
        )
        found.append(_with_returned(language_model, probe, one, writers[place]))
    return found


def _holding(block: nn.Module, parameters: set[str]) -> list[str]:
    """Paths of the outermost modules of a block that hold some of the parameters and no others."""
    found: list[str] = []
    for path, module in block.named_modules():
        inside = {f"{path}.{name}" for name, _ in module.named_parameters()}
        is_inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and inside and inside <= parameters and not is_inside:
            found.append(path)
    return found


def _with_returned(
    language_model: LanguageModel, probe: BlockProbe, one: SubBlock, writer: nn.Module
) -> SubBlock:
    """The sub-block, with what its module returns once its writer gives zeros.

    Raises:
        ModelError: that is neither zeros nor an argument, or its attention is no module.
    """
    if one.kind == "attention" and one.module == one.writer.name:
        raise _unsupported(
            language_model, one.block, "has an attention that is no module by itself"
        )
    calls: list[tuple[dict[Any, Any], Tensor, bool]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # A block may write to what its parts return.
        returned = hidden_of(output).clone()
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        calls.append((given, returned, isinstance(output, tuple)))

    path = one.module.split(f".{one.block}.", 1)[1]
    with _giving_zeros([writer]), torch.no_grad():
        with removing(
            [probe.block.get_submodule(path).register_forward_hook(note, with_kwargs=True)]
        ):
            probe.block(probe.state, *probe.rest, **probe.named)
    given, returned, is_tuple = calls[0]
    if not bool(returned.any()):
        return replace(one, is_tuple=is_tuple)
    for key, value in given.items():
        if isinstance(value, Tensor) and torch.equal(value, returned):
            return replace(one, is_tuple=is_tuple, hands_on=key)
    raise _unsupported(
        language_model, one.block, f"has an {one.kind} that returns neither the stream nor its part"
    )


def _name(part: Sequence[Linear], prefix: str) -> str:
    child, _, deeper = part[-1].name.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{child}" if deeper else part[-1].name


def _answer(probe: BlockProbe, off: Sequence[nn.Module]) -> tuple[Tensor, set[str]]:
    """What the copy returns where some linear maps give zeros, and the parameters that it reads."""
    names, parameters = zip(*probe.block.named_parameters(), strict=True)
    with torch.enable_grad(), _giving_zeros(off):
        state = probe.state.clone().requires_grad_()
        returned = hidden_of(probe.block(state, *probe.rest, **probe.named))
        generator = torch.Generator(state.device).manual_seed(1)
        weights = torch.randn(returned.shape, generator=generator, device=returned.device)
        gradients = torch.autograd.grad(
            (returned * weights).sum(), [state, *parameters], allow_unused=True
        )
    read = {
        name
        for name, gradient in zip(names, gradients[1:], strict=True)
        if gradient is not None and bool(gradient.any())
    }
    return returned.detach(), read


@contextmanager
def _giving_zeros(modules: Sequence[nn.Module]) -> Iterator[None]:
    def zeros(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    with removing([module.register_forward_hook(zeros) for module in modules]):
        yield


def _differ(now: Any, before: Tensor) -> bool:
    return not relative_change(now, before) <= ROUNDING


def _unsupported(language_model: LanguageModel, block: int, what: str) -> ModelError:
    return ModelError(
        f"block {block} of {type(language_model.model).__name__} {what}, so no part of its depth "
        "can go; this layout is not supported"
    )
