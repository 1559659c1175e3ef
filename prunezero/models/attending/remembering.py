"""A cache whose layers forget keys: tensors shrink, positions go on as if nothing went."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

from prunezero.models.attending.interface import remembering_layers
from prunezero.models.loading.language_model import LanguageModel


@functools.cache
def _forgetting_layer() -> type[Any]:
    from transformers.cache_utils import DynamicLayer

    class ForgettingLayer(DynamicLayer):  # type: ignore[misc]
        """Keys and values of one layer, fewer than the tokens that it has seen."""

        keys: Any
        values: Any

        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            """Keys and values [batch, key-value heads, keys, width] with the new ones behind."""
            self.seen += key_states.shape[-2]
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states)
            return found

        def keep(self, places: Tensor) -> None:
            """Forget all keys but some.

            Args:
                places: of the keys that are there, rising, int64 [batch, key-value heads, kept].
            """
            rows = places[..., None]
            self.keys = self.keys.gather(2, rows.expand(-1, -1, -1, self.keys.shape[-1]))
            self.values = self.values.gather(2, rows.expand(-1, -1, -1, self.values.shape[-1]))

        def get_seq_length(self) -> int:
            """Tokens seen, which is where the next one stands."""
            return self.seen

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            """Keys of the next call, and how many went before the first of them."""
            kept = 0 if self.keys is None else self.keys.shape[-2]
            return kept + query_length, self.seen - kept

        def crop(self, tokens_to_remove: int) -> None:
            """Forget the last tokens, as many as a negative number says."""
            super().crop(tokens_to_remove)
            self.seen -= abs(tokens_to_remove)

        def reset(self) -> None:
            """Begin with another text."""
            super().reset()
            self.seen = 0

    return ForgettingLayer


def forgetting_cache(language_model: LanguageModel) -> Any:
    """A cache for one text of a model, whose layers can be told what to forget.

    Layers that have a window of their own are those of the library.

    Raises:
        ModelError: all layers have.
    """
    cache = plain_cache(language_model)
    for layer in remembering_layers(language_model):
        cache.layers[layer] = _forgetting_layer()()
    return cache


def plain_cache(language_model: LanguageModel) -> Any:
    """The library's own cache for one text of a model."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=language_model.model.config)


def cache_word(network: Any) -> str:
    """What a network calls the cache that it is handed: newer versions of transformers say so."""
    accepted = inspect.signature(network.forward).parameters
    return "cache" if "cache" in accepted else "past_key_values"


def bytes_held(cache: Any) -> int:
    """Bytes of all keys and values of a cache, counted on its tensors."""
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
