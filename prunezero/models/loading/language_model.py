"""What is a loaded model, and how is it told apart from every other?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunezero.errors import ModelError
from prunezero.files.digests import joined_digest, tensor_digests
from prunezero.models.anatomy.linears import note_calls
from prunezero.models.loading.own_changes import refuse_own_changes
from prunezero.models.loading.source import Source

# Written on the way to and from a disk; they change nothing in what the model computes, and the
# tensors carry their dtype.
_WORDS_ONLY = ("_name_or_path", "architectures", "dtype", "transformers_version")
# How a model computes, which a configuration keeps for itself; another way has other last bits.
_WAYS = ("_attn_implementation", "_experts_implementation")


@dataclass(frozen=True)
class LanguageModel:
    """A decoder-only language model in evaluation mode, with its tokenizer."""

    model: Any
    """the transformers model; its weights are pruned in place"""
    tokenizer: Any
    """the transformers tokenizer"""
    name: str
    """as the user wrote it"""
    fingerprint: str
    """changes when the configuration, dtype, vocabulary or any bit of a weight changes"""
    dtype: torch.dtype
    """of the weights and of every forward pass"""
    device: torch.device
    """where the weights are"""
    source: Source | None = None
    """the files that it came from; None for one that was handed over in memory"""

    @property
    def dtype_word(self) -> str:
        """The dtype as options and tables call it, such as float32."""
        return str(self.dtype).removeprefix("torch.")


def wrap_model(
    model: nn.Module, tokenizer: Any, *, name: str, source: Source | None = None
) -> LanguageModel:
    """A `LanguageModel` around a transformers model that is already in memory.

    Puts the model in evaluation mode and stops gradients of its weights.

    Args:
        source: the files that it was loaded from, which a saved model mirrors.

    Raises:
        ModelError: weights are on the meta device, on several devices, or no floats; or a forward
            pass changes them.
    """
    check_weights(model, name)
    model.eval()
    model.requires_grad_(False)
    first = next(model.parameters())
    ids = torch.zeros((1, 2), dtype=torch.long, device=first.device)
    refuse_own_changes(model, name, lambda: note_calls(model, lambda: model(ids)))
    fingerprint = model_fingerprint(model, tokenizer)
    return LanguageModel(model, tokenizer, name, fingerprint, first.dtype, first.device, source)


def check_weights(model: nn.Module, name: str) -> None:
    """Refuse weights that cannot be read and written in place.

    Raises:
        ModelError: weights are on the meta device, on several devices, or no floats.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if any(device.type == "meta" for device in devices):
        raise ModelError(
            f"model '{name}' has weights that are offloaded or not loaded (device 'meta'); "
            "load it whole, on one device"
        )
    if len(devices) != 1:
        raise ModelError(
            f"model '{name}' must be on one device but is on "
            f"{', '.join(sorted(map(str, devices))) or 'none'}; load it without device_map"
        )
    for key, parameter in model.named_parameters():
        if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
            raise ModelError(
                f"model '{name}': weight '{key}' is stored as {parameter.dtype}, which is a "
                "quantized or packed format; prune the full-precision checkpoint, then quantize"
            )


def model_fingerprint(model: Any, tokenizer: Any) -> str:
    """Hexadecimal digest over configuration, vocabulary and all bytes of every tensor."""
    configuration = model.config.to_dict()
    for key in _WORDS_ONLY:
        configuration.pop(key, None)
    configuration |= {key: getattr(model.config, key, None) for key in _WAYS}
    # Buffers too that a checkpoint does not hold: a model computes with them all the same.
    digests = tensor_digests({**model.state_dict(), **dict(model.named_buffers())})
    told = [json.dumps(configuration, sort_keys=True, default=str), vocabulary_digest(tokenizer)]
    return joined_digest([*told, *(f"{name} {digest}" for name, digest in sorted(digests.items()))])


def vocabulary_digest(tokenizer: Any) -> str:
    """Hexadecimal digest of the words and ids of a tokenizer."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda word: (word[1], word[0]))
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, transformers shows neither progress bars nor advice."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
