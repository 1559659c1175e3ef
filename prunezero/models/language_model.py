"""What is a loaded model, and how is it told apart from every other?"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.own_changes import refuse_own_changes
from prunezero.models.source import Source

# Enough to tell any two trained models apart, few enough to read a 7B model's in a second.
SAMPLED_NUMBERS = 4096


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
    """changes when the configuration, dtype, weights or vocabulary change"""
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
    refuse_own_changes(model, name, lambda: model(ids))
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
    """Hexadecimal digest over configuration, vocabulary and an even sample of every tensor."""
    digest = hashlib.blake2b(digest_size=16)
    configuration = model.config.to_dict()
    # Written on the way to and from a disk; they change nothing in what the model computes, and
    # the tensors below carry their dtype.
    for key in ("_name_or_path", "architectures", "dtype", "transformers_version"):
        configuration.pop(key, None)
    digest.update(json.dumps(configuration, sort_keys=True, default=str).encode())
    digest.update(vocabulary_digest(tokenizer).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample_bytes(tensor))
    return digest.hexdigest()


def sample_bytes(tensor: Tensor) -> bytes:
    """Bytes of up to `SAMPLED_NUMBERS` numbers, evenly spread over the tensor."""
    flat = tensor.detach().reshape(-1)
    # Odd, so that in a matrix of even width the sample moves through the columns.
    step = (flat.numel() // SAMPLED_NUMBERS) | 1
    return flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes()


def vocabulary_digest(tokenizer: Any) -> str:
    """Hexadecimal digest of the words and ids of a tokenizer."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda word: (word[1], word[0]))
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()


def cache_dir() -> Path:
    """Where prunezero keeps what it can make again: $PRUNEZERO_CACHE, or ~/.cache/prunezero."""
    chosen = os.environ.get("PRUNEZERO_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "prunezero"


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
