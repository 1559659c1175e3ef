"""A criterion as one Triton kernel: weights and features are read once, and a mask is written.

Scores live in registers, in float32, and are never stored: a bfloat16 score would tie half of all
rows at their threshold. A row finds its threshold by bisection on integers that order as the scores
do, stopping as soon as the count is right; N:M ranks every group by pairs. Both give, bit for bit,
the mask that `selection.select` makes from the same scores, lower index first.

Where `can_fuse` says no (groups other than rows, rows wider than `WIDEST_ROW`, very wide patterns)
the kernel writes the scores, and torch selects from them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from prunezero.errors import StatisticsError
from prunezero.formula.criterion import Criterion
from prunezero.scoring.kernel_files import import_kernels, kernel_folder
from prunezero.scoring.kernel_source import Plan, plan
from prunezero.scoring.request import Pattern, check_request, parse_pattern, removed_count
from prunezero.scoring.selection import refuse_non_finite, select

# A wider row no longer fits the registers of one program (measured for sm_90).
WIDEST_ROW = 16384
# All pairs of a wider group no longer fit.
WIDEST_PATTERN = 64
_PAIRS_PER_PROGRAM = 4096
_SCORES_PER_PROGRAM = 1024
# Multiply-add fused into one rounding would give other scores than torch.
_OPTIONS = {"enable_fp_fusion": False}


def can_fuse(compare: str, pattern: str, columns: int) -> bool:
    """Whether score and selection fit into one kernel; False also where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return False
    parsed = parse_pattern(pattern)
    if parsed is not None:
        return parsed.of <= WIDEST_PATTERN
    return compare == "row" and columns <= WIDEST_ROW


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
    with _device_of(weight):
        kernels.score_kernel[grid](
            scores, columns, *arguments, BLOCK=_SCORES_PER_PROGRAM, num_warps=4, **_OPTIONS
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
    parsed = check_request(weight.shape[1], sparsity, compare=compare, pattern=pattern)
    if weight.numel() == 0 or not can_fuse(compare, pattern, weight.shape[1]):
        scores = fused_score(criterion, weight, features)
        return select(scores, sparsity, compare=compare, pattern=pattern)
    kernels = import_kernels(plan(criterion).source, kernel_folder())
    arguments = _arguments(criterion, weight, features)
    kept = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    with _device_of(weight):
        if parsed is None:
            faults = _select_rows(kernels, kept, sparsity, arguments)
        else:
            faults = _select_pattern(kernels, kept, parsed, arguments)
    if int(faults.sum()):
        refuse_non_finite(fused_score(criterion, weight, features))
    return kept


def _select_rows(
    kernels: ModuleType, kept: torch.Tensor, sparsity: float, arguments: list[Any]
) -> torch.Tensor:
    """Fill the mask row by row; returns how many scores of each row are not finite."""
    rows, columns = kept.shape
    faults = torch.empty(rows, dtype=torch.int32, device=kept.device)
    block = _next_power_of_two(columns)
    kernels.row_kernel[(rows,)](
        kept,
        faults,
        columns,
        removed_count(columns, sparsity),
        *arguments,
        BLOCK=block,
        num_warps=min(max(block // 512, 4), 16),
        **_OPTIONS,
    )
    return faults


def _select_pattern(
    kernels: ModuleType, kept: torch.Tensor, pattern: Pattern, arguments: list[Any]
) -> torch.Tensor:
    """Fill the mask group by group; returns how many scores of each program are not finite."""
    width = _next_power_of_two(pattern.of)
    groups = kept.numel() // pattern.of
    groups_per_program = max(_PAIRS_PER_PROGRAM // width**2, 1)
    programs = -(-groups // groups_per_program)
    faults = torch.empty(programs, dtype=torch.int32, device=kept.device)
    kernels.pattern_kernel[(programs,)](
        kept,
        faults,
        groups,
        kept.shape[1] // pattern.of,
        pattern.of - pattern.keep,
        *arguments,
        OF=pattern.of,
        WIDTH=width,
        GROUPS=groups_per_program,
        num_warps=4,
        **_OPTIONS,
    )
    return faults


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
        exec(planned.before, {"__builtins__": {}, "torch": torch}, values)
    return values


def _device_of(weight: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch where the weight lies; the interpreter, which tests use, needs no device."""
    on_cuda = weight.device.type == "cuda"
    return torch.cuda.device(weight.device) if on_cuda else contextlib.nullcontext()


def _next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
