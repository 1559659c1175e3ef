"""Which values should the kept weights take, once a mask is fixed?

Those that bring the layer's outputs on the calibration text closest to the dense ones: a least
squares problem per row, all rows with one matrix. ADMM solves it by going back and forth between
a step that forgets the mask and one that applies it, and needs one factorisation in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunezero.errors import FactorizationError, StatisticsError
from prunezero.pruning.recipes.word_options import Admm
from prunezero.scoring.masking import clear


def refit(weight: Tensor, mask: Tensor, gram: Tensor, options: Admm) -> Tensor:
    """Weights float32 `[out, in]` that reproduce the dense outputs as well as the mask allows.

    Minimises tr((W' - W) H (W' - W)^T) over the W' that are zero outside the mask. H is the Gram
    matrix scaled to unit diagonal, so that all inputs count alike, plus the damping.

    Args:
        weight: `[out, in]`, dense, of any floating dtype; not modified.
        mask: bool `[out, in]`, True = keep; removed weights become exactly +0.0.
        gram: `[in, in]`, sum of x x^T over tokens, at any positive scale. Kept weights of an input
            that was always zero stay as they are: they change no output.

    After few iterations the result is near the minimum, not at it; it may then be a little worse
    than the mask alone where inputs are hardly correlated.

    Raises:
        StatisticsError: `gram` is no Gram matrix, see `checked_gram`.

    Source: Boža 2024 (TMLR), arXiv:2401.02938, with the mask fixed.
    """
    diagonal = checked_gram(gram).diagonal()
    dead = diagonal == 0
    # Scaled inputs have norm one, so scaled weights are comparable across columns.
    scale = torch.where(dead, torch.ones_like(diagonal), diagonal.sqrt())
    dense = weight.float() * scale.float()
    pull = _inverse(gram / scale / scale[:, None], options) * options.rho
    target, dual = dense, torch.zeros_like(dense)
    for _ in range(options.iterations):
        masked = clear(target + dual, mask)
        dual += target - masked
        # (H + rho)^-1 (H W + rho (Z - U)), with H written as (H + rho) - rho.
        target = torch.addmm(dense, masked - dual - dense, pull)
    fitted = (target + dual) / scale.float()
    return clear(torch.where(dead, weight.float(), fitted), mask)


def checked_gram(gram: Tensor) -> Tensor:
    """The Gram matrix itself, once it is sure that it can be one.

    Raises:
        StatisticsError: an entry is NaN or infinite, or a diagonal entry is negative.
    """
    if not bool(torch.isfinite(gram).all()):
        raise StatisticsError(
            "the Gram matrix of the inputs holds NaN or infinite numbers; collect the statistics "
            "again, with --dtype float32"
        )
    if bool((gram.diagonal() < 0).any()):
        raise StatisticsError(
            "the Gram matrix of the inputs has a negative diagonal, so it is no sum of squares; "
            "collect the statistics again"
        )
    return gram


def _inverse(scaled: Tensor, options: Admm) -> Tensor:
    """The inverse of the Gram matrix with the damping and rho on its diagonal, which is one."""
    system = scaled.float()
    system.diagonal().add_(options.damping + options.rho)
    lower, failed = torch.linalg.cholesky_ex(system)
    if int(failed) != 0:
        raise FactorizationError(
            "the Gram matrix is not positive semidefinite, so it is no sum of squares; calibrate "
            "anew"
        )
    return torch.cholesky_inverse(lower)
