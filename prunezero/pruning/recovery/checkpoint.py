"""A training on disk: what was asked for, and how far it had come."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import OutputError, differences, reason


def digest(tensors: Sequence[Tensor]) -> str:
    """Hexadecimal digest of the shapes and bytes of some tensors."""
    found = hashlib.blake2b(repr([tensor.shape for tensor in tensors]).encode(), digest_size=8)
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write(path: Path, request: dict[str, Any], state: dict[str, Any]) -> None:
    """Keep a training as it is now; the file is complete or not there.

    Args:
        request: what the weights after the training follow from, as plain numbers and words.
        state: tensors, numbers and words, by names.

    Raises:
        OutputError: the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"request": request}, unfinished)
        unfinished.replace(path)
    # torch wraps what a full disk says.
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            unfinished.unlink()
        raise OutputError(f"checkpoint {path} cannot be written ({reason(error, path)})") from error


def read(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The state of a training as it was kept, on the CPU.

    Raises:
        OutputError: the file cannot be read, is damaged, or is of another request.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        changed = differences(state["request"], request)
    # Whatever a damaged or foreign file makes a reader do.
    except Exception as error:
        fault = "is damaged, or no checkpoint of a tuning; delete it"
        raise OutputError(f"{path} {fault} ({type(error).__name__})") from error
    if changed:
        raise OutputError(f"{path} is of another tuning ({changed}); repeat it or delete that")
    return state
