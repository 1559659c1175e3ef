"""How does a model become smaller by units that go: what is cut, skipped and renumbered?

A plan for units that leave in one way. What the configuration then says is found in `widths.py`; a
part of a layer that goes, or loses all of its units, is skipped, and whole layers leave as
`shortening.py` says. `slicing.py` puts plans together and carries them out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.linears import Linear, block_prefix
from prunezero.models.editing.narrowing import is_of_stream, narrowing_of
from prunezero.models.editing.rotating import Rotation, is_rotated, rotation_of
from prunezero.models.editing.routing import is_of_experts, numbers_without, skipping_of
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.shortening import Shortening, is_of_layers, shortening_of
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
    layer_index,
    setting_of_all,
    settings_of_layers,
)
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.unequal.families import parts_of
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
    rotation: Rotation | None = None
    """how its stream is read in other directions"""
    fault: str = ""
    """why no configuration says so; such a model runs in memory, but cannot be saved"""

    def then(self, other: Slices) -> Slices:
        """These, and then others that were planned on the model so sliced."""
        cuts = dict(self.cuts)
        for name, cut in other.cuts.items():
            cuts[name] = replace(cuts[name], then=cut) if name in cuts else cut
        layers = {index: dict(own) for index, own in self.layers.items()}
        for index, own in other.layers.items():
            before = layers.setdefault(index, {})
            skip = sorted({*before.get("skip", ()), *own.get("skip", ())})
            layers[index] = {**before, **own, **({"skip": skip} if skip else {})}
        both = Slices(
            cuts,
            {**self.setting, **other.setting},
            layers,
            {**self.heads, **other.heads},
            {**self.skipped, **other.skipped},
            other.shortening or self.shortening,
            {**self.numbers, **other.numbers},
            {**self.own, **other.own},
            fault=self.fault or other.fault,
        )
        left = {name: cut for name, cut in cuts.items() if both.name_now(name)}
        return replace(both, cuts=left)

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


def slices_of_one_way(
    language_model: LanguageModel, selection: Selection, around: Slices | None = None
) -> Slices:
    """How a model becomes smaller by units that leave in one way.

    Args:
        around: how it loses other units: whole parts, of which nothing has to be told then, or
            what its own configuration refuses to say of the channels beside.

    Raises:
        ModelError: as `slices_of`.
    """
    model = language_model.model
    if is_rotated(selection):
        turned = rotation_of(language_model, selection)
        return Slices({}, {}, own=turned.settings, rotation=turned, fault=turned.fault)
    if is_of_layers(selection):
        shorter = shortening_of(model, selection)
        return Slices({}, shorter.setting, shortening=shorter)
    if is_of_sub_blocks(selection):
        return _without_sub_blocks(language_model, selection)
    if is_of_experts(selection):
        return _without_experts(model, selection)
    if is_of_stream(selection):
        cuts = cuts_of(selection)
        plan = narrowing_of(model, cuts, None if around is None else around.own)
        return Slices(cuts, plan.setting, fault=plan.fault, numbers=plan.numbers, own=plan.own)
    parts = _emptied(model, selection)
    skipped = {name: _stand_in(model, name, part) for name, part in parts.items()}
    shared = Slices({}, {}, skipped=skipped)
    cuts = {name: cut for name, cut in cuts_of(selection).items() if shared.name_now(name)}
    heads = heads_of(model, selection, cuts)
    gone = None if around is None else lambda name: around.name_now(name) is None
    alike = None if skipped else setting_of_all(model, cuts, heads, gone=gone)
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


def _without_experts(model: Any, selection: Selection) -> Slices:
    """How a model loses experts, of which mixtures may keep different numbers and tokens skip some.

    Raises:
        ModelError: constants stand for experts that went, whose rows of the router stay.
    """
    if any(group.means is not None for group in selection.groups):
        raise ModelError(
            "experts that went answer their mean output here, which no smaller model of "
            f"{model.config.model_type} does; use instead: others of unit: expert"
        )
    cuts = cuts_of(selection)
    numbers = numbers_without(model, selection)
    learned = {name for name, _ in model.named_parameters()}
    shown = {name: cut for name, cut in cuts.items() if name in learned}
    setting = setting_of_all(model, shown, {})
    layers = None if setting is not None else settings_of_layers(model, shown, {})
    if setting is None and not layers:
        counts = sorted({int(kept.sum()) for _, kept in selection})
        fault = (
            f"no configuration of {model.config.model_type} gives its mixtures "
            f"{' or '.join(map(str, counts))} experts; let the experts of each mixture compete "
            "(compare: group), and protect none of them, so that all keep as many"
        )
        return Slices(cuts, {}, fault=fault, numbers=numbers)
    own: dict[int, dict[str, Any]] = dict(layers or {})
    skipping = skipping_of(model, selection)
    for index, told in skipping.items():
        own[index] = {**own.get(index, {}), "skipping": told}
    # Layers that say nothing of it have what all have.
    of_all: dict[str, Any] = {"skipping": {}} if skipping else {}
    return Slices(cuts, setting or {}, own, numbers=numbers, own=of_all)


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
