"""How is a model built whose layers differ in size, and what stands where a part was taken out?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SkippedAttn(nn.Module):
    """In the place of an attention that was taken out: adds nothing to the residual stream."""

    def __init__(self, index: int, attention: nn.Module) -> None:
        """Stand in the layer of that index, in the place of its attention."""
        super().__init__()
        self.layer_idx = index
        # Some layers ask their attention which mask they want.
        self.is_sliding = getattr(attention, "is_sliding", False)

    def forward(self, hidden_states: Tensor, *_: Any, **named: Any) -> tuple[Tensor, None]:
        """Zeros of the shape of the hidden states, and no attention weights."""
        caches = [named.get(name) for name in ("cache", "past_key_values", "layer_past")]
        for cache in caches:
            if cache is not None:
                # A cache counts tokens by what its layers hold: one number for each will do.
                rows, tokens = hidden_states.shape[:2]
                one = hidden_states.new_zeros(rows, 1, tokens, 1)
                cache.update(one, one, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class SkippedMLP(nn.Module):
    """In the place of an MLP that was taken out: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Zeros of the shape of the hidden states."""
        return torch.zeros_like(hidden_states)


class UnequalLayers:
    """A model each of whose layers is built by its own settings, put before its usual class."""

    layer_list, attention, mlp = "layers", "self_attn", "mlp"

    def __init__(self: Any, config: Any) -> None:
        """Build the model as usual, then its layers anew."""
        shared = config.of_layer()
        super().__init__(shared)  # type: ignore[call-arg]
        config._attn_implementation = shared._attn_implementation
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
            setattr(layer, self.mlp, SkippedMLP())
        return layer

    def set_attn_implementation(self: Any, *words: Any, **named: Any) -> None:
        """As usual; the settings of single layers follow."""
        super().set_attn_implementation(*words, **named)  # type: ignore[misc]
        for module in self.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = self.config._attn_implementation
