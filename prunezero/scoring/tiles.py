"""A matrix a few rows at a time: what is made on the way then stays in the processor's cache.

A chain of elementwise operations on a large matrix writes and reads fresh memory at each of them,
and most of its time goes there, not into arithmetic. Rows are independent, so nothing but the time
changes; only where rows are so wide that torch divides a tile among threads may the last bit of a
power differ.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch

# The most that torch leaves to one thread: where it divides work, powers end in other last bits. It
# is also within a tenth of the quickest of 2**13 to 2**18 at 1536x576 and 4096x4096.
_VALUES = 1 << 15
# Float32 that one turn of torch's loops takes, with the widest registers and twice unrolled.
_RUN = 32


def needs_tiles(inputs: Iterable[torch.Tensor], shape: Sequence[int]) -> bool:
    """Whether matrices lie in the CPU's memory row by row, and are larger than one tile."""
    lie_by_rows = all(one.device.type == "cpu" and one.is_contiguous() for one in inputs)
    return lie_by_rows and math.prod(shape) > _VALUES


def row_tiles(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cut the rows of a matrix into tiles.

    All tiles but the last hold whole runs of `_RUN` values: torch computes what is left over at the
    end of an array by other instructions, and a power may differ there in its last bit.
    """
    unit = _RUN // math.gcd(_RUN, columns)
    step = max(1, _VALUES // (columns * unit)) * unit if columns else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def each_tile(work: Callable[[slice], None], rows: int, columns: int) -> None:
    """Call `work` for every tile, on as many threads as torch has.

    Neither numpy nor torch then divides a tile among threads of its own.
    """
    tiles = list(row_tiles(rows, columns))
    threads = torch.get_num_threads()
    if min(threads, len(tiles)) < 2:
        for tile in tiles:
            work(tile)
    else:
        list(_threads(threads, os.getpid()).map(work, tiles))


def fill_by_tiles(
    made: np.ndarray[Any, Any],
    values: np.ndarray[Any, Any],
    function: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
) -> None:
    """Write `function` of each tile of `values` into the same rows of `made`, see `each_tile`."""

    def fill(tile: slice) -> None:
        made[tile] = function(values[tile])

    each_tile(fill, *values.shape)


@lru_cache(maxsize=1)
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """The threads of this process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(count, thread_name_prefix="prunezero-tiles")
