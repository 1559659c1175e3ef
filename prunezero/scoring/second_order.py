"""What does the Gram matrix of a layer's inputs say about removing a weight and mending the others?

With H = sum over tokens of x x^T, per sequence, a change d of one row of the weight changes its
outputs by d H d^T. The inverse of the damped H is kept as its upper Cholesky factor U,
H^-1 = U^T U, in which columns behind j are already conditioned on the columns before them:
U_jj^2 = [(H_{j:,j:})^-1]_11.

Source: Frantar & Alistarh 2023, SparseGPT, arXiv:2301.00774, section 3.3.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prunezero.errors import FactorizationError, StatisticsError
from prunezero.formula.features import FEATURES
from prunezero.scoring.statistics import Statistics, sum_of
from prunezero.scoring.torch_text import feature_function

# Share of the mean diagonal that is added before the inversion: SparseGPT's choice.
DAMPING = 0.01
# A matrix that is not positive definite with its whole mean diagonal added has another fault.
LARGEST_DAMPING = 1.0
# Triangles that are not cut any further.
_SOLVED_AT_ONCE = 192
# Features that follow from the factor.
OF_FACTOR = tuple(name for name, row in FEATURES.items() if "upper" in row.inputs)
# Features that look at an inverse in any way, and so at the damping.
DAMPED = frozenset(
    name
    for name, row in FEATURES.items()
    if not {"upper", "inverse", "centred_inverse"}.isdisjoint(row.inputs)
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InverseFactor:
    """The upper Cholesky factor of the inverse of a damped Gram matrix."""

    upper: Tensor
    """U `[in, in]` float32, H^-1 = U^T U"""
    features: dict[str, Tensor]
    """values of the features that follow from it, float32, by name"""
    dead: Tensor
    """bool `[in]`: channels that were zero in all calibration text; they count as mean ones"""
    damping: float
    """share of the mean diagonal that was added in the end"""


def inverse_factor(
    gram: Tensor, damping: float = DAMPING, *, sequences: int = 1, layer: str = ""
) -> InverseFactor:
    """The factor of a Gram matrix, damped until it is positive definite.

    Starts at `damping` times the mean of the diagonal, and takes ten times as much after every
    failure, on the diagonal as it was. More than the start is logged. The arithmetic is float64.

    Args:
        gram: `[in, in]`, symmetric; only its upper triangle is read.
        damping: a fraction above 0.
        sequences: that the matrix is the sum of.
        layer: its name, for messages.

    Raises:
        StatisticsError: the matrix holds NaN or infinite numbers; no damping mends those.
        FactorizationError: even the largest damping leaves it not positive definite.
    """
    upper, dead, added = _damped_upper(gram, damping, sequences, layer or "a layer")
    features = {name: feature_function(name)(upper=upper) for name in OF_FACTOR}
    return InverseFactor(upper.float(), features, dead, added)


def damped_inverse(
    gram: Tensor, damping: float = DAMPING, *, sequences: int = 1, layer: str = ""
) -> Tensor:
    """The inverse of a Gram matrix, damped as `inverse_factor` does it; float64 `[in, in]`.

    Raises:
        StatisticsError, FactorizationError: as `inverse_factor`.
    """
    upper, _, _ = _damped_upper(gram, damping, sequences, layer or "a layer")
    return upper.T @ upper


def damped_gram(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """A Gram matrix with a share of its mean diagonal added, float64; dead channels count as mean.

    Args:
        gram: `[in, in]`, symmetric.
    """
    matrix = gram.to(torch.float64, copy=True)
    diagonal, _ = _living_diagonal(matrix)
    matrix.diagonal().copy_(diagonal + damping * diagonal.mean())
    return matrix


def _living_diagonal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal with the mean for dead channels, and which channels are dead."""
    diagonal = matrix.diagonal().clone()
    dead = diagonal == 0
    # One, as SparseGPT's code has it, would be in no unit, and would damp small inputs away.
    diagonal[dead] = 1.0 if bool(dead.all()) else diagonal[~dead].mean()
    return diagonal, dead


def _damped_upper(
    gram: Tensor, damping: float, sequences: int, where: str
) -> tuple[Tensor, Tensor, float]:
    """The factor in float64, which channels are dead, and the damping in the end."""
    if not bool(torch.isfinite(gram).all()):
        raise StatisticsError(
            f"the Gram matrix of {where} holds NaN or infinite numbers; try --dtype float32, or "
            "check that the model itself is sound"
        )
    matrix = gram.to(torch.float64, copy=True).div_(sequences)
    diagonal, dead = _living_diagonal(matrix)
    tries = [damping]
    while tries[-1] < LARGEST_DAMPING:
        tries.append(min(10 * tries[-1], LARGEST_DAMPING))
    for added in tries:
        matrix.diagonal().copy_(diagonal + added * diagonal.mean())
        upper = _inverse_upper(matrix)
        if upper is not None:
            if added > damping:
                _log.warning("%s: damping raised from %g to %g", where, damping, added)
            return upper, dead, added
    raise FactorizationError(
        f"the Gram matrix of {where} is not positive definite, even with {tries[-1]:g} of its "
        "mean diagonal added; calibrate with more text"
    )


def _inverse_upper(matrix: Tensor) -> Tensor | None:
    """U with (U^T U) inverse to the matrix; None when it is not positive definite.

    H = R R^T with R upper is the Cholesky factorization of H with rows and columns reversed, and
    U is the inverse of R: half the work of inverting H and factoring the inverse, and more exact.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(failed) != 0:
        return None
    upper = _inverse_of_upper(lower.flip(0, 1))
    return upper if math.isfinite(float(upper.sum())) else None


def _inverse_of_upper(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, by halves: a third of a full solve's work."""
    width = len(upper)
    if width <= _SOLVED_AT_ONCE:
        identity = torch.eye(width, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, identity, upper=True)
    half = width // 2
    found = torch.zeros_like(upper)
    found[:half, :half] = _inverse_of_upper(upper[:half, :half])
    found[half:, half:] = _inverse_of_upper(upper[half:, half:])
    between = found[:half, :half] @ upper[:half, half:]
    torch.mm(between, found[half:, half:], out=found[:half, half:]).neg_()
    return found


def factor_of(
    statistics: Statistics | None, damping: float = DAMPING, *, layer: str = ""
) -> InverseFactor:
    """The factor of a layer's Gram matrix per sequence; remembered until `forget_factors`.

    Raises:
        StatisticsError, FactorizationError: as `inverse_factor`, or the sum `gram` is missing.
    """
    gram = sum_of(statistics, "gram")
    assert statistics is not None  # sum_of refused it; for the type checker
    if ("factor", damping) not in statistics.memo:
        factor = inverse_factor(gram, damping, sequences=statistics.sequences, layer=layer)
        statistics.memo["factor", damping] = factor
        statistics.memo["features", damping] = factor.features
    factor_: InverseFactor = statistics.memo["factor", damping]
    return factor_


def share_gram(first: Statistics, second: Statistics) -> bool:
    """Whether two layers read the same inputs, as q, k and v do; then they share all of H."""
    left, right = first.sums.get("gram"), second.sums.get("gram")
    if left is None or right is None or left.shape != right.shape:
        return False
    if first.sequences != second.sequences or not (left is right or torch.equal(left, right)):
        return False
    second.share(first, "gram")
    return True


def forget_factors(statistics: Statistics) -> None:
    """Free the factors, which are as large as the Gram matrix; features of them stay."""
    for key in [key for key in statistics.memo if key[0] == "factor"]:
        del statistics.memo[key]


def factor_feature(name: str, statistics: Statistics | None, damping: float) -> Tensor:
    """The value of a feature that follows from the factor, float32.

    Args:
        name: one of `OF_FACTOR`.

    Raises:
        StatisticsError, FactorizationError: as `factor_of`.
    """
    sum_of(statistics, "gram")
    assert statistics is not None  # sum_of refused it; for the type checker
    if ("features", damping) not in statistics.memo:
        factor_of(statistics, damping)
        forget_factors(statistics)
    features: dict[str, Tensor] = statistics.memo["features", damping]
    return features[name]
