"""Which norms are RMSNorms, and what does each multiply by?

Families write the same norm in two ways, with a factor w or 1 + w; which it is shows in what the
module computes, so no name of a class is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunezero.models.anatomy.block_probe import relative_change
from prunezero.models.editing.permuting import ROUNDING, ROUNDING_OF_LOGITS


@dataclass(frozen=True)
class RmsNorm:
    """A norm that computes factor * x / sqrt(mean(x^2) + eps)."""

    factor: Tensor
    """[width], float64"""
    neutral: float
    """the number in its weight that stands for the factor 1"""
    eps: float


def rms_norm(module: Any) -> RmsNorm | None:
    """What a module computes, if it is an RMSNorm of one vector; None where it is not."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    vectors = dict(module.named_parameters(recurse=False))
    if list(vectors) != ["weight"] or not isinstance(eps, float):
        return None
    weight = module.weight.detach()
    generator = torch.Generator().manual_seed(0)
    # Small numbers too, beside which eps is seen.
    sizes = torch.tensor([1.0, eps**0.5])[:, None]
    x = (torch.randn(2, len(weight), generator=generator) * sizes).to(weight)
    exact = x.double()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    with torch.no_grad():
        found = module(x)
    for neutral in (1.0, 0.0):
        factor = weight.double() + (1.0 - neutral)
        rounding = ROUNDING_OF_LOGITS.get(weight.dtype, ROUNDING)
        if relative_change(found.double(), factor * exact) <= rounding:
            return RmsNorm(factor, neutral, eps)
    return None
