"""Sub-blocks that go: modules that compute nothing and hold no parameters stand in their place.

They add nothing to the residual stream, so zeros in their weights, stand-ins in their places and a
model without the block give the same logits. A cache of keys and values is still told how many
tokens there were, because models count them by its first layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from prunezero.models.anatomy.linears import block_prefix
from prunezero.models.anatomy.sub_blocks import SubBlock, sub_blocks_of
from prunezero.models.editing.edit import Edit
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.zeroing import zeroed
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.unequal.families import parts_of
from prunezero.models.unequal.layers import SkippedAttn, SkippedMLP


@contextmanager
def skipped(language_model: LanguageModel, sub_blocks: Sequence[SubBlock]) -> Iterator[None]:
    """Within it the model computes without these sub-blocks; their modules come back afterwards."""
    model = language_model.model
    stand_ins = stand_ins_of(model, sub_blocks)
    before = {path: model.get_submodule(path) for path in stand_ins}
    try:
        _put(model, stand_ins)
        yield
    finally:
        _put(model, before)


def remove(language_model: LanguageModel, selection: Selection) -> None:
    """Take sub-blocks out of a model for good: their parameters leave memory.

    Raises:
        ModelError: as `find_sub_blocks`.
    """
    model = language_model.model
    _put(model, stand_ins_of(model, gone_of(language_model, selection)))


def gone_of(language_model: LanguageModel, selection: Selection) -> list[SubBlock]:
    """The sub-blocks that a selection takes away."""
    return sub_blocks_of(language_model, [group for group, kept in selection if not kept.all()])


WITHOUT = Edit(zeroed, remove)


def is_of_sub_blocks(selection: Selection) -> bool:
    """Whether all units of a selection are attentions and MLPs as a whole."""
    kinds = {group.kind for group in selection.groups}
    return bool(kinds) and kinds <= {"attention", "mlp", "block"}


def stand_ins_of(model: Any, sub_blocks: Sequence[SubBlock]) -> dict[str, nn.Module]:
    """What takes the place of each module that holds nothing but parameters of the sub-blocks."""
    stand_ins: dict[str, nn.Module] = {}
    for one in sub_blocks:
        # Norms before it, whose output nobody needs, and behind it, which would see zeros.
        stand_ins |= {path: nn.Identity() for path in one.modules}
        stand_ins[one.module] = stand_in_of(model, one)
    return stand_ins


def stand_in_of(model: Any, one: SubBlock) -> nn.Module:
    """What takes the place of the module of a sub-block, and adds nothing to the stream."""
    kind = SkippedAttn if one.kind == "attention" else SkippedMLP
    module = model.get_submodule(one.module)
    return kind(one.block, module, is_tuple=one.is_tuple, hands_on=one.hands_on)


def known_part(model: Any, one: SubBlock) -> str:
    """What the class of a model whose layers differ calls a sub-block; empty where it cannot.

    Such a class takes out modules of a usual name that add nothing to the stream themselves.
    """
    parts = parts_of(model.config.model_type)
    child = parts.attention if one.kind == "attention" else parts.mlp
    is_named = one.module == f"{block_prefix(model)}.{one.block}.{child}"
    is_usual = one.is_tuple == (one.kind == "attention") and one.hands_on is None
    is_whole = model.config.get_text_config() is model.config
    return one.kind if is_named and is_usual and is_whole else ""


def fault_of_skipping(model: Any) -> str:
    """Why a model without some sub-blocks cannot be saved, in a sentence."""
    return (
        f"no configuration of {model.config.model_type} says which blocks lack an attention or an "
        f"MLP, and no class of its own can take them out of {type(model).__name__}; save zeros in "
        "their place at full size (--padded), or remove whole layers (unit: layer)"
    )


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = module
