"""Spectra of weight matrices: how heavy is the tail?

Trained matrices have eigenvalues of W'W whose density falls like a power, value^-exponent, beyond
the peak; the better a matrix is trained, the smaller the exponent, the heavier the tail.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunezero.errors import ModelError

# The peak of the density is that of a histogram of the logarithms with so many equal bins.
BINS = 100
# The tail begins within these multiples of the peak, where a power law fits best.
NEAREST, FARTHEST = 0.95, 1.5


def spectral_exponent(weight: Tensor, *, layer: str) -> float:
    """Exponent of the power law that the tail of the squared singular values follows.

    Args:
        weight: [out, in], any floating dtype; computed in float32.
        layer: named in the error.

    Raises:
        ModelError: numbers that are not finite, or no two different singular values above rounding.

    Source: Lu et al. 2024, arXiv:2410.10912; see `tail_exponent`.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(
            f"the weight of '{layer}' holds NaN or infinite numbers; check that the model is sound"
        )
    singular = torch.linalg.svdvals(weight.float())
    rounding = torch.finfo(torch.float32).eps * max(weight.shape) * float(singular.max())
    kept = singular[singular > rounding].double()
    if kept.numel() < 2 or bool(kept.max() == kept.min()):
        raise ModelError(
            f"the weight of '{layer}' has {kept.numel()} singular values above rounding, which "
            "hold no tail; leave it out with ignore, or choose another way to allocate"
        )
    return tail_exponent(kept.square())


def tail_exponent(values: Tensor) -> float:
    """Exponent a of the density x^-a that fits the values above a threshold near their peak.

    The threshold is one of the values: of those from 0.95 to 1.5 times the peak of the histogram of
    logarithms (100 bins; the left edge of the fullest, the lower of two) the one whose fit has the
    smallest Kolmogorov-Smirnov distance; the value nearest to that range when none lies in it. The
    fit is Hill's: 1 + k / sum log(x / threshold) over the k values above the threshold.

    Args:
        values: [count], positive, not all equal.

    Source: Hill 1975, doi:10.1214/aos/1176343247; threshold by distance from Clauset et al. 2009,
    arXiv:0706.1062.
    """
    logs = values.double().sort().values.log()
    return min(_fit(logs, threshold) for threshold in _thresholds(logs))[1]


def _thresholds(logs: Tensor) -> list[float]:
    """Logarithms of the thresholds to try, in rising order; `logs` is sorted."""
    counts, edges = torch.histogram(logs.cpu(), bins=BINS)
    peak = float(edges[counts.argmax()])
    # Above the largest value there is no tail.
    usable = torch.unique(logs[logs < logs[-1]])
    lowest, highest = peak + math.log(NEAREST), peak + math.log(FARTHEST)
    near = usable[(usable >= lowest) & (usable <= highest)]
    if near.numel() == 0:
        near = usable[(usable - peak).abs().argmin()][None]
    return near.tolist()


def _fit(logs: Tensor, threshold: float) -> tuple[float, float]:
    """Distance and exponent of the power law above a threshold."""
    above = logs[logs > threshold] - threshold
    count = above.numel()
    slope = count / float(above.sum())
    fitted = 1 - (-slope * above).exp()
    steps = torch.arange(count + 1, dtype=above.dtype, device=above.device) / count
    distance = max(float((steps[1:] - fitted).max()), float((fitted - steps[:-1]).max()))
    return distance, 1 + slope
