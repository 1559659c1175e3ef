"""Units that go leave for good: smaller tensors, and a configuration that knows of them.

A model is sliced within a context, so that what is saved and measured is the smaller model, while
everything before it works on tensors of full size. How is planned in `slices.py`: where units of
several kinds go, each way to leave by itself, that of the stream on the model as the others leave
it; all of them are made at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.block_probe import PROBE_TOKENS, logits_of, relative_change
from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.edit import Edit
from prunezero.models.editing.exchanging import exchange, held, set_number, set_value
from prunezero.models.editing.narrowing import is_of_stream, own_setting_of_all
from prunezero.models.editing.permuting import ROUNDING, ROUNDING_OF_LOGITS
from prunezero.models.editing.rotating import is_rotated, rotate_stream
from prunezero.models.editing.routing import is_of_experts, let_skip, without_experts
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.shortening import is_of_layers, shorten
from prunezero.models.editing.skipping import (
    is_of_sub_blocks,
)
from prunezero.models.editing.slices import Slices, slices_of_one_way
from prunezero.models.editing.widths import (
    Heads,
    fault_of,
    known_settings,
)
from prunezero.models.editing.zeroing import zeroed
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.unequal.families import layer_settings


def slices_of(language_model: LanguageModel, selection: Selection) -> Slices:
    """How a model becomes smaller by a selection.

    Raises:
        ModelError: what loses all of its units cannot be left out, or no configuration has so few
            layers; or whole layers or channels go beside units of which layers keep different
            numbers.
    """
    if is_rotated(selection):
        return slices_of_one_way(language_model, selection)
    inside, *around = _in_their_order(selection)
    if len(around) > 1:
        raise ModelError(
            f"units of kind {_kinds_of(selection)} do not leave one model together: each changes "
            "what its blocks are made of in a way of its own; remove those of one kind"
        )
    part = around[0] if around else Selection()
    if is_of_stream(part):
        slices = _alike(language_model.model, slices_of_one_way(language_model, inside))
        _refuse_unlike_layers(slices, selection)
        with ExitStack() as undo:
            # How wide the stream is shows in matrices that others have cut.
            _slice(language_model.model, slices, undo)
            narrower = slices_of_one_way(language_model, part, slices)
        if narrower.setting:
            # What was refused by itself may be taken beside a narrower stream.
            slices = replace(slices, own={})
        return slices.then(narrower)
    around_them = slices_of_one_way(language_model, part)
    slices = slices_of_one_way(language_model, inside, around_them)
    if around_them.shortening is not None:
        _refuse_unlike_layers(slices, selection)
    return slices.then(around_them)


def _alike(model: Any, slices: Slices) -> Slices:
    """The same of layers that keep equal numbers, where only a class of its own says so of all."""
    own = own_setting_of_all(model, slices.cuts, slices.heads) if slices.layers else None
    return slices if own is None else replace(slices, layers={}, own=own)


def _refuse_unlike_layers(slices: Slices, selection: Selection) -> None:
    """Refuse what no configuration says beside a change of all layers.

    Raises:
        ModelError: layers keep different numbers of units.
    """
    if slices.layers:
        raise ModelError(
            f"units of kind {_kinds_of(selection)} go, and layers keep different numbers of some, "
            "which no configuration says of a model that loses layers or channels too; let units "
            "of each place compete (compare: group)"
        )


def _kinds_of(selection: Selection) -> str:
    return " and ".join(dict.fromkeys(group.called for group in selection.groups))


def _in_their_order(selection: Selection) -> list[Selection]:
    """Units inside of layers, of all kinds, and then those of each other way to leave."""
    ways = (is_of_sub_blocks, is_of_layers, is_of_stream, is_of_experts)
    parts: list[list[Group]] = [[], *([] for _ in ways)]
    for group in selection.groups:
        alone = selection.of([group])
        places = [place for place, is_of in enumerate(ways, start=1) if is_of(alone)]
        parts[places[0] if places else 0].append(group)
    inside, *around = map(selection.of, parts)
    return [inside, *(part for part in around if part.groups)]


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
        if slices.rotation is not None:
            rotate_stream(language_model, slices.rotation, undo)
        yield


def remove(language_model: LanguageModel, selection: Selection) -> None:
    """Make the model smaller for good.

    Raises:
        ModelError: as `slices_of`, or no one configuration has such widths.
    """
    slices = slices_of(language_model, selection)
    slices.refuse_faults()
    if slices.rotation is not None:
        raise ModelError(
            "directions of the residual stream leave a model when it is saved, since only a class "
            "of its own computes without them; save it without them"
        )
    if slices.needs_own_class:
        raise ModelError(fault_of(language_model.model, slices.cuts))
    _slice(language_model.model, slices, ExitStack())


def _slice(model: Any, slices: Slices, undo: ExitStack) -> None:
    # A tensor that two modules share stays one.
    smaller: dict[int, Tensor] = {}
    for name, cut in slices.cuts.items():
        before = held(model, name)
        if id(before) not in smaller:
            part = cut.of(before.detach())
            is_learned = isinstance(before, nn.Parameter)
            smaller[id(before)] = nn.Parameter(part, requires_grad=False) if is_learned else part
        exchange(model, name, smaller[id(before)], undo)
    for (path, key), value in slices.numbers.items():
        set_number(model.get_submodule(path), key, value, undo)
    for index, heads in slices.heads.items():
        settings = layer_settings(model.config, index)
        for key, value in known_settings(settings, heads.settings).items():
            setattr(settings, key, value)
        _set_counts(model.get_submodule(heads.name), heads, settings, undo)
    skipping = {at: own["skipping"] for at, own in slices.layers.items() if "skipping" in own}
    let_skip(model, skipping, undo)
    for name, stand_in in slices.skipped.items():
        path, _, child = name.rpartition(".")
        set_value(model.get_submodule(path), child, stand_in, undo)
    if slices.shortening is not None:
        shorten(model, slices.shortening, undo)
    for key, value in slices.setting.items():
        set_value(model.config.get_text_config(), key, value, undo)


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
            set_value(module, key, value, undo)


def remove_experts(language_model: LanguageModel, selection: Selection) -> None:
    """Take experts out of a model for good, also where no configuration says how many are left.

    Raises:
        ModelError: as `slices_of`.
    """
    _slice(language_model.model, slices_of(language_model, selection), ExitStack())


SMALLER = Edit(zeroed, remove)
# A router whose rows are zeros still chooses.
ROUTED = Edit(without_experts, remove_experts, zeros_suffice=False)


@contextmanager
def _narrowed(language_model: LanguageModel, selection: Selection) -> Iterator[None]:
    with sliced(language_model, selection):
        yield


# A norm divides by the width, which zeros do not change, so nothing but the smaller model computes
# what the smaller model does.
NARROWER = Edit(_narrowed, remove, zeros_suffice=False)
# Directions are rows and columns of no matrix before the stream is turned.
ROTATED = Edit(_narrowed, remove, zeros_suffice=False)


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
    return setting_of(language_model, first_of_each(groups, counts))


def first_of_each(groups: Sequence[Group], counts: Mapping[str, int]) -> Selection:
    """The selection of which the first so many units of each group stay.

    Args:
        counts: units that stay, by the name of the group.
    """
    kept = (first_units(group, counts[group.name]).to(group.device) for group in groups)
    return Selection(tuple(groups), tuple(kept))


def setting_of(language_model: LanguageModel, selection: Selection) -> Slices:
    """How units of a selection go, once it is tried that the model then computes as with zeros.

    Raises:
        ModelError: as `width_setting`.
    """
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

    Of channels and directions of the stream no zeros can stand for the smaller model; that one has
    to run. Of experts it is compared with routers that do not choose them.

    Args:
        language_model: with zeros in the place of the units that go.
        ids: token ids [1, length] to compute.

    Raises:
        ModelError: it does, or as `slices_of`.
    """
    with without_experts(language_model, selection):
        before = logits_of(language_model, ids).double()
    with sliced(language_model, selection):
        after = logits_of(language_model, ids).double()
    if is_of_stream(selection) or is_rotated(selection):
        return
    change = relative_change(after, before)
    if not change <= ROUNDING_OF_LOGITS.get(language_model.dtype, ROUNDING):
        raise ModelError(
            f"without the units that go {type(language_model.model).__name__} computes something "
            f"else than with zeros in their place (logits differ by {change:.2g} of their norm); "
            "this layout cannot be made smaller, keep its tensors at full size"
        )
