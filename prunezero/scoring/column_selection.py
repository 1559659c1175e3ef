"""Which keys stay of what attention remembers: scores of keys in, exact counts out.

Counts are of whole keys and hold what always stays: the first few (attention sinks) and the most
recent. The lowest go; of equal scores the lower index goes first, as everywhere.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from prunezero.errors import SelectionError
from prunezero.scoring.request import removed_count


def kept_count(keys: int, kept: float) -> int:
    """How many of so many keys a share to keep is; what goes is rounded down.

    Raises:
        SelectionError: the share is not above 0 and at most 1.
    """
    if not 0 < kept <= 1:
        raise SelectionError(
            f"the share of keys to keep must be above 0 and at most 1 but is {kept:g}"
        )
    return keys - removed_count(keys, round(1 - kept, 12)) if kept < 1 else keys


def protected(keys: int, sinks: int, recent: int) -> Tensor:
    """Which of so many keys always stay, bool [keys]: the first and the last of them."""
    places = torch.arange(keys)
    return (places < sinks) | (places >= keys - recent)


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """The highest of each row, bool [rows, keys]; of equals the lower index goes first.

    Args:
        scores: [rows, keys]; plus infinity for what stays anyway.
        count: of each row that stay.
    """
    order = torch.sort(scores, dim=-1, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[:, scores.shape[-1] - count :], True)


def keep_columns(scores: Tensor, count: int, always: Tensor) -> Tensor:
    """The keys that stay, as many of every head, bool [heads, keys].

    Args:
        scores: [heads, keys].
        count: of each head that stay, those of `always` among them.
        always: bool [keys].

    Raises:
        SelectionError: more keys always stay than may.
    """
    _refuse_small(count, always)
    return keep_highest(scores.masked_fill(always, torch.inf), count)


def keep_together(scores: Tensor, count: int, always: Tensor, safeguard: float) -> Tensor:
    """The keys that stay where the heads of a layer compete, bool [heads, keys].

    Each head is sure of a share of what the heads would have alone, its own highest; the others are
    the highest of all.

    Args:
        scores: [heads, keys].
        count: of each head that stay on the mean, those of `always` among them.
        always: bool [keys].
        safeguard: the share, 0 to 1, of a head's budget beside what always stays; rounded down.

    Raises:
        SelectionError: more keys always stay than may.

    Source: Feng et al. 2024, Ada-KV, arXiv:2407.11550, algorithm 1 with a safeguard for each head.
    """
    _refuse_small(count, always)
    fixed = int(always.sum())
    own = fixed + int(safeguard * (count - fixed))
    sure = keep_highest(scores.masked_fill(always, torch.inf), own)
    total = count * scores.shape[0]
    return keep_highest(scores.masked_fill(sure, torch.inf).reshape(1, -1), total).view_as(scores)


def keep_in_two_stages(
    first: Tensor, scores: Tensor, count: int, always: Tensor, share: float
) -> Tensor:
    """The keys that stay where one score spends a part of the budget and another the rest.

    Args:
        first: scores [heads, keys] that choose first.
        scores: [heads, keys] of the others.
        count: of each head that stay, those of `always` among them.
        always: bool [keys].
        share: of the budget, beside what always stays, that `first` spends; rounded down.

    Raises:
        SelectionError: more keys always stay than may.

    Source: Feng et al. 2025, CriticalKV, arXiv:2502.03805, algorithm 1.
    """
    _refuse_small(count, always)
    fixed = int(always.sum())
    chosen = keep_columns(first, fixed + int(share * (count - fixed)), always)
    return keep_highest(scores.masked_fill(chosen, torch.inf), count)


def keep_blocks(scores: Tensor, count: int, always: Tensor, block: int) -> Tensor:
    """The keys that stay where neighbours go together, bool [heads, keys].

    A block is worth the mean of its keys. It always stays if one of its keys does, and so does a
    last one that is not full, so that all heads keep as many keys.

    Args:
        scores: [heads, keys].
        count: of each head that stay at most.
        always: bool [keys].
        block: neighbouring keys, counted from the first, that stay or go together.

    Raises:
        SelectionError: more blocks always stay than may.
    """
    heads, keys = scores.shape
    blocks, rest = -(-keys // block), -keys % block
    padded = torch.nn.functional.pad(scores.double(), (0, rest)).view(heads, blocks, block)
    fixed = torch.nn.functional.pad(always, (0, rest)).view(blocks, block).any(-1)
    if rest:
        fixed[-1] = True
    # A last block that is not full stays, so what remains is of full ones.
    partial = block - rest if rest else 0
    most = (count - partial) // block + (1 if rest else 0)
    _refuse_small(most, fixed, f"blocks of {block} keys")
    chosen = keep_columns(padded.mean(-1).float(), most, fixed)
    return chosen.repeat_interleave(block, dim=1)[:, :keys]


def falling_counts(keys: int, kept: int, fixed: int, layers: int, ratio: float) -> list[int]:
    """How many keys each layer keeps where budgets fall linearly from the first to the last.

    Beside what always stays, the last layer keeps 1/ratio of the mean, and the first as much more
    than the mean as the last keeps less. Where that is more than all, the first keeps all, and the
    last makes up for it. The sum is what equal layers would keep.

    Args:
        keys: that there are.
        kept: of a layer on the mean.
        fixed: of a layer that always stay.
        layers: how many.
        ratio: at least 1; 1 is the same everywhere.

    Source: Cai et al. 2024, PyramidKV, arXiv:2406.02069, equation 5 (there called beta).
    """
    free = kept - fixed
    least = max(free / ratio, 2 * free - (keys - fixed))
    steps = [
        (2 * free - least) - 2 * (free - least) * i / max(layers - 1, 1) for i in range(layers)
    ]
    wanted = steps if layers > 1 else [float(free)]
    # Rounded sums, so that rounding neither adds nor loses a key of the whole.
    sums = [0, *(round(total) for total in accumulate(wanted))]
    return [fixed + after - before for before, after in pairwise(sums)]


def _refuse_small(count: int, always: Tensor, several: str = "keys") -> None:
    fixed = int(always.sum())
    if count < fixed:
        raise SelectionError(
            f"{count} of {len(always)} {several} may stay, but {fixed} always do, the first "
            "(sinks) and the most recent; keep more, or lower the recipe's sinks or recent"
        )
