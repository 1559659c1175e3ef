"""Least squares on the columns that stay: what is left of a matrix takes over what the others gave.

Source: structured OBS, Kurtic et al. 2023, ZipLM, arXiv:2302.04089, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunezero.errors import FactorizationError
from prunezero.scoring.second_order import damped_gram


def refit_columns(weight: Tensor, kept: Tensor, gram: Tensor, *, damping: float) -> Tensor:
    """The matrix [out, in] with zeros in columns that go, that changes outputs the least.

    Minimises the squared change of the outputs over the inputs whose Gram matrix is given, where
    damping counts as inputs too, which holds the columns near what they were.

    Args:
        weight: [out, in], before.
        kept: bool [in], columns that stay.
        gram: [in, in], of the inputs, or of inputs without their mean where a bias takes that over.
        damping: share of its mean diagonal that is added.

    Raises:
        FactorizationError: the part of it that stays is singular.
    """
    if bool(kept.all()):
        return weight
    matrix = damped_gram(gram, damping)
    # What the others gave, as those that stay see it; half the work of solving for all they give.
    missing = matrix[kept][:, ~kept] @ weight[:, ~kept].double().T
    factor, failed = torch.linalg.cholesky_ex(matrix[kept][:, kept])
    if int(failed) != 0:
        raise FactorizationError(
            "the Gram matrix of the columns that stay is not positive definite; use more damping, "
            "or calibrate with more text"
        )
    taken_over = torch.cholesky_solve(missing, factor).T
    mended = torch.zeros_like(weight)
    mended[:, kept] = (weight[:, kept].double() + taken_over).to(weight.dtype)
    return mended
