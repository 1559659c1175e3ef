"""Which of the experts that a token was sent to are not run, while the model runs?

Weights are sorted, w_1 >= ... >= w_k; a token keeps its first i experts, for the smallest i with

    sum of w_m over m > i  <  beta * sum of w_m over m <= i,

so of two experts the second is skipped where w_2 < beta * w_1. There is one beta for each mixture:
the median over calibration tokens of w_k / (w_1 + ... + w_{k-1}), with which half of the tokens
skip an expert. With beta 0 all run. For more than two experts the source divides by the sum of all
weights, which is the same rule for beta / (1 + beta). The hook on a router that follows the rule
stands in `prunezero/models/unequal/mixtures.py`, since saved folders have it too.

Source: Lu et al. 2024, Not All Experts are Equal (ACL), arXiv:2402.14800, section 3.3 and appendix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.experts import MoeLayer, find_moe_layers
from prunezero.models.editing.exchanging import set_value
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.hooks import removing
from prunezero.models.text.windows import check_windows
from prunezero.models.unequal.mixtures import FLAG, Skipping


@dataclass
class Calls:
    """How often experts were asked for, and how often not, by name of the mixture."""

    slots: dict[str, int] = field(default_factory=dict)
    """tokens times experts for each"""
    skipped: dict[str, int] = field(default_factory=dict)
    """those of them in which no expert ran"""
    tokens: dict[str, int] = field(default_factory=dict)
    """tokens seen"""
    shortened: dict[str, int] = field(default_factory=dict)
    """tokens that skipped at least one"""

    def add(self, name: str, skips: Tensor) -> None:
        """Note the skipped slots, bool [tokens, k], of one call of a mixture."""
        told = (skips.numel(), int(skips.sum()), len(skips), int(skips.any(dim=1).sum()))
        kinds = (self.slots, self.skipped, self.tokens, self.shortened)
        for counts, amount in zip(kinds, told, strict=True):
            counts[name] = counts.get(name, 0) + amount

    @property
    def share(self) -> float:
        """The fraction of all calls that was skipped; 0 where there was none."""
        return sum(self.skipped.values()) / max(1, sum(self.slots.values()))


def median_thresholds(
    language_model: LanguageModel, windows: Tensor, layers: Sequence[MoeLayer] | None = None
) -> dict[str, float]:
    """The beta of each mixture with which half of these tokens would skip an expert, by its name.

    Args:
        windows: calibration token ids [count, length].
        layers: the mixtures, where they were found before an edit hid experts; else all.

    Raises:
        ModelError: the model has no mixtures, or tokens go to one expert each.
        TextError: the model cannot be run on these ids.
    """
    layers = _layers(language_model) if layers is None else layers
    check_windows(windows, language_model)
    ratios: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def noting(name: str) -> Callable[..., None]:
        def note(router: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
            weights = answer[1].float().sort(dim=-1, descending=True).values
            ratios[name].append(weights[:, -1] / weights[:, :-1].sum(-1))

        return note

    handles = [layer.router.register_forward_hook(noting(layer.name)) for layer in layers]
    with removing(handles), torch.no_grad():
        for ids in windows:
            language_model.model.base_model(ids[None].to(language_model.device), use_cache=False)
    return {name: float(torch.cat(found).quantile(0.5)) for name, found in ratios.items()}


@contextmanager
def skipping_experts(
    language_model: LanguageModel,
    thresholds: Mapping[str, float],
    *,
    is_renormalised: bool = False,
) -> Iterator[Calls]:
    """Within it, tokens skip experts whose weights are small beside those of their others.

    Experts that are skipped are not run, but in ways of running them that are not of transformers
    itself: there, and by batched_mm, they run and count for nothing.

    Args:
        thresholds: beta by name of the mixture, each 0 or more; others skip nothing.
        is_renormalised: whether the weights of those that run add up to what all did.

    Raises:
        ModelError: the model has no mixtures, or none of such a name; or a threshold is negative.
    """
    layers = {layer.name: layer for layer in _layers(language_model)}
    for name, beta in thresholds.items():
        if name not in layers or not beta >= 0:
            raise ModelError(
                f"threshold {beta:g} of mixture '{name}' cannot be used; thresholds are 0 or more, "
                f"of {', '.join(layers)}"
            )
    calls = Calls()
    with ExitStack() as hooks:
        for name, beta in thresholds.items():
            keep_flag(layers[name].experts, hooks)
            hook = Skipping(layers[name].experts, beta, is_renormalised=is_renormalised)
            hook.note = partial(calls.add, name)
            hooks.enter_context(removing([layers[name].router.register_forward_hook(hook)]))
        yield calls


def keep_flag(experts: nn.Module, undo: ExitStack) -> None:
    """Let a module of experts say again, when `undo` is left, who else has experts."""
    if hasattr(experts, FLAG):
        set_value(experts, FLAG, getattr(experts, FLAG), undo)


@contextmanager
def counting_calls(layers: Iterable[MoeLayer]) -> Iterator[Calls]:
    """Within it, calls of the experts of mixtures are counted; skipped is one with no weight."""
    calls = Calls()

    def noting(name: str) -> Callable[..., None]:
        def note(router: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
            calls.add(name, answer[1] == 0)

        return note

    handles = [one.router.register_forward_hook(noting(one.name)) for one in layers]
    with removing(handles):
        yield calls


def refuse_without_choice(language_model: LanguageModel) -> None:
    """Refuse a model whose tokens cannot skip an expert.

    Raises:
        ModelError: it has no mixtures, or tokens go to one expert each.
    """
    _layers(language_model)


def _layers(language_model: LanguageModel) -> list[MoeLayer]:
    layers = find_moe_layers(language_model.model)
    if not layers or min(layer.top_k for layer in layers) < 2:
        raise ModelError(
            f"{type(language_model.model).__name__} sends no token to several experts, so none of "
            "them can be skipped while it runs"
        )
    return layers
