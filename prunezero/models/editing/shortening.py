"""Whole decoder blocks that go: a model with fewer layers, and a configuration that knows of them.

The blocks that stay get new numbers, by which caches and configurations know them; settings with
one entry for each layer lose those of the layers that go. That the shorter model is one that its
configuration would build is seen on an empty one: names, shapes and plain numbers of all modules
have to be the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.linears import block_prefix, find_blocks
from prunezero.models.editing.edit import Edit
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.zeroing import zeroed
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.unequal.settings import LayerSettings

# What a configuration calls the number of blocks, whatever its files do.
_COUNT = "num_hidden_layers"
# Plain numbers of modules that differ from run to run.
_OF_THE_RUN = ("training",)


@dataclass(frozen=True)
class Shortening:
    """How a model loses blocks."""

    kept: tuple[int, ...]
    """numbers of the blocks that stay"""
    prefix: str
    """the name of the list of blocks"""
    setting: dict[str, Any]
    """what its configuration says of it, in the spelling of its files"""
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """settings of single layers that stay, by their new numbers, where layers differ already"""

    def name_now(self, name: str) -> str | None:
        """The name of a tensor in the shorter model by the one before; None where it goes."""
        head, _, rest = name.removeprefix(f"{self.prefix}.").partition(".")
        if not name.startswith(f"{self.prefix}.") or not head.isdigit():
            return name
        if int(head) not in self.kept:
            return None
        return f"{self.prefix}.{self.kept.index(int(head))}.{rest}"


def is_of_layers(selection: Selection) -> bool:
    """Whether the units of a selection are whole decoder blocks."""
    return any(group.kind == "layer" for group in selection.groups)


def shorten(model: Any, plan: Shortening, undo: ExitStack) -> None:
    """Take blocks out of a model until `undo` is left; its configuration is not told."""
    before = find_blocks(model)
    undo.callback(_set_blocks, model, plan.prefix, before)
    _set_blocks(model, plan.prefix, [before[place] for place in plan.kept])


def remove(language_model: LanguageModel, selection: Selection) -> None:
    """Take blocks out of a model for good.

    Raises:
        ModelError: as `shortening_of`.
    """
    model = language_model.model
    plan = shortening_of(model, selection)
    shorten(model, plan, ExitStack())
    _tell(model.config, plan)


SHORTER = Edit(zeroed, remove)


def shortening_of(model: Any, selection: Selection) -> Shortening:
    """How the model loses the blocks that a selection takes away.

    Raises:
        ModelError: its configuration would build another model than that.
    """
    gone = {group.block for group, kept in selection if not kept.all()}
    blocks = find_blocks(model)
    kept = tuple(place for place in range(len(blocks)) if place not in gone)
    plan = Shortening(kept, block_prefix(model), _setting(model, kept), _layers(model, kept))
    if gone:
        _refuse_another_model(model, plan)
    return plan


def _setting(model: Any, kept: Sequence[int]) -> dict[str, Any]:
    """What the configuration says once some blocks are gone, by the keys of its files."""
    configuration = model.config.get_text_config()
    total = len(find_blocks(model))
    if len(kept) == total:
        return {}
    names = getattr(configuration, "attribute_map", {})
    setting: dict[str, Any] = {names.get(_COUNT, _COUNT): len(kept)}
    for key, value in configuration.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == total:
            setting[key] = [value[place] for place in kept]
    return setting


def _layers(model: Any, kept: Sequence[int]) -> dict[int, dict[str, Any]]:
    """What single layers that stay have of their own, by their new numbers."""
    configuration = model.config
    if not isinstance(configuration, LayerSettings):
        return {}
    own = {now: configuration.changes_of(place) for now, place in enumerate(kept)}
    return {now: changes for now, changes in own.items() if changes}


def _tell(configuration: Any, plan: Shortening) -> None:
    """Let a configuration say that so few layers are left."""
    for key, value in plan.setting.items():
        setattr(configuration.get_text_config(), key, value)
    if isinstance(configuration, LayerSettings):
        settings: Any = configuration
        settings.per_layer_config = dict(plan.layers) or None


def _set_blocks(model: Any, prefix: str, blocks: Sequence[nn.Module]) -> None:
    """Give a model these blocks, numbered in their order."""
    parent, _, name = prefix.rpartition(".")
    model.get_submodule(parent)._modules[name] = nn.ModuleList(blocks)
    for place, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]


def _refuse_another_model(model: Any, plan: Shortening) -> None:
    """Refuse a shortening after which a model loaded anew would compute something else."""
    configuration = copy.deepcopy(model.config)
    _tell(configuration, plan)
    name = type(model).__name__
    try:
        with torch.device("meta"):
            empty = type(model)(configuration)
        fresh = find_blocks(empty)
    # Whatever a model says to settings that exclude each other.
    except Exception as error:
        raise ModelError(
            f"no configuration of {name} has {len(plan.kept)} layers ({error}); save zeros in the "
            "place of the others at full size (--padded)"
        ) from error
    blocks = find_blocks(model)
    for place, block in enumerate(plan.kept):
        new = _described(fresh[place]) if place < len(fresh) else {}
        differing = sorted(_described(blocks[block]).items() ^ new.items(), key=str)
        if differing:
            raise ModelError(
                f"block {block} of {name} would compute something else as block {place} of a "
                f"model with {len(plan.kept)} layers ('{differing[0][0]}' depends on its place); "
                "save zeros in the place of what goes at full size (--padded)"
            )


def _described(block: nn.Module) -> dict[str, Any]:
    """Shapes and plain numbers of a block, but for its own place."""
    told: dict[str, Any] = {name: tuple(one.shape) for name, one in block.named_parameters()}
    for path, module in block.named_modules():
        for key, value in vars(module).items():
            is_plain = isinstance(value, bool | int | float | str)
            if is_plain and key not in (*_OF_THE_RUN, "layer_idx") and not key.startswith("_"):
                told[f"{path}.{key}".strip(".")] = value
    return told
