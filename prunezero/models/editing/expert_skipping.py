"""Which of the experts that a token was sent to are not run, while the model runs?

Weights are sorted, w_1 >= ... >= w_k; a token keeps its first i experts, for the smallest i with

    sum of w_m over m > i  <  beta * sum of w_m over m <= i,

so of two experts the second is skipped where w_2 < beta * w_1. There is one beta for each mixture:
the median over calibration tokens of w_k / (w_1 + ... + w_{k-1}), with which half of the tokens
skip an expert. With beta 0 all run. For more than two experts the source divides by the sum of all
weights, which is the same rule for beta / (1 + beta).

Source: Lu et al. 2024, Not All Experts are Equal (ACL), arXiv:2402.14800, section 3.3 and appendix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.experts import MoeLayer, find_moe_layers
from prunezero.models.editing.exchanging import set_value
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.hooks import removing
from prunezero.models.text.windows import check_windows

# Ways in which transformers runs experts that take the number of experts for no expert: the first
# by itself, the others where a module says that experts elsewhere may have been chosen.
_EAGER, _BY_FLAG = "eager", ("grouped_mm", "batched_mm")
_FLAG = "_is_expert_parallel"


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


def median_thresholds(language_model: LanguageModel, windows: Tensor) -> dict[str, float]:
    """The beta of each mixture with which half of these tokens would skip an expert, by its name.

    Args:
        windows: calibration token ids [count, length].

    Raises:
        ModelError: the model has no mixtures, or tokens go to one expert each.
        TextError: the model cannot be run on these ids.
    """
    layers = _layers(language_model)
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
    way = getattr(language_model.model.config, "_experts_implementation", None)
    with ExitStack() as hooks:
        for name, beta in thresholds.items():
            layer = layers[name]
            has_flag = way in _BY_FLAG and hasattr(layer.experts, _FLAG)
            if has_flag:
                set_value(layer.experts, _FLAG, True, hooks)
            nobody = len(layer.down) if has_flag or way == _EAGER else None
            hook = _skipping(name, beta, calls, nobody=nobody, is_renormalised=is_renormalised)
            hooks.enter_context(removing([layer.router.register_forward_hook(hook)]))
        yield calls


def skipped_slots(weights: Tensor, beta: float) -> Tensor:
    """Which experts of each token are skipped, bool [tokens, k].

    Args:
        weights: of the router [tokens, k], in any order; of equal ones the later goes first.
    """
    ordered, places = weights.float().sort(dim=-1, descending=True, stable=True)
    kept = ordered.cumsum(-1)
    # Added up from the smallest, so that nothing is left behind the last.
    left = ordered.flip(-1).cumsum(-1).flip(-1)
    behind = torch.cat([left[:, 1:], torch.zeros_like(left[:, :1])], dim=-1)
    is_enough = behind < beta * kept
    # Behind the first place at which it is enough.
    is_skipped = is_enough.cumsum(-1) - is_enough.long() > 0
    return torch.zeros_like(is_skipped).scatter(-1, places, is_skipped)


def _skipping(
    name: str, beta: float, calls: Calls, *, nobody: int | None, is_renormalised: bool
) -> Callable[..., Any]:
    def skip(router: nn.Module, args: tuple[Any, ...], answer: Any) -> Any:
        logits, weights, indices = answer
        skips = skipped_slots(weights, beta)
        calls.add(name, skips)
        left = weights.masked_fill(skips, 0.0)
        if is_renormalised:
            left = left * (weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True))
        chosen = indices if nobody is None else indices.masked_fill(skips, nobody)
        return logits, left, chosen

    return skip


def _layers(language_model: LanguageModel) -> list[MoeLayer]:
    layers = find_moe_layers(language_model.model)
    if not layers or min(layer.top_k for layer in layers) < 2:
        raise ModelError(
            f"{type(language_model.model).__name__} sends no token to several experts, so none of "
            "them can be skipped while it runs"
        )
    return layers
