"""What a mask does to weights: those that go become exact zeros, and can be counted.

On the CPU both work on the bits of the weights, as whole numbers: there torch fills by a mask, and
counts a comparison, element by element.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def clear(weight: Tensor, keep: Tensor) -> Tensor:
    """Set the weights that do not stay to 0.0, in place; returns the weight.

    Args:
        weight: of any floating dtype, NaN and infinities included.
        keep: bool, broadcastable to the weight: True = keep.
    """
    if weight.device.type != "cpu":
        return weight.masked_fill_(~keep, 0.0)
    # Multiplying the weights themselves would leave NaN, or -0.0, a value to some kernels.
    _bits(weight).mul_(keep)
    return weight


def cleared(weight: Tensor, keep: Tensor) -> Tensor:
    """`clear` on a copy."""
    if weight.device.type != "cpu":
        return weight.masked_fill(~keep, 0.0)
    return clear(weight.clone(), keep)


def count_zeros(weight: Tensor) -> int:
    """How many weights are zero, 0.0 or -0.0."""
    if weight.device.type != "cpu":
        return int((weight == 0).sum())
    # The shift drops the sign.
    return weight.numel() - int(np.count_nonzero(_bits(weight.detach()).numpy() << 1))


def _bits(weight: Tensor) -> Tensor:
    return weight.view(_BITS[weight.dtype.itemsize])
