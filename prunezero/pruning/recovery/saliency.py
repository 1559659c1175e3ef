"""By what are units told apart whose weights are in training: five terms, and their shares.

Of all weights x of a unit, in all matrices that it has a part in, and of a direction d, against
which the optimizer is about to move them:

    norm |x|   mean |x_i|   1 + cos(x, d)   |sum x_i d_i|   (sum x_i d_i)^2 / 2

the last two being the first and second order of a Taylor series. Each is divided by its norm over
all units of the model that may go, so that sizes of different kinds can be added up.

Source: HESSO, Chen et al. 2024, arXiv:2409.09085, and its code, which takes the mean of the five.
There the norm is over all units; that those count which still may go, and that the cosine of a unit
without weights or without direction is 0, is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prunezero.models.anatomy.groups import Group


def unit_terms(group: Group, moving: Callable[[str], tuple[Tensor, Tensor]]) -> Tensor:
    """The five terms of the units of a group, in the order of `UNIT_TERMS`: float64 [5, units].

    Args:
        moving: weight and direction [out, in] of a layer, by its name.
    """
    square, magnitude, steep, product = torch.zeros(
        4, group.units, dtype=torch.float64, device=group.device
    )
    for member in group.members:
        weight, direction = (member.oriented(one.double()) for one in moving(member.linear.name))
        square += weight.square().sum(1)
        magnitude += weight.abs().sum(1)
        steep += direction.square().sum(1)
        product += (weight * direction).sum(1)
    count = sum(member.rest for member in group.members)
    sizes = (square * steep).sqrt()
    cosine = torch.where(sizes > 0, product / sizes.where(sizes > 0, 1.0), 0.0)
    return torch.stack(
        [square.sqrt(), magnitude / count, 1 + cosine, product.abs(), product.square() / 2]
    )


def shares(terms: Sequence[Tensor], free: Sequence[Tensor]) -> list[Tensor]:
    """Terms of all groups, each over its norm over all units that may go; 0 where all are 0.

    Args:
        terms: [terms, units] of each group.
        free: which units may still go, bool [units] of each group.
    """
    parts = [one[:, may.to(one.device)].cpu() for one, may in zip(terms, free, strict=True)]
    norms = torch.cat(parts, 1).norm(dim=1)
    over = torch.where(norms > 0, 1 / norms.where(norms > 0, 1.0), 0.0)
    return [one * over[:, None].to(one.device) for one in terms]
