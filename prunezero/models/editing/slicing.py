"""Units that go leave for good: smaller tensors, and a configuration that knows of them.

A model is sliced within a context, so that what is saved and measured is the smaller model, while
everything before it works on tensors of full size. What the configuration then says is found in
`widths.py`; a part of a layer that goes, or loses all of its units, is skipped, and whole layers
leave as `shortening.py` says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.block_probe import PROBE_TOKENS, logits_of, relative_change
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import Linear, block_prefix
from prunezero.models.editing.edit import Edit
from prunezero.models.editing.narrowing import is_of_stream, narrowing_of
from prunezero.models.editing.permuting import ROUNDING, ROUNDING_OF_LOGITS
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.shortening import Shortening, is_of_layers, shorten, shortening_of
from prunezero.models.editing.skipping import (
    fault_of_skipping,
    gone_of,
    is_of_sub_blocks,
    known_part,
    stand_in_of,
    stand_ins_of,
)
from prunezero.models.editing.widths import (
    Cut,
    Heads,
    fault_of,
    heads_of,
    known_settings,
    layer_index,
    setting_of_all,
    settings_of_layers,
)
from prunezero.models.editing.zeroing import zeroed
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.unequal.families import layer_settings, parts_of
from prunezero.models.unequal.layers import SkippedAttn, SkippedMLP


@dataclass(frozen=True)
class Slices:
    """How a model becomes smaller."""

    cuts: Mapping[str, Cut]
    """what stays of each parameter that loses something, by name"""
    setting: Mapping[str, Any]
    """what its configuration says of it, where layers are alike"""
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """what it says of single layers, as `per_layer_config` has it, where they are not"""
    heads: Mapping[int, Heads] = field(default_factory=dict)
    """of each layer whose attention loses some"""
    skipped: Mapping[str, nn.Module] = field(default_factory=dict)
    """what stands in the place of modules that go as a whole, by name"""
    shortening: Shortening | None = None
    """how it loses whole layers"""
    numbers: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    """plain numbers that modules keep and that follow from its width, by module and key"""
    own: Mapping[str, Any] = field(default_factory=dict)
    """what its configuration says where only a class of its own takes it"""
    fault: str = ""
    """why no configuration says so; such a model runs in memory, but cannot be saved"""

    def refuse_faults(self) -> None:
        """Refuse what could not be saved.

        Raises:
            ModelError: no configuration of the model has such widths, or lacks such parts.
        """
        if self.fault:
            raise ModelError(self.fault)

    def name_now(self, name: str) -> str | None:
        """The name of a parameter in the smaller model by the one before; None where it goes."""
        if any(name.startswith(f"{module}.") for module in self.skipped):
            return None
        return name if self.shortening is None else self.shortening.name_now(name)

    @property
    def needs_own_class(self) -> bool:
        """Whether it is saved with a class of its own."""
        return bool(self.layers or self.own)

    @property
    def head_size(self) -> int | None:
        """Numbers of one head, where their count says it no longer."""
        return next((one.size for one in self.heads.values()), None)


def cuts_of(selection: Selection) -> dict[str, Cut]:
    """What stays of each parameter that loses something, by its name in the model."""
    stays: dict[tuple[str, int], Tensor] = {}
    modules: dict[str, Linear] = {}
    for group, kept in selection:
        for member in group.members:
            name, axis = member.linear.name, member.axis
            modules[name] = member.linear
            rows = member.kept_rows(kept)
            stays[name, axis] = stays[name, axis] & rows if (name, axis) in stays else rows
    cuts = {}
    for (name, axis), rows in stays.items():
        linear, places = modules[name], rows.nonzero().flatten()
        if len(places) == len(rows):
            continue
        is_transposed = not isinstance(linear.module, nn.Linear)
        cuts[f"{name}.weight"] = Cut(1 - axis if is_transposed else axis, places)
        if axis == 0 and linear.bias is not None:
            cuts[f"{name}.bias"] = Cut(0, places)
    for group, kept in selection:
        places = kept.cpu().nonzero().flatten()
        if len(places) < group.units:
            cuts |= {part.name: Cut(part.axis, places) for part in group.parts}
    return cuts


def slices_of(language_model: LanguageModel, selection: Selection) -> Slices:
    """How a model becomes smaller by a selection.

    Raises:
        ModelError: what loses all of its units cannot be left out, or no configuration has so few
            layers.
    """
    model = language_model.model
    if is_of_layers(selection):
        shorter = shortening_of(model, selection)
        return Slices({}, shorter.setting, shortening=shorter)
    if is_of_sub_blocks(selection):
        return _without_sub_blocks(language_model, selection)
    if is_of_stream(selection):
        cuts = cuts_of(selection)
        plan = narrowing_of(model, cuts)
        return Slices(cuts, plan.setting, fault=plan.fault, numbers=plan.numbers, own=plan.own)
    parts = _emptied(model, selection)
    skipped = {name: _stand_in(model, name, part) for name, part in parts.items()}
    shared = Slices({}, {}, skipped=skipped)
    cuts = {name: cut for name, cut in cuts_of(selection).items() if shared.name_now(name)}
    heads = heads_of(model, selection, cuts)
    alike = None if skipped else setting_of_all(model, cuts, heads)
    if alike is not None:
        return Slices(cuts, alike, heads=heads)
    layers = settings_of_layers(model, cuts, heads)
    if layers is None:
        return Slices(cuts, {}, heads=heads, skipped=skipped, fault=fault_of(model, cuts))
    _note_skipped(layers, parts, block_prefix(model))
    return Slices(cuts, {}, layers, heads, skipped)


def _without_sub_blocks(language_model: LanguageModel, selection: Selection) -> Slices:
    """How a model loses attentions and MLPs.

    Raises:
        ModelError: as `find_sub_blocks`.
    """
    model, gone = language_model.model, gone_of(language_model, selection)
    parts = {one.module: part for one in gone if (part := known_part(model, one))}
    if len(parts) < len(gone):
        return Slices({}, {}, skipped=stand_ins_of(model, gone), fault=fault_of_skipping(model))
    layers: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    _note_skipped(layers, parts, block_prefix(model))
    # Norms that nobody reads then stay where they are, since the class of its own has them.
    skipped = {one.module: stand_in_of(model, one) for one in gone}
    return Slices({}, {}, layers, skipped=skipped)


def _note_skipped(
    layers: defaultdict[int, dict[str, Any]], parts: Mapping[str, str], prefix: str
) -> None:
    """Say in the settings of single layers which of their parts go as a whole."""
    for name, part in parts.items():
        own = layers[layer_index(prefix, name)]
        own["skip"] = sorted({*own.get("skip", ()), part})


def _stand_in(model: Any, name: str, part: str) -> nn.Module:
    kind = SkippedAttn if part == "attention" else SkippedMLP
    return kind(layer_index(block_prefix(model), name), model.get_submodule(name))


@contextmanager
def sliced(language_model: LanguageModel, selection: Selection) -> Iterator[Slices]:
    """Within it the model is really smaller; leaving it undoes that.

    Its configuration says so too, unless layers differ, which no configuration in memory says.

    Raises:
        ModelError: as `slices_of`.
    """
    slices = slices_of(language_model, selection)
    with applied(language_model, slices):
        yield slices


@contextmanager
def applied(language_model: LanguageModel, slices: Slices) -> Iterator[None]:
    """Within it the model is smaller as is known already; see `sliced`."""
    with ExitStack() as undo:
        _slice(language_model.model, slices, undo)
        yield


def remove(language_model: LanguageModel, selection: Selection) -> None:
    """Make the model smaller for good.

    Raises:
        ModelError: as `slices_of`, or no one configuration has such widths.
    """
    slices = slices_of(language_model, selection)
    slices.refuse_faults()
    if slices.needs_own_class:
        raise ModelError(fault_of(language_model.model, slices.cuts))
    _slice(language_model.model, slices, ExitStack())


def _slice(model: Any, slices: Slices, undo: ExitStack) -> None:
    # A tensor that two modules share stays one.
    smaller: dict[int, nn.Parameter] = {}
    for name, cut in slices.cuts.items():
        before = model.get_parameter(name)
        undo.callback(_put, model, name, before)
        if id(before) not in smaller:
            part = cut.of(before.detach())
            smaller[id(before)] = nn.Parameter(part, requires_grad=False)
        _put(model, name, smaller[id(before)])
    for (path, key), value in slices.numbers.items():
        _set_number(model.get_submodule(path), key, value, undo)
    for index, heads in slices.heads.items():
        settings = layer_settings(model.config, index)
        for key, value in known_settings(settings, heads.settings).items():
            setattr(settings, key, value)
        _set_counts(model.get_submodule(heads.name), heads, settings, undo)
    for name, stand_in in slices.skipped.items():
        path, _, child = name.rpartition(".")
        _set(model.get_submodule(path), child, stand_in, undo)
    if slices.shortening is not None:
        shorten(model, slices.shortening, undo)
    for key, value in slices.setting.items():
        _set(model.config.get_text_config(), key, value, undo)


def _set(owner: Any, key: str, value: Any, undo: ExitStack) -> None:
    if hasattr(owner, key):
        undo.callback(setattr, owner, key, getattr(owner, key))
    else:
        # None in the place of nothing would be another setting.
        undo.callback(delattr, owner, key)
    setattr(owner, key, value)


def _set_number(module: nn.Module, key: str, value: Any, undo: ExitStack) -> None:
    """Let a module keep another number, and the buffers that hold it too."""
    before = getattr(module, key)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.dim() == 0 and torch.equal(buffer, torch.tensor(before).to(buffer)):
            _set(module, name, torch.tensor(value).to(buffer), undo)
    _set(module, key, value, undo)


def _set_counts(module: nn.Module, heads: Heads, settings: Any, undo: ExitStack) -> None:
    """Let an attention know how many heads it has, under whatever names it keeps that."""
    counts = {
        "num_heads": heads.queries,
        "num_attention_heads": heads.queries,
        "num_key_value_heads": heads.keys,
        "num_key_value_groups": heads.queries // heads.keys,
        # GPT-2 calls the width of its queries so.
        "split_size": heads.queries * heads.size,
        "config": settings,
    }
    for key, value in counts.items():
        if key in vars(module):
            _set(module, key, value, undo)


def _emptied(model: Any, selection: Selection) -> dict[str, str]:
    """Modules of layers that lose all of their units, by name: attention or mlp.

    Raises:
        ModelError: what loses all is no module of its own, or a bias would be lost with it.
    """
    parts, prefix = parts_of(model.config.model_type), block_prefix(model)
    words = {parts.attention: "attention", parts.mlp: "mlp"}
    found: dict[str, str] = {}
    for group, kept in selection:
        if not group.has_rows or bool(kept.any()):
            continue
        for member in group.members:
            child = member.linear.name.removeprefix(f"{prefix}.").split(".")[1]
            if child not in words or _holds_others(member.linear, selection, f"{prefix}."):
                raise ModelError(
                    f"no unit of {group.name} would stay, and in {type(model).__name__} it is no "
                    "part that can be left out; keep one unit of it"
                )
            bias = member.linear.bias
            if member.role == "consumer" and bias is not None and bool(bias.any()):
                raise ModelError(
                    f"no unit of {group.name} would stay, but '{member.linear.name}' has a bias "
                    "that would be lost with it; keep one unit of it"
                )
            found[f"{prefix}.{group.block}.{child}"] = words[child]
    return found


def _holds_others(linear: Linear, selection: Selection, prefix: str) -> bool:
    """Whether its part of a layer holds units that stay."""
    part = ".".join(linear.name.removeprefix(prefix).split(".")[:2])
    return any(
        bool(kept.any()) and member.linear.name.startswith(f"{prefix}{part}.")
        for group, kept in selection
        for member in group.members
    )


SMALLER = Edit(zeroed, remove)


@contextmanager
def _narrowed(language_model: LanguageModel, selection: Selection) -> Iterator[None]:
    with sliced(language_model, selection):
        yield


# A norm divides by the width, which zeros do not change, so nothing but the smaller model computes
# what the smaller model does.
NARROWER = Edit(_narrowed, remove, zeros_suffice=False)


def width_setting(
    language_model: LanguageModel, groups: Sequence[Group], counts: Mapping[str, int]
) -> Slices:
    """How so many units of each group stay, and what the configuration says of that.

    That the model then computes what it does with zeros is tried on the first units.

    Args:
        counts: units that stay, by the name of the group.

    Raises:
        ModelError: no configuration has such widths, or the model computes otherwise.
    """
    kept = tuple(first_units(group, counts[group.name]).to(group.device) for group in groups)
    selection = Selection(tuple(groups), kept)
    slices = slices_of(language_model, selection)
    slices.refuse_faults()
    ids = torch.arange(PROBE_TOKENS, device=language_model.device)[None]
    with zeroed(language_model, selection):
        refuse_other_logits(language_model, selection, ids)
    return slices


def first_units(group: Group, count: int) -> Tensor:
    """Which units stay, bool [units]: the first so many, as many of each stratum."""
    return (torch.arange(group.units) % (group.units // group.strata)) < count // group.strata


def refuse_other_logits(language_model: LanguageModel, selection: Selection, ids: Tensor) -> None:
    """Refuse a model that computes otherwise without some units than with zeros in their place.

    Of channels of the stream no zeros can stand for the smaller model; that one has to run.

    Args:
        language_model: with zeros in the place of the units that go.
        ids: token ids [1, length] to compute.

    Raises:
        ModelError: it does, or as `slices_of`.
    """
    before = logits_of(language_model, ids).double()
    with sliced(language_model, selection):
        after = logits_of(language_model, ids).double()
    if is_of_stream(selection):
        return
    change = relative_change(after, before)
    if not change <= ROUNDING_OF_LOGITS.get(language_model.dtype, ROUNDING):
        raise ModelError(
            f"without the units that go {type(language_model.model).__name__} computes something "
            f"else than with zeros in their place (logits differ by {change:.2g} of their norm); "
            "this layout cannot be made smaller, keep its tensors at full size"
        )


def _put(model: nn.Module, name: str, values: Tensor) -> None:
    """Exchange a parameter of a module, and let it know its own size."""
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    is_parameter = isinstance(values, nn.Parameter)
    setattr(module, kind, values if is_parameter else nn.Parameter(values, requires_grad=False))
    if kind != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = values.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = values.shape[1]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(values.shape)
    elif values.dim() == 2:
        # transformers' Conv1D, whose weight is [in, out].
        for size, value in zip(("nx", "nf"), values.shape, strict=True):
            setattr(module, size, value)
