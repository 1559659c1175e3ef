"""What does a model say of itself once channels of its residual stream are gone?

A configuration may call the stream's width by one setting; heads keep their size, which is then
said as well. Numbers that modules derive from the width, such as the scale of Gemma's embeddings,
become those of a model of the smaller width: what a reader of the saved folder builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunezero.models.anatomy.linears import block_prefix
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.widths import Cut, Heads, empty_model, head_size, setting_of_all
from prunezero.models.unequal.families import PREFIX, is_own_type, parts_of, register

# Plain numbers of modules that say nothing of a width.
_OTHERS = ("training", "layer_idx")


@dataclass(frozen=True)
class Narrowing:
    """How a model says that its stream is narrower."""

    setting: Mapping[str, int] = field(default_factory=dict)
    """of its configuration"""
    own: Mapping[str, int] = field(default_factory=dict)
    """the same, where only a class of its own takes it"""
    numbers: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    """plain numbers of modules that change with it, by module and key"""
    fault: str = ""
    """why no configuration says so"""


def is_of_stream(selection: Selection) -> bool:
    """Whether the units of a selection are channels of the residual stream."""
    return any(group.parts and group.mixture is None for group in selection.groups)


def narrowing_of(
    model: Any, cuts: Mapping[str, Cut], told: Mapping[str, int] | None = None
) -> Narrowing:
    """How a model says what some cuts leave of its stream.

    Args:
        told: settings of what it lost before, which its own configuration refuses.
    """
    if not cuts:
        return Narrowing()
    attention = _attention(model)
    fixed = {"head_dim": head_size(model, attention)} if attention else {}
    fixed |= told or {}
    setting = setting_of_all(model, cuts, {}, fixed)
    if setting is not None:
        return Narrowing(setting, numbers=numbers_of(model, empty_model(model, setting)))
    twin = own_twin(model, told or {})
    own = None if twin is None else setting_of_all(twin, cuts, {}, fixed)
    if own is not None:
        return Narrowing(own=own, numbers=numbers_of(model, empty_model(twin, own)))
    width = len(next(iter(cuts.values())).kept)
    return Narrowing(
        fault=f"no configuration of {model.config.model_type} has {width} channels of the residual "
        "stream beside heads of the size that they have; such a model runs in memory, but cannot "
        "be saved, so leave --output out, or choose another unit"
    )


def own_setting_of_all(
    model: Any, cuts: Mapping[str, Cut], heads: Mapping[int, Heads]
) -> dict[str, int] | None:
    """The settings of a class of its own under which all layers are as wanted; None if none are."""
    twin = own_twin(model, {})
    return None if twin is None else setting_of_all(twin, cuts, heads)


def _attention(model: Any) -> str:
    """The name of the first module that knows the size of a head; empty where none does."""
    for name, module in model.named_modules():
        if any(isinstance(getattr(module, key, None), int) for key in ("head_dim", "head_size")):
            return str(name)
    return ""


def own_twin(model: Any, settings: Mapping[str, int]) -> Any:
    """An empty model of the class that takes any number of channels; None where there is none.

    Args:
        settings: other than those of the model.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = f"{PREFIX}{model.config.model_type}"
    if is_own_type(model.config.model_type) or model.config.get_text_config() is not model.config:
        return None
    register(kind)
    is_odd = block_prefix(model).rpartition(".")[2] != parts_of(kind).layer_list
    if is_odd or kind not in CONFIG_MAPPING:
        return None
    told = {**model.config.to_dict(), **settings, "model_type": kind}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind].from_dict(told))


def numbers_of(model: Any, empty: nn.Module | None) -> dict[tuple[str, str], Any]:
    """Plain numbers of modules, and shapes, that are others in the smaller model."""
    assert empty is not None  # its shapes were seen; for the type checker
    found = {}
    fresh = dict(empty.named_modules())
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            is_plain = isinstance(value, int | float | tuple) and not isinstance(value, bool)
            if not is_plain or key in _OTHERS or key.startswith("_"):
                continue
            now = vars(fresh[path]).get(key, value) if path in fresh else value
            if now != value:
                found[path, key] = now
    return found
