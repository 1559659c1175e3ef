"""A matrix some rows at a time: what is made on the way then stays in the processor's cache.

A chain of elementwise operations on a large matrix writes and reads fresh memory at each of them,
and most of its time goes there, not into arithmetic. Rows are independent, so nothing but the time
changes; only a power may end in another last bit, where torch divides its work elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

# Half a megabyte of float32, with room in a second-level cache for one or two more of its size; the
# quickest of 2**13 to 2**18 at 1536x576 and 4096x4096.
_VALUES = 1 << 17
# The memory of smaller matrices is used again from one operation to the next.
_LARGE = 1 << 20
# Float32 that one turn of torch's loops takes, with the widest registers and twice unrolled.
_RUN = 32


def needs_tiles(inputs: Iterable[torch.Tensor], shape: Sequence[int]) -> bool:
    """Whether matrices lie in the CPU's memory row by row, and are large."""
    lie_by_rows = all(one.device.type == "cpu" and one.is_contiguous() for one in inputs)
    return lie_by_rows and math.prod(shape) > _LARGE


def row_tiles(rows: int, columns: int, values: int | None = None) -> Iterator[slice]:
    """Slices that cut the rows of a matrix into tiles, of about so many values where it is said.

    All tiles but the last hold whole runs of `_RUN` values: torch computes what is left over at the
    end of an array by other instructions, and a power may differ there in its last bit.
    """
    unit = _RUN // math.gcd(_RUN, columns)
    step = max(1, (values or _VALUES) // (columns * unit)) * unit if columns else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
