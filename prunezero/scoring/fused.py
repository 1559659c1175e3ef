"""A criterion as one Triton kernel: weights and features are read once, and a mask is written.

Scores live in registers, in float32, and are never stored: a bfloat16 score would tie half of all
rows at their threshold. A row finds its threshold by bisection on integers that order as the scores
do, stopping as soon as the count is right; N:M ranks every group by pairs. Both give, bit for bit,
the mask that `selection.select` makes from the same scores, lower index first.

Rows wider than `WIDEST_FUSED_ROW` have their scores written first, and those wider than
`WIDEST_ROW` are read in pieces. Where `can_fuse` says no (groups other than rows, very wide
patterns) torch selects from the scores.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from prunezero.errors import StatisticsError
from prunezero.formula.criterion import Criterion
from prunezero.scoring.kernel_files import import_kernels, kernel_folder
from prunezero.scoring.kernel_source import Plan, plan
from prunezero.scoring.request import Pattern, checked_request, parse_pattern
from prunezero.scoring.selection import refuse_non_finite, select

# Wider rows no longer fit the registers of one program beside a formula (compiled for sm_90), and
# wider ones still not by themselves.
WIDEST_FUSED_ROW = 8192
WIDEST_ROW = 16384
_PIECE = 4096
# All pairs of a wider group no longer fit.
WIDEST_PATTERN = 64
_PAIRS_PER_PROGRAM = 4096
_SCORES_PER_PROGRAM = 1024
# Multiply-add fused into one rounding would give other scores than torch.
KERNEL_OPTIONS = {"enable_fp_fusion": False}


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether kernels run where the tensor lies: on a CUDA device, with Triton installed."""
    return tensor.is_cuda and importlib.util.find_spec("triton") is not None


def can_fuse(compare: str, pattern: str) -> bool:
    """Whether kernels can select as well as score."""
    parsed = parse_pattern(pattern)
    if parsed is not None:
        return parsed.of <= WIDEST_PATTERN
    return compare == "row"


def fused_score(
    criterion: Criterion, weight: torch.Tensor, features: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The scores of one matrix from one kernel, float32 [out, in]; low scores go first.

    Args:
        criterion: the formula.
        weight: [out, in], any float type and memory layout, on a CUDA device.
        features: the values of `criterion.features`, each broadcastable to [out, in]; W may be
            left out, since it is the weight.

    Raises:
        StatisticsError: a feature is missing.
    """
    kernels = import_kernels(plan(criterion).source, kernel_folder())
    rows, columns = weight.shape
    scores = torch.empty(rows, columns, dtype=torch.float32, device=weight.device)
    grid = rows, -(-columns // _SCORES_PER_PROGRAM)
    arguments = _arguments(criterion, weight, features)
    with on_device_of(weight):
        kernels.score_kernel[grid](
            scores, columns, *arguments, BLOCK=_SCORES_PER_PROGRAM, num_warps=4, **KERNEL_OPTIONS
        )
    return scores


def fused_mask(
    criterion: Criterion,
    weight: torch.Tensor,
    features: Mapping[str, torch.Tensor],
    sparsity: float,
    *,
    compare: str = "row",
    pattern: str = "free",
) -> torch.Tensor:
    """The mask of one matrix, bool [out, in]: True = keep; what `select` makes of `fused_score`.

    Args:
        criterion: the formula.
        weight: [out, in], any float type and memory layout, on a CUDA device.
        features: as for `fused_score`.
        sparsity: fraction of each group to remove, at least 0 and below 1, rounded down.
        compare: as for `select`.
        pattern: as for `select`.

    Raises:
        SelectionError: the request cannot be satisfied.
        ScoreError: a score is NaN or infinite. (Scores that are all equal pass here.)
        StatisticsError: a feature is missing.
    """
    request = checked_request(weight.shape[1], sparsity, compare=compare, pattern=pattern)
    if weight.numel() == 0 or not can_fuse(compare, pattern):
        scores = fused_score(criterion, weight, features)
        return select(scores, sparsity, compare=compare, pattern=pattern)
    chosen = selected(criterion, weight, features, request)
    if chosen.has_faults:
        refuse_non_finite(fused_score(criterion, weight, features))
    return chosen.kept


@dataclass(frozen=True)
class Selected:
    """What the kernels say of one matrix; it may only be used without faults."""

    kept: torch.Tensor
    """True = keep; bool [out, in], or uint8 [out, ceil(in / 8)] with the first weight lowest"""
    tallies: torch.Tensor
    """int32 [programs, 4]: scores not finite, rows or groups tied, the lowest and highest key"""

    @property
    def has_faults(self) -> bool:
        """Whether a score is NaN or infinite, and the mask worth nothing."""
        return bool(self.tallies[:, 0].any())

    @property
    def ranks_nothing(self) -> bool:
        """Whether all scores are equal."""
        return bool(self.tallies[:, 2].min() == self.tallies[:, 3].max())

    @property
    def ties(self) -> int:
        """Rows, or groups of a pattern, in which only places tell who goes and who stays."""
        return int(self.tallies[:, 1].sum())


def selected(
    criterion: Criterion,
    weight: torch.Tensor,
    features: Mapping[str, torch.Tensor],
    request: Pattern | int,
    *,
    is_packed: bool = False,
) -> Selected:
    """The mask of one matrix by its rows, for requests that are known to fit.

    Args:
        criterion, weight, features: as for `fused_mask`; at least one weight.
        request: a pattern as wide as `WIDEST_PATTERN` at most, or how many weights of a row go.
        is_packed: write eight weights into a byte.

    Raises:
        StatisticsError: a feature is missing.
    """
    columns = weight.shape[1]
    if isinstance(request, int) and columns > WIDEST_FUSED_ROW:
        weight = fused_score(criterion, weight, features)
        criterion, features = _stored(), {}
    kernels = import_kernels(plan(criterion).source, kernel_folder())
    arguments = _arguments(criterion, weight, features)
    select_by = _rows if isinstance(request, int) else _groups
    width = -(-columns // 8) if is_packed else columns
    dtype = torch.uint8 if is_packed else torch.bool
    kept = torch.empty(weight.shape[0], width, dtype=dtype, device=weight.device)
    with on_device_of(weight):
        tallies = select_by(kernels, kept, columns, request, arguments)
    return Selected(kept, tallies)


@lru_cache(maxsize=1)
def _stored() -> Criterion:
    """Scores that lie in memory are a matrix like any other to the kernels."""
    return Criterion.parse("W")


def _rows(
    kernels: ModuleType, kept: torch.Tensor, columns: int, remove: Any, arguments: list[Any]
) -> torch.Tensor:
    """Fill the mask row by row; returns the tallies of `Selected`."""
    is_packed = kept.dtype == torch.uint8
    tallies = torch.empty(kept.shape[0], 4, dtype=torch.int32, device=kept.device)
    is_long = columns > WIDEST_ROW
    block = _PIECE if is_long else _next_power_of_two(max(columns, 8))
    kernel = kernels.long_row_kernel if is_long else kernels.row_kernel
    kernel[(kept.shape[0],)](
        kept,
        tallies,
        columns,
        kept.shape[1] * 8 if is_packed else columns,
        remove,
        *arguments,
        BLOCK=block,
        PACKED=is_packed,
        num_warps=min(max(block // 512, 4), 16),
        **KERNEL_OPTIONS,
    )
    return tallies


def _groups(
    kernels: ModuleType, kept: torch.Tensor, columns: int, pattern: Any, arguments: list[Any]
) -> torch.Tensor:
    """Fill the mask group by group; returns the tallies of `Selected`."""
    width = _next_power_of_two(pattern.of)
    is_packed = kept.dtype == torch.uint8
    if is_packed and width > pattern.of:
        whole = torch.empty(kept.shape[0], columns, dtype=torch.bool, device=kept.device)
        tallies = _groups(kernels, whole, columns, pattern, arguments)
        kept.copy_(packed(whole))
        return tallies
    groups_per_row = columns // pattern.of
    groups = min(max(_PAIRS_PER_PROGRAM // width**2, 8), _next_power_of_two(groups_per_row))
    groups = max(groups, -(-8 // width))
    pieces = -(-groups_per_row // groups)
    tallies = torch.empty(kept.shape[0] * pieces, 4, dtype=torch.int32, device=kept.device)
    kernels.pattern_kernel[(kept.shape[0], pieces)](
        kept,
        tallies,
        groups_per_row,
        kept.shape[1] * 8 if is_packed else columns,
        pattern.of - pattern.keep,
        *arguments,
        OF=pattern.of,
        WIDTH=width,
        GROUPS=groups,
        PACKED=is_packed,
        num_warps=4,
        **KERNEL_OPTIONS,
    )
    return tallies


def packed(kept: torch.Tensor) -> torch.Tensor:
    """A mask [out, in] as uint8 [out, ceil(in / 8)], eight weights to a byte, the first lowest."""
    filled = torch.nn.functional.pad(kept.to(torch.uint8), (0, -kept.shape[1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (filled.view(kept.shape[0], -1, 8) << places).sum(2, dtype=torch.uint8)


def unpacked(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """The mask bool [out, columns] of which `packed` makes the bytes."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> places) & 1).view(bits.shape[0], -1)[:, :columns].bool()


def _arguments(
    criterion: Criterion, weight: torch.Tensor, features: Mapping[str, torch.Tensor]
) -> list[Any]:
    """What the criterion's kernels read: every input with its two strides, then the constants."""
    planned = plan(criterion)
    values = {**features, "W": weight.detach()}
    missing = [name for name in criterion.features if name not in values]
    if missing:
        raise StatisticsError(
            f"the criterion reads {missing[0]} but no values of it were given; "
            f"pass all of {', '.join(criterion.features)}"
        )
    if planned.before:
        values |= _computed_before(planned, {name: values[name] for name in criterion.features})
    arguments: list[Any] = []
    for name in planned.inputs:
        value = values[name].expand(weight.shape)
        arguments += [value, *value.stride()]
    return [*arguments, *planned.constants]


def _computed_before(planned: Plan, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values that the kernel does not compute itself, by the operators' own torch templates."""
    values: dict[str, Any] = {name: value.float() for name, value in features.items()}
    with torch.no_grad():
        exec(planned.before, {"torch": torch}, values)
    return values


def on_device_of(weight: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch where the weight lies; the interpreter, which tests use, needs no device."""
    on_cuda = weight.device.type == "cuda"
    return torch.cuda.device(weight.device) if on_cuda else contextlib.nullcontext()


def _next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
