"""A criterion as one Triton kernel: weights and features are read once, and a mask is written.

Scores live in registers, in float32, and are never stored: a bfloat16 score would tie half of all
rows at their threshold. A row narrows its threshold down on integers that order as the scores do,
stopping as soon as the count is right (`kernels/rows.py`); N:M ranks every group by pairs
(`kernels/patterns.py`). Both give, bit for bit, the mask that `selection.select` makes from the
same scores, lower index first.

Rows wider than `launches.widest_row` have their scores written first. Where `can_fuse` says no
(groups other than rows, very wide patterns) torch selects from the scores.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prunezero.errors import StatisticsError
from prunezero.formula.criterion import Criterion
from prunezero.scoring.kernels import launches
from prunezero.scoring.kernels.files import import_kernels, kernel_folder
from prunezero.scoring.kernels.launches import KERNEL_OPTIONS, WIDEST_PATTERN, fill, on_device_of
from prunezero.scoring.kernels.source import Plan, plan
from prunezero.scoring.request import Pattern, checked_request, parse_pattern
from prunezero.scoring.selection import refuse_non_finite, select

_SCORES_PER_PROGRAM = 1024
# The keys of the infinities; NaN lies beyond them.
_INFINITE = 0x7F800000, -0x7F800001


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
    """True = keep; bool [out, in]"""
    extremes: torch.Tensor
    """int32 [programs, 2]: the lowest and the highest score that a program met, as keys"""
    tied: torch.Tensor
    """int32 [programs]: rows or groups that `ties` counts"""

    @functools.cached_property
    def _range(self) -> tuple[int, int]:
        # Read once: whoever asks waits for the device.
        lowest, highest = torch.stack(torch.aminmax(self.extremes)).tolist()
        return lowest, highest

    @property
    def has_faults(self) -> bool:
        """Whether a score is NaN or infinite, and the mask worth nothing."""
        lowest, highest = self._range
        return highest >= _INFINITE[0] or lowest <= _INFINITE[1]

    @property
    def ranks_nothing(self) -> bool:
        """Whether all scores are equal."""
        lowest, highest = self._range
        return lowest == highest

    @property
    def ties(self) -> int:
        """Rows, or groups of a pattern, in which only places tell who goes and who stays."""
        return int(self.tied.sum())


def selected(
    criterion: Criterion,
    weight: torch.Tensor,
    features: Mapping[str, torch.Tensor],
    request: Pattern | int,
) -> Selected:
    """The mask of one matrix by its rows, for requests that are known to fit.

    Args:
        criterion, weight, features: as for `fused_mask`; at least one weight.
        request: a pattern as wide as `launches.WIDEST_PATTERN` at most, or how many weights of a
            row go.

    Raises:
        StatisticsError: a feature is missing.
    """
    columns = weight.shape[1]
    if isinstance(request, int) and columns > launches.widest_row(plan(criterion).size):
        weight = fused_score(criterion, weight, features)
        criterion, features = stored(), {}
    planned = plan(criterion)
    kernels = import_kernels(planned.source, kernel_folder())
    arguments = _arguments(criterion, weight, features)
    kept = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    with on_device_of(weight):
        return Selected(kept, *fill(kernels, planned.size, kept, request, arguments))


@functools.lru_cache(maxsize=1)
def stored() -> Criterion:
    """Scores that lie in memory are a matrix like any other to the kernels."""
    return Criterion.parse("W")


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
        if value.stride(1) > 1:
            # Neighbours in a row are read together.
            value = value.contiguous()
        arguments += [value, *value.stride()]
    return [*arguments, *planned.constants]


def _computed_before(planned: Plan, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values that the kernel does not compute itself, by the operators' own torch templates."""
    values: dict[str, Any] = {name: value.float() for name, value in features.items()}
    with torch.no_grad():
        exec(planned.before, {"torch": torch}, values)
    return values
