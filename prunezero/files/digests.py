"""Are these the same bytes? Digests of tensors and files, always of all that they hold.

A sample would miss what lies between its places. SHA-256 is chosen for its speed: processors have
instructions for it, and hashlib lets go of Python's lock, so that every core takes a tensor.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

_Item = TypeVar("_Item")
# More cores than that wait for the memory.
_MOST_THREADS = 8


def tensor_digest(tensor: Tensor) -> str:
    """Hexadecimal digest of a tensor's shape, dtype and bytes."""
    whole = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(whole.shape)} {whole.dtype}".encode())
    digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`tensor_digest` of each, by name; what several names share is read once."""
    places = {name: _place(tensor) for name, tensor in tensors.items()}
    single = {places[name]: tensor for name, tensor in tensors.items()}
    found = dict(zip(single, in_parallel(tensor_digest, list(single.values())), strict=True))
    return {name: found[place] for name, place in places.items()}


def file_digest(path: Path) -> str:
    """Hexadecimal digest of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def joined_digest(parts: Iterable[str]) -> str:
    """One hexadecimal digest of texts in their order, of 32 digits."""
    digest = hashlib.sha256()
    for part in parts:
        # Two parts are never read as one.
        digest.update(f"{len(part)} {part}\n".encode())
    return digest.hexdigest()[:32]


def in_parallel(digest: Callable[[_Item], str], items: Sequence[_Item]) -> list[str]:
    """What `digest` gives for each item, in their order, on several cores."""
    threads = min(_MOST_THREADS, os.cpu_count() or 1, max(1, len(items)))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(digest, items))


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Equal for views of the same numbers."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device
