"""Which settings of a configuration stand for the sizes that are left of its layers?

They are found by trying: an empty model that is built with them must have just the shapes wanted,
or an empty layer, where each has its own.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.models.anatomy.linears import block_prefix, find_blocks
from prunezero.models.editing.selection import Selection
from prunezero.models.unequal.families import layer_settings

# Settings without a value, which then follow from others, whose names hold one of these words.
_OF_WIDTH = ("inner", "intermediate", "ffn")


@dataclass(frozen=True)
class Cut:
    """What stays of one parameter of a model."""

    axis: int
    """of the parameter as its module holds it"""
    kept: Tensor
    """int64, places along that axis, in their order"""
    then: Cut | None = None
    """what stays of that along another axis"""

    def of(self, values: Tensor) -> Tensor:
        """The part that stays of values in the parameter's place."""
        part = values.index_select(self.axis, self.kept.to(values.device)).contiguous()
        return part if self.then is None else self.then.of(part)


@dataclass(frozen=True)
class Heads:
    """How many heads an attention has."""

    name: str
    """of its module"""
    queries: int
    keys: int
    """heads of keys and values"""
    size: int
    """numbers of one head"""

    @property
    def settings(self) -> dict[str, int]:
        """What a configuration says of them."""
        return {"num_attention_heads": self.queries, "num_key_value_heads": self.keys}


def setting_of_all(
    model: Any,
    cuts: Mapping[str, Cut],
    heads: Mapping[int, Heads],
    fixed: Mapping[str, int] | None = None,
    *,
    gone: Callable[[str], bool] | None = None,
) -> dict[str, int] | None:
    """The settings under which all layers are as wanted; None where there are none.

    Args:
        fixed: settings that hold in any case.
        gone: whether a parameter of that name leaves as a whole, however large it is.
    """
    if not cuts:
        return {}
    if not _are_alike(model, cuts):
        return None
    shapes, wanted = _shapes(model), _wanted(_shapes(model), cuts)
    left = [name for name in wanted if gone is None or not gone(name)]
    alike = {tuple(one.settings.items()) for one in heads.values()}
    if len(alike) > 1:
        return None
    counts = known_settings(model.config.get_text_config(), dict(*alike))
    if counts:
        counts["head_dim"] = next(iter(heads.values())).size
    counts |= fixed or {}
    narrower = _outside(cuts, heads)
    for change in _candidates(model.config, shapes, narrower):
        found = _shapes_with(model, counts | change)
        if found.keys() == wanted.keys() and all(found[name] == wanted[name] for name in left):
            return counts | change
    return None


def heads_of(model: Any, selection: Selection, cuts: Mapping[str, Cut]) -> dict[int, Heads]:
    """The heads that stay in each layer whose attention loses some."""
    found = {}
    for group, kept in selection:
        consumers = [one for one in group.members if one.role == "consumer"]
        is_cut = any(f"{one.linear.name}.weight" in cuts for one in consumers)
        if group.kind not in ("kv_group", "head") or not is_cut:
            continue
        name = consumers[0].linear.name.rpartition(".")[0]
        size = head_size(model, name)
        stays = int(kept.sum())
        queries = stays * consumers[0].width // size
        keys = stays if group.kind == "kv_group" else group.strata
        found[group.block] = Heads(name, queries, keys, size)
    return found


def head_size(model: Any, name: str) -> int:
    """Numbers of one head of the named attention."""
    module, settings = model.get_submodule(name), model.config.get_text_config()
    for key in ("head_dim", "head_size"):
        if isinstance(getattr(module, key, None), int):
            return getattr(module, key)
    return settings.hidden_size // settings.num_attention_heads


def _are_alike(model: Any, cuts: Mapping[str, Cut]) -> bool:
    """Whether the same parameter of each layer keeps the same size, where it loses something."""
    prefix, sizes = block_prefix(model), defaultdict[str, set[int]](set)
    for name, cut in cuts.items():
        sizes[name.removeprefix(f"{prefix}.").partition(".")[2]].add(len(cut.kept))
    return all(len(found) == 1 for found in sizes.values())


def settings_of_layers(
    model: Any, cuts: Mapping[str, Cut], heads: Mapping[int, Heads]
) -> defaultdict[int, dict[str, Any]] | None:
    """The settings of each layer that loses something; None where layers cannot have their own."""
    prefix, found = block_prefix(model), defaultdict[int, dict[str, Any]](dict)
    by_layer: dict[int, dict[str, Cut]] = defaultdict(dict)
    for name, cut in cuts.items():
        by_layer[layer_index(prefix, name)][name] = cut
    for index, own in sorted(by_layer.items()):
        layer = find_blocks(model)[index]
        shapes = _shapes(layer, f"{prefix}.{index}.")
        wanted = _wanted(shapes, own)
        settings = layer_settings(model.config, index)
        here = {key: one for key, one in heads.items() if key == index}
        counts = known_settings(settings, here[index].settings) if here else {}
        base = counts | ({"head_dim": here[index].size} if here else {})
        changes = _candidates(settings, shapes, _outside(own, here))
        change = next(
            (
                one
                for one in changes
                if _layer_shapes(layer, settings, index, base | one, prefix) == wanted
            ),
            None,
        )
        if change is None or model.config.get_text_config() is not model.config:
            return None
        found[index] = counts | change
    return found


def fault_of(model: Any, cuts: Mapping[str, Cut]) -> str:
    """Why a model with such cuts cannot be saved, in a sentence."""
    widths = sorted({len(cut.kept) for cut in cuts.values()})
    return (
        f"no configuration of {model.config.model_type} gives its layers the widths "
        f"{', '.join(map(str, widths[:4]))}{' ...' if len(widths) > 4 else ''} that are left; keep "
        "tensors at full size, with zeros (--padded), or choose another unit"
    )


def layer_index(prefix: str, name: str) -> int:
    """Which layer a parameter or module belongs to."""
    return int(name.removeprefix(f"{prefix}.").partition(".")[0])


def known_settings(configuration: Any, settings: Mapping[str, int]) -> dict[str, int]:
    """Those of some settings that a configuration has."""
    return {key: value for key, value in settings.items() if hasattr(configuration, key)}


def _shapes(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    named = module.named_parameters(remove_duplicate=False)
    return {f"{prefix}{name}": tuple(one.shape) for name, one in named}


def _wanted(
    shapes: Mapping[str, tuple[int, ...]], cuts: Mapping[str, Cut]
) -> dict[str, tuple[int, ...]]:
    wanted = dict(shapes)
    for name, cut in cuts.items():
        shape = list(wanted[name])
        shape[cut.axis] = len(cut.kept)
        wanted[name] = tuple(shape)
    return wanted


def _outside(cuts: Mapping[str, Cut], heads: Mapping[int, Heads]) -> dict[str, Cut]:
    """The cuts of what is no part of an attention."""
    inside = tuple(f"{one.name}." for one in heads.values())
    return {name: cut for name, cut in cuts.items() if not name.startswith(inside)}


def _candidates(
    configuration: Any, shapes: Mapping[str, tuple[int, ...]], cuts: Mapping[str, Cut]
) -> Iterator[dict[str, int]]:
    """Settings that may stand for the width, each with the value that it would need."""
    if not cuts:
        yield {}
        return
    settings = configuration.get_text_config().to_dict()
    kept = {(shapes[name][cut.axis], len(cut.kept)) for name, cut in cuts.items()}
    for before, after in sorted(kept):
        for key, value in settings.items():
            if isinstance(value, int) and not isinstance(value, bool) and value == before:
                yield {key: after}
    for _, after in sorted(kept):
        for key, value in settings.items():
            if value is None and any(word in key for word in _OF_WIDTH):
                yield {key: after}


def _shapes_with(model: Any, changes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of an empty model's parameters under other settings; none where that is no model."""
    empty = empty_model(model, changes)
    return {} if empty is None else _shapes(empty)


def empty_model(model: Any, changes: Mapping[str, int]) -> nn.Module | None:
    """A model without numbers under other settings; None where they exclude each other."""
    configuration = copy.deepcopy(model.config)
    try:
        for key, value in changes.items():
            setattr(configuration.get_text_config(), key, value)
        # A file with such settings would be read like this.
        configuration = type(configuration).from_dict(configuration.to_dict())
        with torch.device("meta"):
            empty: nn.Module = type(model)(configuration)
            return empty
    # Whatever a model says to settings that exclude each other.
    except Exception:
        return None


def _layer_shapes(
    layer: nn.Module, configuration: Any, index: int, changes: Mapping[str, int], prefix: str
) -> dict[str, tuple[int, ...]]:
    """Shapes of an empty layer's parameters under settings of its own; none where that is none."""
    settings = copy.deepcopy(configuration)
    build: Any = type(layer)
    try:
        for key, value in changes.items():
            setattr(settings, key, value)
        with torch.device("meta"):
            return _shapes(build(settings, index), f"{prefix}.{index}.")
    # Whatever a layer says to settings that exclude each other.
    except Exception:
        return {}
