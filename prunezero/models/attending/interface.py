"""How to stand in for a model's attention for a while, by the library's own interface.

The function that the model calls is registered under a name of ours, together with its twin that
makes masks: without that one a model would be given no mask, and see the future.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.loading.language_model import LanguageModel

# Implementations that take a mask of each head.
BASES = ("sdpa", "eager")
# Of the names under which ours are registered.
_PREFIX = "prunezero_"
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Call:
    """One call of attention by one layer of a model."""

    module: nn.Module
    """the attention of the layer"""
    queries: Tensor
    """[batch, query heads, queries, width]"""
    keys: Tensor
    """[batch, key-value heads, keys, width], those of the cache among them"""
    values: Tensor
    """[batch, key-value heads, keys, width]"""
    mask: Tensor | None
    """as the model made it: bool, or what is added [batch, 1, queries, keys]; None where it says no
    more than that tokens see those before them"""
    numbers: dict[str, Any]
    """everything else that attention is given, by name"""
    base: Callable[..., tuple[Tensor, Tensor | None]]
    """the model's own function"""
    is_additive: bool
    """whether that function adds masks"""

    @property
    def layer(self) -> int:
        """The index of the layer."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    @property
    def scaling(self) -> float:
        """What products of query and key are multiplied by."""
        given = self.numbers.get("scaling")
        return float(self.queries.shape[-1] ** -0.5 if given is None else given)

    @property
    def softcap(self) -> float | None:
        """What scaled products approach by tanh; None where nothing holds them."""
        given = self.numbers.get("softcap")
        return None if given is None else float(given)

    @property
    def before(self) -> int:
        """Keys that were there before these queries."""
        return self.keys.shape[2] - self.queries.shape[2]

    def usual(self) -> tuple[Tensor, Tensor | None]:
        """What the model's own function gives."""
        return self.base(
            self.module, self.queries, self.keys, self.values, self.mask, **self.numbers
        )

    def masked(self, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the model's own function gives under another mask.

        Args:
            allowed: bool, broadcastable to [batch, query heads, queries, keys]; None for one query
                that sees all keys.
        """
        mask = allowed
        if allowed is not None:
            mask = allowed.expand(len(self.queries), -1, -1, -1)
        if mask is not None and self.is_additive:
            mask = _added(mask, self.queries)
        return self.base(self.module, self.queries, self.keys, self.values, mask, **self.numbers)


def _added(allowed: Tensor, like: Tensor) -> Tensor:
    """What is added to logits so that only allowed ones count, of the dtype of queries."""
    none = torch.zeros((), dtype=like.dtype, device=like.device)
    return torch.where(allowed, none, torch.finfo(like.dtype).min)


Attend = Callable[[Call], tuple[Tensor, "Tensor | None"]]


@contextmanager
def watched_attention(language_model: LanguageModel, attend: Attend) -> Iterator[None]:
    """Within it, every call of attention of the model goes to a function of ours.

    Leaving it, also after an error, the model and the library are what they were.

    Raises:
        ModelError: the model does not call attention through the library's interface, or by an
            implementation that takes no mask of each head.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    configs = _configs(language_model)
    base = configs[0]._attn_implementation
    name = f"{_PREFIX}{next(_NUMBERS)}"
    functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping

    def function(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **numbers: Any
    ) -> tuple[Tensor, Tensor | None]:
        own = _own_function(module, base)
        return attend(Call(module, query, key, value, mask, numbers, own, base == "eager"))

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, masks[base])
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config in configs:
            config._attn_implementation = base
        del functions[name], masks[name]


def _configs(language_model: LanguageModel) -> list[Any]:
    """The configurations that modules of the model read, each once; all name one implementation."""
    model = language_model.model
    with_attention = [one for one in model.modules() if hasattr(one, "layer_idx")]
    held: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    found = [config for config in held if hasattr(config, "_attn_implementation")]
    configs = list({id(config): config for config in found}.values())
    names = {config._attn_implementation for config in configs}
    if not getattr(model, "_supports_attention_backend", False) or not with_attention:
        raise ModelError(
            f"{type(model).__name__} does not call attention through the interface of "
            "transformers, so nothing can be left out of it while it runs"
        )
    if any(str(name).startswith(_PREFIX) for name in names):
        raise ModelError(
            f"the attention of '{language_model.name}' is watched or left out in part already; "
            "leave that context first"
        )
    if len(names) != 1 or not names <= set(BASES):
        raise ModelError(
            f"'{language_model.name}' computes attention by {' and '.join(map(str, names))}, which "
            f"takes no mask of each head; load it with attention {' or '.join(BASES)}"
        )
    return configs


def _own_function(module: nn.Module, base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the library would have called."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if base == "eager":
        # Each family of models has its own, beside the class of its attention.
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if own is None:
            raise ModelError(
                f"{type(module).__name__} has no attention of its own to go on with; load the "
                "model with attention sdpa"
            )
        return own
    return ALL_ATTENTION_FUNCTIONS[base]


def refuse_extras(call: Call) -> None:
    """Refuse attention that is more than a softmax of products.

    Raises:
        ModelError: it has sinks of its own, or biases by position.
    """
    for name in ("s_aux", "position_bias"):
        if call.numbers.get(name) is not None:
            raise ModelError(
                f"the attention of layer {call.layer} has {name} beside queries and keys, so what "
                "a key receives does not follow from them; this layout is not supported"
            )


def remembering_layers(language_model: LanguageModel) -> tuple[int, ...]:
    """Indices of the layers that remember all keys; others have a window of their own.

    Raises:
        ModelError: there are none.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=language_model.model.config)
    found = tuple(at for at, layer in enumerate(cache.layers) if type(layer) is DynamicLayer)
    if not found:
        raise ModelError(
            f"no layer of '{language_model.name}' remembers all tokens, each has a window of its "
            "own, so there is no budget to keep"
        )
    return found
