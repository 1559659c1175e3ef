"""How is a model built whose layers differ in size, and what stands where a part was taken out?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Settings that say how a model computes, and not what.
WAYS = ("_attn_implementation", "_experts_implementation")


class Skipped(nn.Module):
    """In the place of a part that was taken out: adds nothing to the residual stream."""

    def __init__(
        self,
        index: int,
        part: nn.Module,
        *,
        is_tuple: bool = False,
        hands_on: int | str | None = None,
    ) -> None:
        """Stand in the layer of that index, in the place of its part.

        `is_tuple`: it returns more than hidden states; `hands_on`: the argument that is the stream,
        where the part itself adds to that.
        """
        super().__init__()
        self.layer_idx = index
        # Some layers ask their attention which mask they want.
        self.is_sliding = getattr(part, "is_sliding", False)
        self.is_tuple, self.hands_on = is_tuple, hands_on

    def forward(self, *args: Any, **named: Any) -> Any:
        """What the part would return if its weights were zeros."""
        given: dict[Any, Any] = {**dict(enumerate(args)), **named}
        state = next(one for one in given.values() if isinstance(one, Tensor))
        for cache in given.values():
            if hasattr(cache, "get_seq_length"):
                # A cache counts tokens by what its layers hold: one number for each will do.
                one = state.new_zeros(state.shape[0], 1, state.shape[1], 1)
                cache.update(one, one, self.layer_idx)
        found = torch.zeros_like(state) if self.hands_on is None else given[self.hands_on]
        return (found, None) if self.is_tuple else found


class SkippedAttn(Skipped):
    """In the place of an attention."""

    def __init__(self, index: int, part: nn.Module, **named: Any) -> None:
        """As any part that was taken out; an attention usually returns its weights too."""
        super().__init__(index, part, **{"is_tuple": True, **named})


class SkippedMLP(Skipped):
    """In the place of an MLP."""


class UnequalLayers:
    """A model each of whose layers is built by its own settings, put before its usual class."""

    layer_list, attention, mlp = "layers", "self_attn", "mlp"

    def __init__(self: Any, config: Any) -> None:
        """Build the model as usual, then its layers anew."""
        shared = config.of_layer()
        super().__init__(shared)  # type: ignore[call-arg]
        for word in WAYS:
            if hasattr(shared, word):
                setattr(config, word, getattr(shared, word))
        for module in self.modules():
            if getattr(module, "config", None) is shared:
                module.config = config
        layers = next(one for name, one in self.named_modules() if self.is_list(name))
        for index, layer in enumerate(layers):
            layers[index] = self.sized(type(layer), config.of_layer(index), index)
        self.post_init()

    def is_list(self, name: str) -> bool:
        """Whether the module of that name is the list of layers."""
        return name.rpartition(".")[2] == self.layer_list

    def sized(self, kind: Any, settings: Any, index: int) -> nn.Module:
        """A layer by its own settings; `skip` names its parts that are taken out."""
        layer: nn.Module = kind(settings, index)
        skipped = getattr(settings, "skip", ())
        if "attention" in skipped:
            setattr(layer, self.attention, SkippedAttn(index, getattr(layer, self.attention)))
        if "mlp" in skipped:
            setattr(layer, self.mlp, SkippedMLP(index, getattr(layer, self.mlp)))
        return layer

    def set_attn_implementation(self: Any, *words: Any, **named: Any) -> None:
        """As usual; the settings of single layers follow."""
        super().set_attn_implementation(*words, **named)  # type: ignore[misc]
        self.follow()

    def follow(self: Any) -> None:
        """Let the settings of single layers say how parts are computed, as those of all do."""
        for module in self.modules():
            for word in WAYS:
                if hasattr(module, "config") and hasattr(self.config, word):
                    setattr(module.config, word, getattr(self.config, word))
