"""How does optimal brain surgery mend a layer whose weights go column by column?

Columns are visited from left to right. A removed weight w_j leaves the error w_j / U_jj, which its
row passes on to the columns behind it along row j of U: those weights take over what the removed
one did to the outputs. A group of columns is chosen when the sweep reaches it, on weights as mended
so far.

The published loop mends all columns of a block of 128 after every single one. Here columns are
halved again and again down to a few, and what one half leaves reaches the other as one matrix
product: the same arithmetic in another order, and nearly all of it in products. On a CUDA device
with Triton the few are 128, and one kernel's.

Source: Frantar & Alistarh 2023, SparseGPT, arXiv:2301.00774, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunezero.scoring.fused import has_kernels
from prunezero.scoring.kernels.sweep import MOST_COLUMNS, mend_columns
from prunezero.scoring.masking import clear
from prunezero.scoring.second_order import InverseFactor

# Told the weight `[out, in]` as mended so far, a first column and the column behind the last:
# the keep mask `[out, columns]`, bool, of those columns.
Choose = Callable[[Tensor, int, int], Tensor]

# Columns mended one by one; more would not fit into the processor's nearest cache.
NARROW = 16
# Groups of few columns are swept in blocks of about this many before the rest is mended.
WIDE = 128


def sweep(
    weight: Tensor, factor: InverseFactor, choose: Choose, *, group: int | None = None
) -> tuple[Tensor, Tensor]:
    """The mended weight, float32 `[out, in]` with exact zeros, and its mask, bool, True = keep.

    Weights of channels that were zero in all calibration text count as zero when groups are chosen
    on the way, so that they go first; those that stay are not changed, as they do nothing there.

    Args:
        weight: `[out, in]`; not modified.
        factor: of the layer's inputs.
        choose: the mask of some columns.
        group: columns that are chosen together when the sweep reaches them; None chooses all
            before the sweep. Behind the last whole group there may be a narrower one.
    """
    # Rows of the transpose are columns of the weight, and lie together in memory.
    columns = weight.detach().float().T.contiguous()
    if group is not None:
        columns[factor.dead] = 0.0
    work = _Sweep(columns, factor.upper, choose, group)
    if group is None:
        work.choose(0, len(columns))
        work.mend(0, len(columns), chosen=True)
    else:
        for start, stop in _blocks(len(columns), group):
            work.mend(start, stop, chosen=False)
            work.pass_on(start, stop, len(columns))
    dead = factor.dead
    columns[dead] = torch.where(work.keep[dead], weight.detach().float().T[dead], 0.0)
    return columns.T.contiguous(), work.keep.T.contiguous()


def _blocks(width: int, group: int) -> list[tuple[int, int]]:
    size = max(group, WIDE // group * group)
    return [(start, min(start + size, width)) for start in range(0, width, size)]


class _Sweep:
    """The state of one sweep; rows of all its tensors are columns of the weight."""

    def __init__(self, columns: Tensor, upper: Tensor, choose: Choose, group: int | None) -> None:
        self.columns = columns
        self._has_kernel = has_kernels(columns)
        # A factor comes column by column, and kernels read it row by row.
        self.upper = upper.contiguous() if self._has_kernel else upper
        self.keep = torch.ones_like(columns, dtype=torch.bool)
        self._errors = torch.zeros_like(columns)
        self._choose = choose
        self._group = group or len(columns)
        # On a CPU the same memory as numpy arrays, whose calls cost a quarter of torch's.
        tensors = (columns, self._errors, self.upper, self.keep)
        self._arrays: Any = (
            tuple(tensor.numpy() for tensor in tensors) if columns.device.type == "cpu" else tensors
        )
        self._diagonal = self._arrays[2].diagonal()
        self._narrow = MOST_COLUMNS if self._has_kernel else NARROW

    def choose(self, start: int, stop: int) -> None:
        """Choose the columns from `start` to before `stop` on the weights as they are now."""
        self.keep[start:stop] = self._choose(self.columns.T, start, stop).T

    def mend(self, start: int, stop: int, *, chosen: bool) -> None:
        """Remove and mend within these columns; `chosen` says whether their mask is known."""
        if not chosen and stop - start <= self._group:
            self.choose(start, stop)
            chosen = True
        if stop - start <= self._narrow and (chosen or self._group <= self._narrow):
            for first in range(start, stop, stop - start if chosen else self._group):
                self._mend_one_by_one(first, stop, chosen=chosen)
            return
        middle = self._middle(start, stop, chosen=chosen)
        self.mend(start, middle, chosen=chosen)
        self.pass_on(start, middle, stop)
        self.mend(middle, stop, chosen=chosen)

    def pass_on(self, start: int, stop: int, end: int) -> None:
        """Let the columns from `stop` to before `end` take over the errors of those before."""
        if stop < end:
            along = self.upper[start:stop, stop:end].T
            self.columns[stop:end].addmm_(along, self._errors[start:stop], alpha=-1.0)

    def _middle(self, start: int, stop: int, *, chosen: bool) -> int:
        unit = self._narrow if chosen else self._group
        return start + max(1, (stop - start) // (2 * unit)) * unit

    def _mend_one_by_one(self, start: int, stop: int, *, chosen: bool) -> None:
        """The columns of one group, or all up to `stop` if chosen, with their errors up to it."""
        last = stop if chosen else min(start + self._group, stop)
        if not chosen:
            self.choose(start, last)
        if self._has_kernel:
            mend_columns(self.columns, self._errors, self.upper, self.keep, start, last)
        else:
            self._mend_in_steps(start, last)
        self.pass_on(start, last, stop)

    def _mend_in_steps(self, start: int, last: int) -> None:
        columns, errors, upper, keep = self._arrays
        # What a weight leaves as error: itself over U_jj where it is removed, nothing elsewhere.
        share = ~keep[start:last] / self._diagonal[start:last, None]
        for place in range(start, last):
            column = columns[place]
            if place > start:
                column -= upper[start:place, place] @ errors[start:place]
            errors[place] = column * share[place - start]
        clear(self.columns[start:last], self.keep[start:last])
