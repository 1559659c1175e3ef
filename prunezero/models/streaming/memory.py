"""How much memory does pruning block by block take, and how much did it take?"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prunezero.files.places import mebibytes as mebibytes
from prunezero.models.anatomy.linears import Linear
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.streaming.streamed_model import StreamedModel
from prunezero.scoring.statistics import sums_bytes

# Working memory for each weight of the largest matrix: scores, their order, masks.
SCORING_BYTES = 48
# And for each entry of its Gram matrix: a factorization in float64.
FACTOR_BYTES = 48
# What allocators keep of freed memory.
SPARE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that pruning block by block holds at the same time, estimated from shapes."""

    outside: int
    """weights outside the blocks"""
    block: int
    """weights of the largest block"""
    statistics: int
    """sums of the layers of one block, and factors of their Gram matrices"""
    states: int
    """hidden states of the calibration text; 0 where the device has a memory of its own"""
    work: int
    """scores, masks and a factorization for the largest matrix"""

    @property
    def total(self) -> int:
        """All of it."""
        return self.outside + self.block + self.statistics + self.states + self.work

    def __str__(self) -> str:
        parts = {
            "weights outside the blocks": self.outside,
            "the largest block": self.block,
            "its statistics": self.statistics,
            "hidden states": self.states,
            "scores, masks and a factorization": self.work,
        }
        return ", ".join(f"{what} {mebibytes(size)}" for what, size in parts.items() if size)


def memory_need(
    streamed: StreamedModel, layers: Sequence[Linear], sums: Iterable[str], windows: Tensor | None
) -> MemoryNeed:
    """What pruning these layers block by block holds in memory, from shapes alone.

    Args:
        layers: to be pruned.
        sums: names of the sums that are collected for them.
        windows: calibration token ids [count, length] that walk through the blocks, if any.
    """
    count, length = (0, 0) if windows is None else windows.shape
    return block_need(
        streamed.language_model, streamed.weight_bytes(), layers, frozenset(sums), (count, length)
    )


def block_need(
    language_model: LanguageModel,
    weight_bytes: tuple[int, int],
    layers: Sequence[Linear],
    sums: frozenset[str],
    text: tuple[int, int],
) -> MemoryNeed:
    """The same of a model whose weights may be outlines.

    Args:
        weight_bytes: of what is outside the blocks, and of the largest block.
        layers: to be pruned.
        sums: names of the sums that are collected for them.
        text: calibration windows that walk through the blocks, and tokens in each.
    """
    names = sums
    windows, length = text
    statistics: Counter[int] = Counter()
    for layer in layers:
        factor = 4 * layer.weight.shape[1] ** 2 if "gram" in names else 0
        statistics[layer.block] += factor + sums_bytes(names, layer.weight.shape, windows)
    state_bytes = int(language_model.model.config.hidden_size) * language_model.dtype.itemsize
    waits_here = language_model.device.type == "cpu"
    outside, block = weight_bytes
    return MemoryNeed(
        outside=outside,
        block=block,
        statistics=max(statistics.values()),
        states=windows * length * state_bytes if waits_here else 0,
        work=SPARE_BYTES + max(_work(layer, "gram" in names) for layer in layers),
    )


def _work(layer: Linear, is_factored: bool) -> int:
    squared = layer.weight.shape[1] ** 2 if is_factored else 0
    return SCORING_BYTES * layer.weight.numel() + FACTOR_BYTES * squared


class PeakMemory:
    """How far the memory in use has grown since this object was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._before = self._bytes("VmRSS")

    @property
    def growth(self) -> int:
        """Bytes, of the GPU where the device is one.

        On a CPU an upper bound: the highest use of the process so far, less that at the beginning.
        Where the system has no /proc, what the process used before counts as its beginning.
        """
        return self._bytes("VmHWM") - self._before

    def _bytes(self, field: str) -> int:
        if self._device.type == "cuda":
            is_peak = field == "VmHWM"
            of = torch.cuda.max_memory_allocated if is_peak else torch.cuda.memory_allocated
            return of(self._device)
        status = Path("/proc/self/status")
        if status.is_file():
            return 1024 * int(status.read_text().split(f"{field}:")[1].split()[0])
        import resource

        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return highest if sys.platform == "darwin" else highest * 1024
