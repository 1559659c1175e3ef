"""Scores and masks as published code makes them in torch, and with torch's quicker means.

Wanda's and Pruner-Zero's code sorts all scores of a row, stably, and marks the first half; N:M is a
loop over groups of columns with a `topk` in each. Both compute a score operation by operation. All
masks here say True for what goes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prunezero.scoring.request import Pattern, parse_pattern

SPARSITY = 0.5
# What is asked for by its word, as prunezero's pattern and for reading.
REQUESTS = {"rows": ("free", "50 % by rows"), "2:4": ("2:4", "2:4")}

Score = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Formula:
    """A criterion in both spellings."""

    text: str
    """as prunezero reads it"""
    eager: Score
    """float32 [out, in], one torch operation after the other"""
    matrices: tuple[str, ...]
    """what of it is as large as the weight"""


def _wanda(values: Mapping[str, Tensor]) -> Tensor:
    return torch.abs(values["W"]) * values["X"]


def _product(values: Mapping[str, Tensor]) -> Tensor:
    return torch.abs(values["W"].float()) * values["G"].float()


def _mixed(values: Mapping[str, Tensor]) -> Tensor:
    weight, gradient, inputs = values["W"].float(), values["G"].float(), values["X"]
    left = torch.abs(weight) * torch.sqrt(inputs) * torch.log(gradient + 1)
    return left + weight**2 * torch.tanh(gradient * inputs)


FORMULAS = {
    "wanda": Formula("abs(W)*X", _wanda, ("W",)),
    "product": Formula("abs(W)*G", _product, ("W", "G")),
    "mixed": Formula("abs(W)*sqrt(X)*log(G + 1) + W**2*tanh(G*X)", _mixed, ("W", "G")),
}


def removed_by_published(scores: Tensor, pattern: str) -> Tensor:
    """The mask as published code makes it."""
    parsed = parse_pattern(pattern)
    if parsed is not None:
        return _group_after_group(scores, parsed)
    count = int(scores.shape[1] * SPARSITY)
    order = torch.sort(scores, dim=1, stable=True).indices
    return _nothing(scores).scatter_(1, order[:, :count], True)


def removed_by_topk(scores: Tensor, pattern: str) -> Tensor:
    """The mask by one `topk`, which promises nothing about equal scores."""
    parsed = parse_pattern(pattern)
    groups = scores if parsed is None else scores.view(-1, parsed.of)
    count = int(groups.shape[1] * SPARSITY) if parsed is None else parsed.of - parsed.keep
    lowest = torch.topk(groups, count, dim=1, largest=False, sorted=False).indices
    return _nothing(groups).scatter_(1, lowest, True).view(scores.shape)


def _group_after_group(scores: Tensor, pattern: Pattern) -> Tensor:
    removed = _nothing(scores)
    for first in range(0, scores.shape[1], pattern.of):
        group = scores[:, first : first + pattern.of]
        lowest = torch.topk(group, pattern.of - pattern.keep, dim=1, largest=False).indices
        removed.scatter_(1, first + lowest, True)
    return removed


def _nothing(scores: Tensor) -> Tensor:
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)


def compiled(eager: Score, device: torch.device) -> Score:
    """The score as torch.compile has it for one shape; compiled when it is first called."""
    _load_compiler(device)
    torch.compiler.reset()
    return torch.compile(eager, dynamic=False)


@lru_cache(maxsize=1)
def _load_compiler(device: torch.device) -> None:
    """Spend the seconds that only the first compilation of a process takes."""
    from torch._inductor import config

    # What an earlier run left on the disk would make the first call look cheap.
    settings: Any = config
    settings.force_disable_caches = True
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
    try:
        torch.compile(lambda values: values + 1)(torch.zeros(64, device=device))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SystemExit(
            f"torch.compile does not work here ({reason}); leave it out by --no-compile"
        ) from error
