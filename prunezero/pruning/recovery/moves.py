"""What is an optimizer about to do, before it does it?

A step is tried on a copy, so that the answer is right for every optimizer without a second formula.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Gradients of all layers together are scaled down to this norm.
HIGHEST_NORM = 1.0


def clip_scale(masters: Sequence[Tensor]) -> float:
    """By what the gradients of tensors in training are about to be multiplied, 1 at most."""
    norm = nn.utils.get_total_norm([one.grad for one in masters if one.grad is not None])
    # As torch does it.
    return min(1.0, HIGHEST_NORM / (float(norm) + 1e-6))


@torch.no_grad()
def coming_move(optimizer: torch.optim.Optimizer, master: Tensor, scale: float = 1.0) -> Tensor:
    """What the coming step takes from a tensor in training at a learning rate of 1, of its shape.

    Nothing changes. Weights do not decay in our trainings, so it does not depend on their values.

    Args:
        optimizer: of one group of parameters.
        master: one of them, with its gradient; without one it does not move.
        scale: by which the gradient is multiplied before the optimizer sees it, as by clipping.
    """
    if master.grad is None:
        return torch.zeros_like(master)
    trial = torch.zeros_like(master)
    trial.grad = master.grad * scale
    twin = type(optimizer)([trial], lr=1.0)  # type: ignore[call-arg]
    (own,), (group,) = twin.param_groups, optimizer.param_groups
    own |= {key: value for key, value in group.items() if key not in ("params", "lr")}
    if master in optimizer.state:
        twin.state[trial] = copy.deepcopy(optimizer.state[master])
    twin.step()
    return -trial
