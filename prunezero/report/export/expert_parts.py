"""How does an exported page reach the experts that a layer keeps in stacks? As the engine does.

The classes and functions stand here as they stand in a page, behind those of `page_parts.py`.
"""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

STACKS = ("gate_up_proj", "down_proj")  # what a module of experts holds: [experts, out, in] each


class Expert(nn.Linear):
    """The linear map of one expert; its weight is one matrix of a stack."""

    def __init__(self, experts: Any, stack: str, index: int) -> None:
        nn.Module.__init__(self)
        self.place, self.leaf = (experts, stack, index), None
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """[out, in], in the memory of the stack; with a gradient of its own while it is seen."""
        experts, stack, index = self.place
        return getattr(experts, stack)[index] if self.leaf is None else self.leaf


class Calling:
    """Experts that call the linear maps of each, until it is removed."""

    def __init__(self, experts: Any, own: dict[Any, Any]) -> None:
        self.experts, self.own = experts, own
        for (stack, index), one in own.items():
            one.leaf = getattr(experts, stack).detach()[index]
        experts.forward = partial(given_by_each, experts, own)

    def remove(self) -> None:
        """Let them compute as they did."""
        del self.experts.forward
        for one in self.own.values():
            one.leaf = None


def call_experts(layers: dict[str, Any]) -> list[Any]:
    """What has the experts among the layers called, so that hooks see their tokens."""
    found: dict[Any, dict[Any, Any]] = {}
    for module in layers.values():
        if isinstance(module, Expert):
            found.setdefault(module.place[0], {})[module.place[1:]] = module
    return [Calling(experts, own) for experts, own in found.items()]


def given_by_each(
    experts: Any, own: dict[Any, Any], hidden: Tensor, indices: Tensor, weights: Tensor
) -> Tensor:
    """What experts give to tokens [tokens, hidden], one after another; indices [tokens, k]."""
    result = torch.zeros_like(hidden)
    for index in range(len(experts.down_proj)):
        tokens, places = torch.where(indices == index)
        if len(tokens):
            up, down = (own.get((one, index)) or Expert(experts, one, index) for one in STACKS)
            given = down(experts._apply_gate(up(hidden[tokens]))) * weights[tokens, places, None]
            result.index_add_(0, tokens, given.to(result.dtype))
    return result


def fill_up(stats: dict[str, Any], layers: dict[str, Any], sums: list[str]) -> None:
    """Give experts with fewer than 2 tokens for each column the rest as average ones of theirs."""
    peers: dict[Any, list[str]] = {}
    for name, module in layers.items():
        if isinstance(module, Expert):
            peers.setdefault(module.place[:2], []).append(name)
    scarce: list[str] = []
    for (experts, stack), names in peers.items():
        enough = 2 * getattr(experts, stack).shape[2]
        seen = {name: tokens_of(stats[name]) for name in names}
        pooled = {one: sum(stats[name][one] for name in names) for one in sums}
        found = [name for name in names if seen[name] < enough and sum(seen.values())]
        for name in found:
            share = (enough - seen[name]) / sum(seen.values())
            stats[name] |= {one: stats[name][one] + pooled[one] * share for one in sums}
            stats[name]["tokens of all"] = enough
        scarce += found
    if scarce:
        told = f"{len(scarce)} matrices of experts saw few tokens, {scarce[0]} among them"
        warnings.warn(f"{told}; average ones of their layers were added", stacklevel=3)


def tokens_of(stats: dict[str, Any]) -> int:
    """How many tokens of the text came to a layer."""
    return max([0, *(value for name, value in stats.items() if name.startswith("tokens of"))])
