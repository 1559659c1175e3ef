"""How is a model built whose mixtures differ in their experts, or whose tokens skip some of them?

Each mixture is built by its layer's own settings. `skipping` among these says that tokens skip
experts of small weight: weights are sorted, w_1 >= ... >= w_k, and a token keeps its first i
experts, for the smallest i with

    sum of w_m over m > i  <  below * sum of w_m over m <= i.

Source: Lu et al. 2024, arXiv:2402.14800, section 3.3 and appendix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Ways in which transformers runs experts that take the number of experts for no expert: the first
# by itself, the others where a module says that experts elsewhere may have been chosen.
EAGER, BY_FLAG = "eager", ("grouped_mm", "batched_mm")
FLAG = "_is_expert_parallel"


def skipped_slots(weights: Tensor, below: float) -> Tensor:
    """Which experts of each token are skipped, bool [tokens, k], by weights [tokens, k].

    These may be in any order; of equal ones the later goes first.
    """
    ordered, places = weights.float().sort(dim=-1, descending=True, stable=True)
    kept = ordered.cumsum(-1)
    # Added up from the smallest, so that nothing is left behind the last.
    left = ordered.flip(-1).cumsum(-1).flip(-1)
    behind = torch.cat([left[:, 1:], torch.zeros_like(left[:, :1])], dim=-1)
    is_enough = behind < below * kept
    # Behind the first place at which it is enough.
    is_skipped = is_enough.cumsum(-1) - is_enough.long() > 0
    return torch.zeros_like(is_skipped).scatter(-1, places, is_skipped)


class Skipping:
    """A hook on a router, by which tokens skip experts; nobody runs those, where that can be said.

    By batched_mm, and in ways of running experts that are not of transformers itself, they run and
    count for nothing.
    """

    def __init__(self, experts: Any, below: float, *, is_renormalised: bool = True) -> None:
        """`is_renormalised`: whether weights of those that run add up to what all did."""
        self.experts, self.below, self.is_renormalised = experts, below, is_renormalised
        self.note: Callable[[Tensor], None] = lambda skips: None
        if hasattr(experts, FLAG):
            setattr(experts, FLAG, True)

    def __call__(self, router: Any, args: tuple[Any, ...], answer: Any) -> Any:
        """What the router answers, without the experts that are skipped."""
        logits, weights, indices = answer
        skips = skipped_slots(weights, self.below)
        self.note(skips)
        left = weights.masked_fill(skips, 0.0)
        if self.is_renormalised:
            left = left * (weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True))
        way = getattr(getattr(self.experts, "config", None), "_experts_implementation", None)
        if way == EAGER or (way in BY_FLAG and hasattr(self.experts, FLAG)):
            indices = indices.masked_fill(skips, len(self.experts.down_proj))
        return logits, left, indices


def skip_experts(layer: Any, told: dict[str, dict[str, Any]]) -> list[Any]:
    """Let tokens skip experts of a layer; the handles of the hooks.

    `told`: by the router's name in the layer, that of the `experts`, and the threshold `below`.
    """
    return [
        layer.get_submodule(router).register_forward_hook(
            Skipping(layer.get_submodule(one["experts"]), one["below"])
        )
        for router, one in told.items()
    ]


class UnequalMixtures:
    """A model of such mixtures, put before its other classes."""

    def sized(self: Any, kind: Any, settings: Any, index: int) -> Any:
        """A layer by its own settings."""
        layer = super().sized(kind, settings, index)  # type: ignore[misc]
        skip_experts(layer, getattr(settings, "skipping", {}))
        return layer

    @classmethod
    def _can_set_experts_implementation(cls: Any) -> bool:
        """As of the usual class: transformers reads it off the module that has the experts."""
        own = (one for one in cls.__mro__ if one.__module__.startswith("transformers.models."))
        usual: Any = next(own)
        return bool(usual._can_set_experts_implementation())

    def set_experts_implementation(self: Any, *words: Any, **named: Any) -> None:
        """As usual; the settings of single layers follow."""
        super().set_experts_implementation(*words, **named)  # type: ignore[misc]
        self.follow()
