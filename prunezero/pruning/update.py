"""How are the weights that stay mended, once a mask is chosen?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def keep(weight: Tensor, mask: Tensor) -> None:
    """Leave the weights that stay as they are, and set the others to exactly +0.0, in place.

    Args:
        weight: `[out, in]`, modified.
        mask: bool `[out, in]`, True = keep.

    Multiplying by the mask instead would leave -0.0, which some kernels read as a value.
    """
    weight.masked_fill_(~mask, 0.0)


# By the recipe's word: a weight `[out, in]` to change in place, and its mask.
UPDATES: dict[str, Callable[[Tensor, Tensor], None]] = {"none": keep}
