"""How does a model read its residual stream in other directions, and lose some of them?

In front of every attention and MLP the stream has a basis Q of its own, orthonormal columns, of
which some stay. An RMSNorm without its factors w commutes with a rotation, so w goes into what
reads it, and the model computes what it did as long as every direction stays:

    what reads       W  ->  W diag(w) Q          with width D and d directions that stay, a norm
    what writes      W  ->  Q_next^T W           over these alone would divide by more: sqrt(D / d)
    the stream       x  ->  x Q^T Q_next         goes into W too, and D / d into its eps
    embeddings       E  ->  E Q_first

Behind the last block the stream is a whole one again, Q_next = 1: final norm and output head stay.

Source: computational invariance and slicing of Ashkboos et al. 2024, SliceGPT (ICLR),
arXiv:2401.15024.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import Linear, block_prefix, find_blocks, find_linears
from prunezero.models.anatomy.norms import rms_norm
from prunezero.models.editing.exchanging import exchange, set_number, set_value
from prunezero.models.editing.narrowing import numbers_of, own_twin
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.widths import head_size
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.source import round_as_stored
from prunezero.models.observing.walk import hidden_of
from prunezero.models.unequal.rotated import rotate

# Of the two matrices of a layer, as its class calls them.
_WORDS = ("attn", "mlp")


@dataclass(frozen=True)
class Rotation:
    """How a model reads its stream in other directions."""

    groups: tuple[Group, ...]
    """of directions, one in front of each attention and MLP, in the order of the stream"""
    bases: tuple[Tensor, ...]
    """those that stay, [width, directions] each, in float64 on the CPU"""
    made: frozenset[str]
    """names of the parameters that are made anew"""
    scale: float
    """what embeddings multiply the rows of their table by"""
    settings: Mapping[str, Any]
    """what the configuration says of it, which only a class of its own takes"""
    numbers: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    """plain numbers of modules that change with it, by module and key"""
    fault: str = ""
    """why no class of its own computes it"""

    @property
    def names(self) -> dict[str, str]:
        """Matrices from basis to basis, each by that of a weight beside it in its layer."""
        found = {}
        for group, word in zip(self.groups, _WORDS * len(self.groups), strict=False):
            near = f"{group.members[0].linear.name}.weight"
            found[f"{group.name.rpartition('.')[0]}.{word}_shortcut_Q"] = near
        return found


def is_rotated(selection: Selection) -> bool:
    """Whether units of a selection are directions of the residual stream.

    Raises:
        ModelError: and others are not.
    """
    kinds = {group.is_turned for group in selection.groups}
    if len(kinds) > 1:
        raise ModelError(
            "directions of the residual stream and units of other kinds do not leave one model "
            "together; remove those of one kind"
        )
    return True in kinds


def rotation_of(language_model: LanguageModel, selection: Selection) -> Rotation:
    """How a model loses directions of its stream.

    A group whose basis is not known yet has the channels themselves for its directions.

    Raises:
        ModelError: groups keep different numbers of directions.
    """
    model = language_model.model
    bases = tuple(_basis(group)[:, kept.cpu()] for group, kept in selection)
    width, left = bases[0].shape
    if any(one.shape != bases[0].shape for one in bases):
        raise ModelError(
            "the residual stream has one width, but different numbers of directions would stay in "
            "front of its attentions and MLPs; let those of each place compete (compare: group)"
        )
    scale = scale_of(model.get_input_embeddings())
    settings = _settings(model, selection.groups, width, left)
    twin = own_twin(model, settings)
    made = _made(model, selection.groups, width, left)
    if twin is None or _shapes(twin) != {**_shapes(model), **made}:
        fault = (
            f"no class of its own can be written for type '{model.config.model_type}', so a model "
            "without some directions of its residual stream cannot be saved; leave --output out, "
            "or choose another unit"
        )
        return Rotation(selection.groups, bases, frozenset(made), scale, settings, fault=fault)
    numbers = numbers_of(model, twin)
    return Rotation(selection.groups, bases, frozenset(made), scale, settings, numbers)


def scale_of(embeddings: nn.Module) -> float:
    """What embeddings multiply the rows of their table by: 1, or as Gemma a number of its own."""
    table: Any = embeddings.weight
    row = int(table.detach().float().norm(dim=1).argmax())
    with torch.no_grad():
        found = embeddings(torch.tensor([[row]], device=table.device))[0, 0].double()
    given = table[row].detach().double()
    return float(found @ given / (given @ given))


def writer_of(model: nn.Module, group: Group) -> Linear:
    """The one linear map that writes to the stream what the readers of a group came to.

    Raises:
        ModelError: their part of the block has several others, or none.
    """
    readers = {member.linear.name for member in group.members}
    prefix = block_prefix(model)
    depth = prefix.count(".") + 3
    (part,) = {".".join(name.split(".")[:depth]) for name in readers}
    inside = [one for one in find_linears(model) if one.name.startswith(f"{part}.")]
    others = [one for one in inside if one.name not in readers]
    if len(others) != 1 or not isinstance(others[0].module, nn.Linear):
        raise ModelError(
            f"{part} has {len(others)} matrices that do not read the residual stream, of which one "
            "is expected to write to it; this layout is not supported"
        )
    return others[0]


def rotate_stream(language_model: LanguageModel, rotation: Rotation, undo: ExitStack) -> None:
    """Let a model read its stream in other directions, until `undo` is left.

    What is made anew is rounded as its files will hold it, so that both compute the same.
    """
    model, groups = language_model.model, rotation.groups
    nexts = [*rotation.bases[1:], None]
    width, left = rotation.bases[0].shape
    shortcuts = []

    def place(name: str, values: Tensor, like: str = "") -> nn.Parameter:
        made = values.to(model.get_parameter(like or name).dtype)
        if language_model.source is not None:
            round_as_stored(language_model.source, name, made, like=like)
        return nn.Parameter(made, requires_grad=False)

    def exchanged(name: str, values: Tensor) -> None:
        exchange(model, name, place(name, values), undo)

    writers = [writer_of(model, group) for group in groups]
    norms = [rms_norm(model.get_submodule(group.name)) for group in groups]
    for (path, key), value in rotation.numbers.items():
        set_number(model.get_submodule(path), key, value, undo)
    names = list(rotation.names.items())
    for group, norm, basis, then, writer, (name, near) in zip(
        groups, norms, rotation.bases, nexts, writers, names, strict=True
    ):
        assert norm is not None  # the group was found by it; for the type checker
        # Together they may be as large as the model.
        basis, then = basis.to(group.device), None if then is None else then.to(group.device)
        turned = (norm.factor[:, None] * basis) * (width / left) ** 0.5
        shortcuts.append(place(name, basis.T if then is None else basis.T @ then, near))
        for member in group.members:
            exchanged(f"{member.linear.name}.weight", member.linear.weight.double() @ turned)
        exchanged(f"{group.name}.weight", torch.full_like(turned[0], norm.neutral))
        if then is not None:
            _turn_writer(writer, then, exchanged)
    _turn_embeddings(model, rotation, exchanged)
    for index, layer in enumerate(find_blocks(model)):
        rotate_layer(layer, shortcuts[2 * index], shortcuts[2 * index + 1], undo)
    for key, value in rotation.settings.items():
        set_value(model.config, key, value, undo)


def rotate_layer(
    layer: nn.Module, over_attention: nn.Parameter, over_mlp: nn.Parameter, undo: ExitStack
) -> None:
    """Let a layer take the stream from basis to basis, until `undo` is left."""
    undo.callback(_unrotate, layer, type(layer))
    rotate(layer, over_attention, over_mlp)


def _unrotate(layer: Any, kind: type) -> None:
    layer.__class__ = kind
    del layer.attn_shortcut_Q, layer.mlp_shortcut_Q


def _turn_writer(writer: Linear, then: Tensor, exchanged: Any) -> None:
    exchanged(f"{writer.name}.weight", then.T @ writer.weight.double())
    if writer.bias is not None:
        exchanged(f"{writer.name}.bias", writer.bias.double() @ then)


def _turn_embeddings(model: Any, rotation: Rotation, exchanged: Any) -> None:
    """Turn the table of embeddings; a head that shares it keeps the one before."""
    embeddings = model.get_input_embeddings()
    (name,) = (name for name, module in model.named_modules() if module is embeddings)
    # Gemma scales by the width that the configuration says.
    scale = rotation.scale / scale_of(embeddings)
    table = embeddings.weight.detach()
    basis = rotation.bases[0].to(table.device)
    exchanged(f"{name}.weight", (table.double() @ basis) * scale)


def _basis(group: Group) -> Tensor:
    if group.basis is not None:
        return group.basis
    return torch.eye(group.units, dtype=torch.float64)


def _settings(model: Any, groups: tuple[Group, ...], width: int, left: int) -> dict[str, Any]:
    last = writer_of(model, groups[-1]).name
    body = model.base_model
    names = {id(module): name for name, module in body.named_modules()}
    (norm,) = final_norms(model)
    whole = {names[id(model.get_submodule(one))]: 0 for one in (last, norm)}
    head = model.get_output_embeddings()
    (name,) = (name for name, module in model.named_modules() if module is head)
    settings = {
        "hidden_size": left,
        "head_dim": head_size(model, last_attention(model)),
        "rotated": {"hidden_size": width, "whole": {**whole, name: 1}},
    }
    is_tied = head.weight is model.get_input_embeddings().weight
    return settings | ({"tie_word_embeddings": False} if is_tied else {})


def last_attention(model: nn.Module) -> str:
    """The name of the attention of the last block."""
    return f"{block_prefix(model)}.{len(find_blocks(model)) - 1}.self_attn"


def final_norms(model: Any) -> list[str]:
    """Names of modules outside of blocks that hold vectors as wide as the stream, and no more."""
    width, inside = model.config.hidden_size, f"{block_prefix(model)}."
    found = []
    for name, module in model.named_modules():
        own = [tuple(one.shape) for one in module.parameters(recurse=False)]
        if own and not name.startswith(inside) and set(own) == {(width,)}:
            found.append(name)
    return found


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: tuple(one.shape) for name, one in named}


def _made(
    model: Any, groups: tuple[Group, ...], width: int, left: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters that are made anew, by name."""
    made: dict[str, tuple[int, ...]] = {}
    for place, group in enumerate(groups):
        layer, is_last = group.name.rpartition(".")[0], place + 1 == len(groups)
        made[f"{layer}.{_WORDS[place % 2]}_shortcut_Q"] = (left, width if is_last else left)
        made[f"{group.name}.weight"] = (left,)
        for member in group.members:
            made[f"{member.linear.name}.weight"] = (member.linear.weight.shape[0], left)
        if is_last:
            # It writes to the whole stream, as before.
            continue
        writer = writer_of(model, group)
        made[f"{writer.name}.weight"] = (left, writer.weight.shape[1])
        if writer.bias is not None:
            made[f"{writer.name}.bias"] = (left,)
    embeddings = model.get_input_embeddings()
    (name,) = (name for name, module in model.named_modules() if module is embeddings)
    made[f"{name}.weight"] = (embeddings.weight.shape[0], left)
    return made


def as_rotated(layer: nn.Module, state: Tensor, named: Mapping[str, Any]) -> Tensor:
    """What a layer makes of hidden states as one that is turned, while no direction is another."""
    width = state.shape[-1]
    with ExitStack() as undo:
        same = nn.Parameter(torch.eye(width).to(state), requires_grad=False)
        rotate_layer(layer, same, same, undo)
        return hidden_of(layer.forward(state, **named))
