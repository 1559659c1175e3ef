"""Units that go leave for good: smaller tensors, and a configuration that knows of them.

A model is sliced within a context, so that what is saved and measured is the smaller model, while
everything before it works on tensors of full size. The setting of the configuration that stands for
the width is found by trying: an empty model that is built with it must have just the shapes wanted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.block_probe import logits_of
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import Linear
from prunezero.models.editing.edit import Edit
from prunezero.models.editing.permuting import PROBE_TOKENS, ROUNDING, ROUNDING_OF_LOGITS
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.shortening import is_of_layers, shortened
from prunezero.models.editing.zeroing import zeroed
from prunezero.models.loading.language_model import LanguageModel

# Settings without a value, which then follow from others, whose names hold one of these words.
_OF_WIDTH = ("inner", "intermediate", "ffn")


@dataclass(frozen=True)
class Cut:
    """What stays of one parameter of a model."""

    axis: int
    """of the parameter as its module holds it"""
    kept: Tensor
    """int64, places along that axis, in their order"""

    def of(self, values: Tensor) -> Tensor:
        """The part that stays of values in the parameter's place."""
        return values.index_select(self.axis, self.kept.to(values.device)).contiguous()


@dataclass(frozen=True)
class Slices:
    """How a model becomes smaller."""

    cuts: Mapping[str, Cut]
    """what stays of each parameter that loses something, by name"""
    setting: Mapping[str, Any]
    """what its configuration says of it"""
    name_now: Callable[[str], str | None] = str
    """the name of a parameter in the smaller model by the one before; None where it goes"""


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
    return cuts


@contextmanager
def sliced(language_model: LanguageModel, selection: Selection) -> Iterator[Slices]:
    """Within it the model is really smaller, configuration included; leaving it undoes that.

    Raises:
        ModelError: no configuration of this model has such widths, or so few layers.
    """
    if is_of_layers(selection):
        with shortened(language_model, selection) as plan:
            yield Slices({}, plan.setting, plan.name_now)
        return
    model = language_model.model
    cuts = cuts_of(selection)
    setting = _setting(model, cuts)
    configuration = model.config.get_text_config()
    settings_before = {key: getattr(configuration, key) for key in setting}
    before = [(name, model.get_parameter(name)) for name in cuts]
    try:
        _slice(model, cuts, setting)
        yield Slices(cuts, setting)
    finally:
        for name, parameter in before:
            _put(model, name, parameter)
        for key, value in settings_before.items():
            setattr(configuration, key, value)


def remove(language_model: LanguageModel, selection: Selection) -> None:
    """Make the model smaller for good.

    Raises:
        ModelError: as `sliced`.
    """
    model = language_model.model
    cuts = cuts_of(selection)
    _slice(model, cuts, _setting(model, cuts))


def _slice(model: Any, cuts: Mapping[str, Cut], setting: Mapping[str, int]) -> None:
    for name, cut in cuts.items():
        _put(model, name, cut.of(model.get_parameter(name).detach()))
    for key, value in setting.items():
        setattr(model.config.get_text_config(), key, value)


SMALLER = Edit(zeroed, remove)


def width_setting(
    language_model: LanguageModel, groups: Sequence[Group], counts: Mapping[str, int]
) -> dict[str, int]:
    """The settings of the configuration under which so many units of each group stay.

    That the model then computes what it does with zeros is tried on the first units.

    Args:
        counts: units that stay, by the name of the group.

    Raises:
        ModelError: there are none, for example where layers differ in width; or it does not.
    """
    first = [torch.arange(group.units) < counts[group.name] for group in groups]
    devices = [group.members[0].linear.weight.device for group in groups]
    kept = tuple(one.to(device) for one, device in zip(first, devices, strict=True))
    selection = Selection(tuple(groups), kept)
    setting = _setting(language_model.model, cuts_of(selection))
    ids = torch.arange(PROBE_TOKENS, device=language_model.device)[None]
    with zeroed(language_model, selection):
        refuse_other_logits(language_model, selection, ids)
    return setting


def refuse_other_logits(language_model: LanguageModel, selection: Selection, ids: Tensor) -> None:
    """Refuse a model that computes otherwise without some units than with zeros in their place.

    Args:
        language_model: with zeros in the place of the units that go.
        ids: token ids [1, length] to compute.

    Raises:
        ModelError: it does, or no configuration has such widths.
    """
    before = logits_of(language_model, ids).double()
    with sliced(language_model, selection):
        after = logits_of(language_model, ids).double()
    change = float((after - before).norm()) / (float(before.norm()) or 1.0)
    if not change <= ROUNDING_OF_LOGITS.get(language_model.dtype, ROUNDING):
        raise ModelError(
            f"without the units that go {type(language_model.model).__name__} computes something "
            f"else than with zeros in their place (logits differ by {change:.2g} of their norm); "
            "this layout cannot be made smaller, keep its tensors at full size"
        )


def _setting(model: Any, cuts: Mapping[str, Cut]) -> dict[str, int]:
    if not cuts:
        return {}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wanted = dict(shapes)
    for name, cut in cuts.items():
        shape = list(shapes[name])
        shape[cut.axis] = len(cut.kept)
        wanted[name] = tuple(shape)
    for key, value in _candidates(model, shapes, cuts):
        if _shapes_with(model, {key: value}) == wanted:
            return {key: value}
    widths = sorted({len(cut.kept) for cut in cuts.values()})
    raise ModelError(
        f"no configuration of {model.config.model_type} gives its layers the widths "
        f"{', '.join(map(str, widths[:4]))}{' ...' if len(widths) > 4 else ''} that are left: "
        "plain transformers needs one width for all layers; use compare: group without targets, "
        "or keep tensors at full size, with zeros"
    )


def _candidates(
    model: Any, shapes: Mapping[str, tuple[int, ...]], cuts: Mapping[str, Cut]
) -> Iterator[tuple[str, int]]:
    """Settings that may stand for the width, each with the value that it would need."""
    settings = model.config.get_text_config().to_dict()
    kept = {(shapes[name][cut.axis], len(cut.kept)) for name, cut in cuts.items()}
    for before, after in sorted(kept):
        for key, value in settings.items():
            if isinstance(value, int) and not isinstance(value, bool) and value == before:
                yield key, after
    for _, after in sorted(kept):
        for key, value in settings.items():
            if value is None and any(word in key for word in _OF_WIDTH):
                yield key, after


def _shapes_with(model: Any, changes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of an empty model's parameters under other settings; none where that is no model."""
    configuration = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(configuration.get_text_config(), key, value)
    try:
        with torch.device("meta"):
            empty = type(model)(configuration)
    # Whatever a model says to settings that exclude each other.
    except Exception:
        return {}
    return {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}


def _put(model: nn.Module, name: str, values: Tensor) -> None:
    """Exchange a parameter of a linear map, and let the module know its own size."""
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    is_parameter = isinstance(values, nn.Parameter)
    setattr(module, kind, values if is_parameter else nn.Parameter(values, requires_grad=False))
    if kind != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = values.shape
    else:
        # transformers' Conv1D, whose weight is [in, out].
        for size, value in zip(("nx", "nf"), values.shape, strict=True):
            setattr(module, size, value)
