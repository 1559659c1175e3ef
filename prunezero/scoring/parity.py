"""Do kernels and the CPU choose the same weights, and if not, how near were those to the threshold?

Exponentials, logarithms and powers are approximations that end in other last bits on other devices,
so two scores on either side of a threshold may change places. That is all that may happen: a weight
on which masks differ has a score within a few units in the last place of its group's threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from prunezero.formula.criterion import Criterion
from prunezero.scoring.fused import fused_mask, fused_score
from prunezero.scoring.request import check_request, removed_count
from prunezero.scoring.score import evaluate
from prunezero.scoring.selection import select


@dataclass(frozen=True)
class Parity:
    """How two masks of one formula differ, in weights and in units in the last place (ulp)."""

    weights: int
    """that were compared"""
    differing: int
    """that only one of the two masks keeps"""
    scores: int
    """greatest distance between the two scores of a weight, in ulp"""
    threshold: int
    """greatest distance from the threshold of a differing weight's score, in ulp; 0 without any"""

    def __str__(self) -> str:
        if not self.differing:
            return f"equal masks of {self.weights} weights (scores within {self.scores} ulp)"
        return (
            f"{self.differing} of {self.weights} weights differ, within {self.threshold} ulp of "
            f"their threshold (scores within {self.scores} ulp)"
        )


def parity(
    criterion: Criterion,
    weight: Tensor,
    features: Mapping[str, Tensor],
    sparsity: float,
    *,
    pattern: str = "free",
) -> Parity:
    """The mask by kernels on the weight's device beside the mask by torch on the CPU.

    Args:
        weight: `[out, in]`, on a CUDA device.
        features: as for `fused_score`.
        pattern: free, by rows, or N:M.

    Raises:
        SelectionError, ScoreError, StatisticsError: as `fused_mask`.
    """
    by_kernel = fused_score(criterion, weight, features).cpu()
    kept = fused_mask(criterion, weight, features, sparsity, pattern=pattern).cpu()
    here = {name: value.cpu().float() for name, value in features.items()}
    here["W"] = weight.detach().cpu().float()
    read = {name: here[name] for name in criterion.features}
    scores = evaluate(criterion, read, weight.shape).contiguous()
    differs = (kept != select(scores, sparsity, pattern=pattern)).numpy()
    parsed = check_request(weight.shape[1], sparsity, pattern=pattern)
    groups = _places(scores).reshape(-1, parsed.of if parsed else weight.shape[1])
    remove = parsed.of - parsed.keep if parsed else removed_count(weight.shape[1], sparsity)
    threshold = np.sort(groups, axis=1)[:, max(remove, 1) - 1, None]
    away = np.abs(groups - threshold)[differs.reshape(groups.shape)]
    return Parity(
        weight.numel(),
        int(differs.sum()),
        int(np.abs(_places(scores) - _places(by_kernel)).max()),
        int(away.max(initial=0)),
    )


def _places(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """The place of each float32 among all of them, so that differences count those between."""
    bits = values.float().numpy().view(np.int32).astype(np.int64)
    return np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
