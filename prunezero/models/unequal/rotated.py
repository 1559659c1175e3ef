"""How is a model built whose attentions and MLPs read the residual stream in bases of their own?

`rotated` of config.json says so. Two matrices in each layer take the stream from one basis to the
next; behind the last layer it is a whole one again, as wide as what is named there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


class RotatedLayer:
    """A layer whose parts read the stream in different bases, put before its usual class."""

    def forward(self: Any, hidden_states: Tensor, **named: Any) -> Tensor:
        """The stream [..., width] behind the layer, in the basis of the next one."""
        found = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        hidden_states = hidden_states @ self.attn_shortcut_Q + found[0]
        rest = hidden_states @ self.mlp_shortcut_Q
        return rest + self.mlp(self.post_attention_layernorm(hidden_states))


@functools.cache
def rotated(kind: type) -> type:
    """The class of layers that are turned, one for all layers of a usual class."""
    return type(kind.__name__, (RotatedLayer, kind), {})


def rotate(layer: Any, over_attention: nn.Parameter, over_mlp: nn.Parameter) -> None:
    """Let a layer take the stream from basis to basis, by a matrix [width, next width] each."""
    kind: Any = type(layer)
    layer.__class__ = rotated(kind)
    layer.attn_shortcut_Q, layer.mlp_shortcut_Q = over_attention, over_mlp


def widen(module: Any, axis: int, width: int) -> None:
    """Let the rows (0) or columns (1) of a matrix, or a vector, be so many."""
    for key, values in list(module.named_parameters(recurse=False)):
        shape = list(values.shape)
        if axis < len(shape):
            shape[axis] = width
            setattr(module, key, nn.Parameter(values.new_zeros(shape)))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


class RotatedStream:
    """A model whose layers are turned where its settings say so, put before its other classes."""

    def __init__(self: Any, config: Any) -> None:
        """Build the model as usual, then let its stream have other directions."""
        super().__init__(config)  # type: ignore[call-arg]
        if getattr(config, "rotated", None):
            self.rotate(config.hidden_size, **config.rotated)
            self.post_init()

    def rotate(self: Any, width: int, hidden_size: int, whole: dict[str, int]) -> None:
        """Let layers read a stream of that width in bases of their own, and the head a whole one.

        `hidden_size`: of the stream behind the last layer; `whole`: what is as wide, by the end of
        its name, and the axis along which it is.
        """
        layers = next(one for name, one in self.named_modules() if self.is_list(name))
        for index, layer in enumerate(layers):
            behind = hidden_size if index == len(layers) - 1 else width
            rotate(layer, *(nn.Parameter(torch.eye(width, one)) for one in (width, behind)))
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                for key in ("variance_epsilon", "eps"):
                    if key in vars(norm):
                        # Beside a mean over fewer numbers, which is larger by as much.
                        setattr(norm, key, vars(norm)[key] * (hidden_size / width))
        for name, module in self.named_modules():
            for end, axis in whole.items():
                if f".{name}".endswith(f".{end}"):
                    widen(module, axis, hidden_size)
