"""May each attention and MLP of a model read the residual stream in a basis of its own?

A stream may be turned where nothing but an RMSNorm and matrices read it and nothing but matrices
write to it. That channels of the stream are no more than that is proved by
`prunezero/models/anatomy/stream.py`; here, that each norm is an RMSNorm, that embeddings begin the
stream by a row of one table, and that a layer is an attention and then an MLP, each behind a norm
and added to what was before it: the layer of a turned model computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.block_probe import logits_of, probe_ids, relative_change
from prunezero.models.anatomy.groups import Group, Member
from prunezero.models.anatomy.linears import Linear, block_prefix, find_blocks
from prunezero.models.anatomy.norms import rms_norm
from prunezero.models.anatomy.stream import channel_groups
from prunezero.models.editing.permuting import ROUNDING, ROUNDING_OF_LOGITS
from prunezero.models.editing.rotating import as_rotated, final_norms, scale_of, writer_of
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.hooks import removing
from prunezero.models.observing.walk import hidden_of, split_call
from prunezero.models.unequal.families import is_own_type

# What a layer has that can be turned: a norm and what reads the stream behind it, twice.
PLACES = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))


def direction_groups(linears: Sequence[Linear], language_model: LanguageModel) -> list[Group]:
    """The directions of the stream in front of each attention and MLP, in its order.

    Which directions they are is not known before calibration text was seen: `Group.basis` is None.

    Raises:
        ModelError: as `channel_groups`; or the stream cannot be turned in front of each.
    """
    model = language_model.model
    _refuse_other_parts(language_model)
    (stream,) = channel_groups(linears, language_model)
    groups = []
    for index in range(len(find_blocks(model))):
        for norm, part in PLACES:
            inside = f"{block_prefix(model)}.{index}."
            here = [one for one in stream.members if one.linear.name.startswith(f"{inside}{part}.")]
            readers = tuple(one for one in here if one.role == "consumer")
            groups.append(_group(model, f"{inside}{norm}", index, readers))
    known = sum(len(one.members) for one in groups)
    if known != sum(one.role == "consumer" for one in stream.members):
        raise _unsupported(language_model, "reads its stream by other matrices too")
    _refuse_other_layers(language_model)
    return groups


def _group(model: Any, name: str, block: int, readers: tuple[Member, ...]) -> Group:
    width = model.config.hidden_size
    found = Group(name, block, "direction", (width,), readers, least=1)
    writer = writer_of(model, found)
    weights = sum(member.rest for member in readers) + writer.weight.shape[1]
    parameters = weights + (writer.bias is not None)
    cost = {"weights": weights, "parameters": parameters, "flops": 2 * weights}
    return Group(
        name,
        block,
        "direction",
        (width,),
        readers,
        {measure: float(amount) for measure, amount in cost.items()},
        least=1,
    )


def _refuse_other_parts(language_model: LanguageModel) -> None:
    """Refuse a model whose layers or norms are others by what they are called and hold.

    Raises:
        ModelError: they are.
    """
    model = language_model.model
    if is_own_type(model.config.model_type) or model.config.get_text_config() is not model.config:
        raise _unsupported(
            language_model, "has layers of different sizes, or is part of a larger model"
        )
    last, blocks, prefix = final_norms(model), find_blocks(model), block_prefix(model)
    if len(last) != 1:
        raise _unsupported(language_model, "has no single norm before its output head")
    places = [f"{prefix}.{index}.{norm}" for index in range(len(blocks)) for norm, _ in PLACES]
    known = sorted(word for place in PLACES for word in place)
    are_alike = all(sorted(_parts_of(layer)) == known for layer in blocks)
    for name in [*last, *(places if are_alike else ())]:
        module = model.get_submodule(name)
        if rms_norm(module) is None:
            kind = type(module).__name__
            raise _unsupported(language_model, f"has '{name}', which is a {kind} and no RMSNorm")
    if not are_alike:
        raise _unsupported(
            language_model,
            "has layers that are not one attention and one MLP with one norm before each",
        )


def _parts_of(layer: nn.Module) -> list[str]:
    """What a layer calls its parts that have parameters."""
    return [
        name for name, one in layer.named_children() if next(one.parameters(), None) is not None
    ]


def _refuse_other_layers(language_model: LanguageModel) -> None:
    """Refuse a model that computes something else once its layers are those of a turned one.

    Raises:
        ModelError: it does, or its stream does not begin with rows of the table of embeddings.
    """
    model = language_model.model
    blocks, embeddings = find_blocks(model), model.get_input_embeddings()
    began: list[Tensor] = []
    changes: list[float] = []

    def begin(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        began.append(args[0])

    def before(block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows = embeddings.weight[began[0]]
        state, _, _ = split_call(args, named)
        changes.append(relative_change(state, rows * scale))

    def behind(block: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        state, rest, named = split_call(args, named)
        if rest or not isinstance(output, Tensor):
            changes.append(1.0)
            return
        changes.append(relative_change(as_rotated(block, state, named), hidden_of(output)))

    scale = scale_of(embeddings)
    handles = [embeddings.register_forward_hook(begin)]
    handles.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
    handles += [block.register_forward_hook(behind, with_kwargs=True) for block in blocks]
    ids = probe_ids(language_model, torch.Generator().manual_seed(0))
    with removing(handles), torch.no_grad():
        logits_of(language_model, ids)
    rounding = ROUNDING_OF_LOGITS.get(language_model.dtype, ROUNDING)
    if not max(changes) <= rounding:
        raise _unsupported(
            language_model,
            "computes something else than embeddings and attentions and MLPs behind norms, one "
            "after another",
        )


def _unsupported(language_model: LanguageModel, what: str) -> ModelError:
    return ModelError(
        f"{type(language_model.model).__name__} {what}, so its residual stream cannot be turned "
        "(unit: direction); this layout is not supported"
    )
