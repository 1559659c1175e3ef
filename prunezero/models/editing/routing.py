"""Experts that go: a router that cannot choose them, for a while, and what is cut for good.

A zero in a router's row is no removal: its logit is 0, and not minus infinity. So a router is
narrowed to the experts that stay, with whatever it keeps of each beside its row, and its answers
are told in the numbers of all. It then computes what the smaller model's router does, in every
family: softmax or sigmoid, over all or over those chosen, with groups or without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from prunezero.models.anatomy.blocks import block_prefix, find_blocks
from prunezero.models.anatomy.experts import MoeLayer
from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.exchanging import exchange, held, set_value
from prunezero.models.editing.expert_skipping import keep_flag
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.unequal.mixtures import skip_experts

# Under these names modules keep how many experts there are.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def is_of_experts(selection: Selection) -> bool:
    """Whether the units of a selection are experts of mixtures."""
    return any(group.mixture is not None for group in selection.groups)


@contextmanager
def without_experts(language_model: LanguageModel, selection: Selection) -> Iterator[None]:
    """Within it no router chooses an expert that goes; nothing of the experts is touched.

    Where a group says so, routers choose as before, and a constant stands for what an expert that
    went makes of a token; and tokens skip experts that stay. Groups of other units are left alone.
    """
    with ExitStack() as undo:
        for group, kept in selection:
            if group.mixture is None:
                continue
            if group.means is not None:
                _answer_by_means(group.mixture, group.means, kept, undo)
            elif not bool(kept.all()):
                _narrow(language_model.model, group, kept, undo)
        let_skip(language_model.model, skipping_of(language_model.model, selection), undo)
        yield


def skipping_of(model: Any, selection: Selection) -> dict[int, dict[str, dict[str, Any]]]:
    """What the settings of layers say of tokens that skip experts, by index; see `skip_experts`."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for group in selection.groups:
        if group.mixture is not None and group.skip_below is not None:
            start = f"{block_prefix(model)}.{group.block}."
            experts = group.mixture.experts_name.removeprefix(start)
            told = {"experts": experts, "below": group.skip_below}
            routers = found.setdefault(group.block, {})
            routers[group.mixture.router_name.removeprefix(start)] = told
    return found


def let_skip(model: Any, layers: Mapping[int, dict[str, dict[str, Any]]], undo: ExitStack) -> None:
    """Let tokens skip experts as the settings of layers say, until `undo` is left."""
    for index, told in layers.items():
        block = find_blocks(model)[index]
        for one in told.values():
            keep_flag(block.get_submodule(one["experts"]), undo)
        for handle in skip_experts(block, told):
            undo.callback(handle.remove)


@contextmanager
def narrowed(language_model: LanguageModel, group: Group, kept: Tensor) -> Iterator[None]:
    """Within it the router of one mixture chooses among some experts alone, in numbers of all.

    Args:
        kept: bool [experts], True = may be chosen.
    """
    with ExitStack() as undo:
        _narrow(language_model.model, group, kept, undo)
        yield


def _narrow(model: nn.Module, group: Group, kept: Tensor, undo: ExitStack) -> None:
    layer = group.mixture
    assert layer is not None  # the caller has seen it; for the type checker
    places = kept.nonzero().flatten()
    for part in group.parts:
        if part.name.startswith(f"{layer.router_name}."):
            whole = held(model, part.name)
            rows = whole.detach().index_select(part.axis, places.to(whole.device))
            exchange(model, part.name, rows, undo)
    for module, key in counted(layer.router, group.units):
        set_value(module, key, len(places), undo)
    handle = layer.router.register_forward_hook(_in_numbers_of_all(places))
    undo.callback(handle.remove)


def _answer_by_means(layer: MoeLayer, means: Tensor, kept: Tensor, undo: ExitStack) -> None:
    """Let experts that went answer by constants, weighted as their answers were.

    Args:
        means: [experts, hidden].
    """
    waiting: list[Tensor] = []

    def chose(router: nn.Module, args: tuple[Any, ...], answer: Any) -> Any:
        logits, weights, indices = answer
        is_gone = ~kept.to(indices.device)[indices]
        shares = weights.double().masked_fill(~is_gone, 0.0)
        waiting.append((shares[..., None] * means.to(indices.device)[indices]).sum(1))
        return logits, weights.masked_fill(is_gone, 0.0), indices

    def computed(experts: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + waiting.pop().to(output.dtype)

    undo.callback(layer.router.register_forward_hook(chose).remove)
    undo.callback(layer.experts.register_forward_hook(computed).remove)


def _in_numbers_of_all(places: Tensor) -> Callable[..., Any]:
    def told(router: nn.Module, args: tuple[Any, ...], answer: Any) -> Any:
        logits, weights, indices = answer
        return logits, weights, places.to(indices)[indices]

    return told


def counted(module: nn.Module, count: int) -> list[tuple[nn.Module, str]]:
    """Where a module and those inside it say that there are so many experts."""
    return [(one, key) for one in module.modules() for key in COUNTS if vars(one).get(key) == count]


def numbers_without(model: nn.Module, selection: Selection) -> dict[tuple[str, str], int]:
    """How many experts modules say there are once some went, by module and key.

    The model as a whole says so too, where all of its mixtures keep as many.
    """
    found: dict[tuple[str, str], int] = {}
    left = {}
    for group, kept in selection:
        if group.mixture is None:
            continue
        left[group.name] = int(kept.sum())
        for module, key in counted(group.mixture.module, group.units):
            found[_name_of(model, module), key] = left[group.name]
    if len(set(left.values())) == 1:
        (stays,) = set(left.values())
        count = selection.groups[0].units
        found |= {("", key): stays for key in COUNTS if vars(model).get(key) == count}
    return found


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in model.named_modules() if one is module)
