"""Which kernel fills a mask, on how many programs of which size."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from prunezero.scoring.request import Pattern

# Columns that a program takes at once: few, because what is counted of a piece costs nothing for
# the next one; more of them in wide rows, whose text would grow long.
_PIECES = {4096: 512, 12288: 1024, 14336: 2048}
_WIDE_PIECE = 4096
# Seven wide pieces are as many columns as the widest of common models have. Beside the values of a
# formula up to a size a program holds fewer.
WIDEST_ROW = 7 * _WIDE_PIECE
_WIDEST = {8: WIDEST_ROW, 14: 14336}
_WIDEST_BESIDE_MORE = 8192
_WARPS = (4, 8, 16)
# Scores that a thread holds beside the values of a formula up to a size (compiled for sm_90).
_HELD = {8: 88, 14: 44}
_HELD_BESIDE_MORE = 16
# Group sizes that a thread holds whole, and the scores of a program of those.
_SLOTS = (4, 8)
_SCORES = 1024
_SLOT_WARPS = 2
# All pairs of a wider group no longer fit.
WIDEST_PATTERN = 64
_PAIRS = 4096
# Multiply-add fused into one rounding would give other scores than torch.
KERNEL_OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class _Launch:
    kernel: str
    programs: tuple[int, ...]
    width: int
    """of a row, in columns or in groups"""
    remove: int
    """of a row, or of a group"""
    sizes: dict[str, int]
    """what the kernel is compiled for"""
    warps: int


def widest_row(size: int) -> int:
    """The columns of the widest row that a formula of a size (`Plan.size`) scores and selects."""
    return min(WIDEST_ROW, _up_to(size, _WIDEST, _WIDEST_BESIDE_MORE))


def _up_to(size: int, table: dict[int, int], beyond: int) -> int:
    return next((value for most, value in table.items() if size <= most), beyond)


def fill(
    kernels: ModuleType,
    size: int,
    kept: torch.Tensor,
    request: Pattern | int,
    arguments: list[Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill a mask; returns `extremes` and `tied` of `fused.Selected`.

    Args:
        kernels: the module of a formula.
        size: of the formula, `Plan.size`.
        kept: bool [out, columns].
        request: a pattern, or how many weights of a row go.
        arguments: the formula's inputs with their strides, and its constants.
    """
    launch = _launch(size, *kept.shape, request)
    count = math.prod(launch.programs)
    extremes = torch.empty(count, 2, dtype=torch.int32, device=kept.device)
    tied = torch.empty(count, dtype=torch.int32, device=kept.device)
    getattr(kernels, launch.kernel)[launch.programs](
        kept,
        extremes,
        tied,
        launch.width,
        kept.shape[1],
        launch.remove,
        *arguments,
        **launch.sizes,
        num_warps=launch.warps,
        **KERNEL_OPTIONS,
    )
    return extremes, tied


@lru_cache(maxsize=1024)
def _launch(size: int, rows: int, columns: int, request: Pattern | int) -> _Launch:
    if not isinstance(request, Pattern):
        return _rows(size, rows, columns, request)
    by_slots = request.of in _SLOTS
    return (_slots if by_slots else _pairs)(rows, columns, request)


def _rows(size: int, rows: int, columns: int, remove: int) -> _Launch:
    if columns > WIDEST_ROW:
        sizes = {"PIECE": _WIDE_PIECE}
        return _Launch("long_row_kernel", (rows,), columns, remove, sizes, 8)
    held = _up_to(size, _HELD, _HELD_BESIDE_MORE)
    warps = next((warps for warps in _WARPS if columns <= 32 * warps * held), _WARPS[-1])
    piece = _up_to(columns, _PIECES, _WIDE_PIECE)
    # A thread takes one column at least.
    piece = min(max(piece, 32 * warps), _next_power_of_two(max(columns, 8)))
    sizes = {"PIECE": piece, "PIECES": -(-columns // piece)}
    return _Launch("row_kernel", (rows,), columns, remove, sizes, warps)


def _slots(rows: int, columns: int, pattern: Pattern) -> _Launch:
    size = min(_next_power_of_two(max(columns, 8)), _SCORES)
    programs = (rows, -(-columns // size))
    sizes = {"OF": pattern.of, "SIZE": size}
    remove = pattern.of - pattern.keep
    return _Launch("slot_kernel", programs, columns, remove, sizes, _SLOT_WARPS)


def _pairs(rows: int, columns: int, pattern: Pattern) -> _Launch:
    width = _next_power_of_two(pattern.of)
    in_row = columns // pattern.of
    groups = min(max(_PAIRS // width**2, 8), _next_power_of_two(in_row))
    sizes = {"OF": pattern.of, "WIDTH": width, "GROUPS": groups}
    programs = (rows, -(-in_row // groups))
    return _Launch("pattern_kernel", programs, in_row, pattern.of - pattern.keep, sizes, 4)


def on_device_of(weight: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch where the weight lies; the interpreter, which tests use, needs no device."""
    on_cuda = weight.device.type == "cuda"
    return torch.cuda.device(weight.device) if on_cuda else contextlib.nullcontext()


def _next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
