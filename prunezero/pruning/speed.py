"""Speed: tokens per second of a smaller model beside the model that it was made from, measured.

Both take turns on the same text, since a machine is not equally quick all the time. Zeros in the
place of units take as long as what stood there, so the model at full size stands for the dense one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunezero.models.attending.remembering import cache_word
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import sliced
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.costs import cache_of

# Tokens that are written by each measurement of writing.
_WRITTEN = 16


@dataclass(frozen=True)
class Speed:
    """Tokens per second, medians over turns."""

    read: float
    """of a window that is read at once"""
    written: float
    """of tokens that are written one by one behind it, with a cache"""


def speed_beside(
    language_model: LanguageModel, selection: Selection, ids: Tensor, *, turns: int = 5
) -> tuple[Speed, Speed]:
    """How quick the model is at full size, and how quick without the units that go.

    Args:
        ids: token ids [1, length] that are read.
        turns: measurements of each, in alternation.

    Raises:
        ModelError: units of this kind do not make the model smaller.
    """
    ids = ids.to(language_model.device)
    ways: list[Callable[[], AbstractContextManager[Any]]] = [
        nullcontext,
        lambda: sliced(language_model, selection),
    ]
    taken: list[list[tuple[float, float]]] = [[], []]
    with torch.no_grad():
        # The first turn only warms up.
        for turn in range(turns + 1):
            for way, times in zip(ways, taken, strict=True):
                with way():
                    seconds = _seconds(language_model, ids)
                if turn:
                    times.append(seconds)
    full, smaller = (_speed(times, ids.shape[1]) for times in taken)
    return full, smaller


def _speed(times: list[tuple[float, float]], length: int) -> Speed:
    read, written = (statistics.median(one) for one in zip(*times, strict=True))
    return Speed(length / read, _WRITTEN / written)


def _seconds(language_model: LanguageModel, ids: Tensor) -> tuple[float, float]:
    """Seconds of reading a window, and of writing some tokens behind it."""
    begin = time.perf_counter()
    answer = language_model.model(ids, use_cache=True)
    wait_for(language_model)
    read = time.perf_counter() - begin
    begin = time.perf_counter()
    name = cache_word(language_model.model)
    for _ in range(_WRITTEN):
        following = answer.logits[:, -1:].argmax(-1)
        known = {name: cache_of(answer)}
        answer = language_model.model(following, use_cache=True, **known)
    wait_for(language_model)
    return read, time.perf_counter() - begin


def wait_for(language_model: LanguageModel) -> None:
    """Come back once the model's device has done all that it was told."""
    if language_model.device.type == "cuda":
        torch.cuda.synchronize(language_model.device)
