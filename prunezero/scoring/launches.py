"""Which kernel fills a mask, on how many programs of which size."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from prunezero.scoring.request import Pattern

# The columns that a program takes at once. Seven pieces are the most whose keys fit its registers
# (compiled for sm_90), and together as many columns as the widest of common models have; beside the
# values of a formula with many inputs and steps there is room for two.
PIECE = 4096
WIDEST_ROW = 7 * PIECE
_MOST_SIZE = 14
_PIECES_BESIDE_MORE = 2
# Up to here half as many threads are enough, and two programs share a processor.
_FEW_PIECES, _SMALL_SIZE = 3, 8
# Group sizes that a thread holds whole, and the scores of a program of those.
_SLOTS = (4, 8)
_SCORES = 1024
# All pairs of a wider group no longer fit.
WIDEST_PATTERN = 64
_PAIRS = 4096
# Multiply-add fused into one rounding would give other scores than torch.
KERNEL_OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class _Launch:
    kernel: Any
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
    return WIDEST_ROW if size <= _MOST_SIZE else min(WIDEST_ROW, _PIECES_BESIDE_MORE * PIECE)


def fill(
    kernels: ModuleType,
    size: int,
    kept: torch.Tensor,
    columns: int,
    request: Pattern | int,
    arguments: list[Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill a mask; returns `extremes` and `tied` of `fused.Selected`.

    Args:
        kernels: the module of a formula.
        size: of the formula, `Plan.size`.
        kept: bool [out, columns], or uint8 [out, ceil(columns / 8)].
        request: a pattern, or how many weights of a row go.
        arguments: the formula's inputs with their strides, and its constants.
    """
    rows, is_packed = kept.shape[0], kept.dtype == torch.uint8
    if not isinstance(request, Pattern):
        launch = _rows(kernels, size, rows, columns, request)
    elif request.of in _SLOTS:
        launch = _slots(kernels, rows, columns, request)
    else:
        launch = _pairs(kernels, rows, columns, request)
        if is_packed and launch.sizes["WIDTH"] > request.of:
            whole = torch.empty(rows, columns, dtype=torch.bool, device=kept.device)
            notes = fill(kernels, size, whole, columns, request, arguments)
            kept.copy_(packed(whole))
            return notes
    count = launch.programs[0] * (launch.programs[1] if len(launch.programs) > 1 else 1)
    extremes = torch.empty(count, 2, dtype=torch.int32, device=kept.device)
    tied = torch.empty(count, dtype=torch.int32, device=kept.device)
    launch.kernel[launch.programs](
        kept,
        extremes,
        tied,
        launch.width,
        kept.shape[1] * 8 if is_packed else columns,
        launch.remove,
        *arguments,
        **launch.sizes,
        PACKED=is_packed,
        num_warps=launch.warps,
        **KERNEL_OPTIONS,
    )
    return extremes, tied


def _rows(kernels: ModuleType, size: int, rows: int, columns: int, remove: int) -> _Launch:
    if columns > WIDEST_ROW:
        return _Launch(kernels.long_row_kernel, (rows,), columns, remove, {"PIECE": PIECE}, 8)
    piece = min(_next_power_of_two(max(columns, 8)), PIECE)
    pieces = -(-columns // piece)
    is_light = pieces == 1 or (pieces <= _FEW_PIECES and size <= _SMALL_SIZE)
    warps = max(piece // 512, 4) if is_light else 16
    sizes = {"PIECE": piece, "PIECES": pieces}
    return _Launch(kernels.row_kernel, (rows,), columns, remove, sizes, warps)


def _slots(kernels: ModuleType, rows: int, columns: int, pattern: Pattern) -> _Launch:
    size = min(_next_power_of_two(max(columns, 8)), _SCORES)
    programs = (rows, -(-columns // size))
    sizes = {"OF": pattern.of, "SIZE": size}
    return _Launch(kernels.slot_kernel, programs, columns, pattern.of - pattern.keep, sizes, 4)


def _pairs(kernels: ModuleType, rows: int, columns: int, pattern: Pattern) -> _Launch:
    width = _next_power_of_two(pattern.of)
    in_row = columns // pattern.of
    groups = min(max(_PAIRS // width**2, 8), _next_power_of_two(in_row))
    groups = max(groups, -(-8 // width))
    sizes = {"OF": pattern.of, "WIDTH": width, "GROUPS": groups}
    programs = (rows, -(-in_row // groups))
    return _Launch(kernels.pattern_kernel, programs, in_row, pattern.of - pattern.keep, sizes, 4)


def packed(kept: torch.Tensor) -> torch.Tensor:
    """A mask [out, in] as uint8 [out, ceil(in / 8)], eight weights to a byte, the first lowest."""
    filled = torch.nn.functional.pad(kept.to(torch.uint8), (0, -kept.shape[1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (filled.view(kept.shape[0], -1, 8) << places).sum(2, dtype=torch.uint8)


def unpacked(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """The mask bool [out, columns] of which `packed` makes the bytes."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> places) & 1).view(bits.shape[0], -1)[:, :columns].bool()


def _next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
