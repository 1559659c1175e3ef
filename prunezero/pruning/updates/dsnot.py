"""Which exchanges bring the expected output of a pruned row back to that of the dense row?

A row that lost the weights of R is wrong by eps = sum over R of w_j m_j on average, m the mean
input. Every cycle brings one removed weight back that lowers |eps| and removes a kept one that
does so too. No weight changes its value.

Source: DSnoT, Zhang et al. 2024 (ICLR), arXiv:2310.08915.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunezero.errors import StatisticsError
from prunezero.pruning.recipes.word_options import Dsnot
from prunezero.scoring.request import Pattern

# Numbers in a working array of float64.
TILE_NUMBERS = 1 << 22


def dsnot(
    weight: Tensor,
    mask: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm: Tensor,
    options: Dsnot,
    pattern: Pattern | None = None,
) -> Tensor:
    """A new mask bool `[out, in]` with the same counts, after a few exchanges in each row.

    There are at most `options.cycles` cycles, for rows with |eps| above `options.threshold`. In
    each the removed weight comes back whose w m has the sign of eps and is largest after division
    by variance to the power `options.power`; and of the kept weights whose w m has the other sign,
    the one with the lowest |w| norm goes. Each weight moves at most once, and an exchange is made
    even when it overshoots. A row ends when either has no candidate.

    With a pattern the one that goes is the lowest in the same group of M, of either sign, and the
    row ends before an exchange that would turn the sign that its eps had at first.

    Args:
        weight: `[out, in]`, dense, of any floating dtype.
        mask: bool `[out, in]`, True = keep; not modified.
        mean: `[in]`, signed sum of inputs over tokens, divided by SEQUENCES: `options.threshold` is
            in its unit.
        variance: `[in]`, of inputs over all tokens of all sequences (the published code averages
            those of single sequences). An input without variance comes back first.
        norm: `[in]`, Wanda's: square root of the sum of squares divided by sequences.
        pattern: that of the mask, if it has one.

    Ties go to the lower index.

    Raises:
        StatisticsError: mean, variance or norm hold NaN or infinite numbers.
    """
    exact = [values.double() for values in (mean, variance, norm)]
    if not all(bool(torch.isfinite(values).all()) for values in exact):
        raise StatisticsError(
            "mean, variance or norm of the inputs hold NaN or infinite numbers; collect the "
            "statistics again, with --dtype float32"
        )
    mean, variance, norm = exact
    rows = max(1, TILE_NUMBERS // weight.shape[1])
    parts = []
    for part, kept in zip(torch.split(weight.detach(), rows), torch.split(mask, rows), strict=True):
        expected, price = part.double() * mean, part.double().abs() * norm
        # Rounding may leave the variance of a constant input a little below zero.
        worth = expected / variance.clamp(min=0.0).pow(options.power)
        parts.append(_exchanged(expected, worth, price, kept, options, pattern))
    return torch.cat(parts)


def _exchanged(
    expected: Tensor,
    worth: Tensor,
    price: Tensor,
    mask: Tensor,
    options: Dsnot,
    pattern: Pattern | None,
) -> Tensor:
    """The mask of a tile of rows after all cycles; rows that are done drop out."""
    mask, removable, growable = mask.clone(), mask.clone(), ~mask
    error = expected.masked_fill(mask, 0.0).sum(1)
    first_sign = error.sign()
    active = torch.arange(len(mask), device=mask.device)
    for _ in range(options.cycles):
        active = active[error[active].abs() > options.threshold]
        sign = error[active].sign()[:, None]
        helps = sign * expected[active]
        may_grow, may_go = growable[active] & (helps > 0), removable[active]
        if pattern is not None:
            may_grow &= _in_group(may_go, pattern)
        grown = (sign * worth[active]).masked_fill_(~may_grow, -float("inf")).argmax(1)
        may_go &= (helps < 0) if pattern is None else _same_group(grown, mask.shape[1], pattern)
        gone = price[active].masked_fill(~may_go, float("inf")).argmin(1)
        after = error[active] + expected[active, gone] - expected[active, grown]
        moves = may_grow.any(1) & may_go.any(1)
        if pattern is not None:
            moves &= after.sign() == first_sign[active]
        active, gone, grown = active[moves], gone[moves], grown[moves]
        if not len(active):
            break
        error[active] = after[moves]
        mask[active, gone], mask[active, grown] = False, True
        removable[active, gone] = growable[active, grown] = False
    return mask


def _in_group(chosen: Tensor, pattern: Pattern) -> Tensor:
    """Whether a weight `[rows, in]` has a chosen one in its group of M."""
    groups = chosen.view(len(chosen), chosen.shape[1] // pattern.of, pattern.of)
    return groups.any(2, keepdim=True).expand_as(groups).flatten(1)


def _same_group(place: Tensor, columns: int, pattern: Pattern) -> Tensor:
    """Whether a column is in the group of M of the place `[rows]` of its row; `[rows, in]`."""
    group = torch.arange(columns, device=place.device) // pattern.of
    return group == (place // pattern.of)[:, None]
