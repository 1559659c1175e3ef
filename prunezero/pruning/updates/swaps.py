"""Which exchange of a kept and a removed weight helps a row most, again and again?

With d the removed part of a row and H the Gram matrix of the inputs, the row's error is
e = d H d^T. When weight p goes and r comes back it changes by

    a_p + b_r - 2 w_p w_r H_pr,   a_p = 2 w_p c_p + w_p^2 H_pp,   b_r = w_r^2 H_rr - 2 w_r c_r

with c = H d. Only the last term knows the pair, and it is at most t_p u_r, where
t_p = 2 |w_p| max_r |H_pr| / sqrt(H_rr) and u_r = |w_r| sqrt(H_rr). So a_p + min_r (b_r - t_p u_r)
is a floor under all exchanges of p, and only those p whose floor lies under an exchange that is
already known have to be looked at pair by pair: in most layers less than a tenth of the kept
weights, half of them where inputs are strongly correlated. What is found is the best of all pairs.

Source: optimal exchanges from the Gram matrix as in SparseSwaps, arXiv:2512.10922; the floor here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunezero.pruning.recipes.word_options import Swaps
from prunezero.pruning.updates.admm import checked_gram
from prunezero.scoring.request import Pattern

# Numbers in a working array: on a CPU it should stay in the cache, on a GPU fill the processors.
TILE_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 24}
# An exchange must gain more than rounding could: this share of the square of a row's sum of u.
SMALLEST_GAIN = 1e-13
# Slopes at which min_r (b_r - t u_r) is computed; between them it lies above its chord.
SLOPES = 16
# Kept weights with the lowest floors, tried first for an exchange to beat.
FIRST_TRIES = 2

# Change of error, weight to remove, weight to bring back: one of each per row.
Exchange = tuple[Tensor, Tensor, Tensor]
# Finds the best exchange of rows: their weights and c float64 [rows, in], and their mask.
Finder = Callable[[Tensor, Tensor, Tensor], Exchange]


def improve_by_swaps(
    weight: Tensor, mask: Tensor, gram: Tensor, options: Swaps, pattern: Pattern | None = None
) -> Tensor:
    """A new mask bool `[out, in]` with the same counts and, row by row, no larger output error.

    Each row makes its best exchange until none lowers its error or `options.swaps` are made. Ties
    go to the lower index of the weight that goes, then of the one that comes back.

    Args:
        weight: `[out, in]`, dense, of any floating dtype; the weights themselves do not change.
        mask: bool `[out, in]`, True = keep; not modified.
        gram: `[in, in]`, sum of x x^T over tokens, at any positive scale.
        pattern: with N:M, exchanges stay inside groups of M; the mask must have that pattern.

    The arithmetic is float64, and an exchange has to gain clearly more than rounding, so that no
    row goes round in circles. Beside a float64 copy of `gram`, memory is a few arrays of
    `TILE_NUMBERS`, or of one row where rows are longer.

    Raises:
        StatisticsError: `gram` is no Gram matrix, see `checked_gram`.
    """
    exact = checked_gram(gram).double()
    exact = (exact + exact.T) / 2
    find = _free_finder(exact) if pattern is None else _pattern_finder(exact, pattern)
    rows = max(1, _tile_numbers(exact) // exact.shape[0])
    tiles = zip(torch.split(weight.detach(), rows), torch.split(mask, rows), strict=True)
    return torch.cat([_improved(part.double(), kept, exact, find, options) for part, kept in tiles])


def _improved(weight: Tensor, mask: Tensor, gram: Tensor, find: Finder, options: Swaps) -> Tensor:
    """The mask of a tile of rows after their exchanges; rows that are done drop out."""
    mask = mask.clone()
    # H d, brought up to date after every exchange instead of computed again.
    product = weight.masked_fill(mask, 0.0) @ gram
    size = (weight.abs() * gram.diagonal().sqrt()).sum(1)
    active = (mask.any(1) & ~mask.all(1)).nonzero()[:, 0]
    for _ in range(options.swaps):
        change, gone, back = find(weight[active], mask[active], product[active])
        better = change < -SMALLEST_GAIN * size[active].square()
        active, gone, back = active[better], gone[better], back[better]
        if not len(active):
            break
        mask[active, gone] = False
        mask[active, back] = True
        product[active] += weight[active, gone, None] * gram[gone]
        product[active] -= weight[active, back, None] * gram[back]
    return mask


def _free_finder(gram: Tensor) -> Finder:
    norm = gram.diagonal().sqrt()
    # A dead input has no product with any other.
    reach = (gram.abs() / norm.clamp(min=torch.finfo(norm.dtype).tiny)).fill_diagonal_(0).amax(1)

    def find(weight: Tensor, mask: Tensor, product: Tensor) -> Exchange:
        goes, comes = _single_changes(weight, mask, product, gram)
        floor = goes + _least_after(comes, weight.abs() * norm, 2 * weight.abs() * reach)
        first = floor.topk(min(FIRST_TRIES, floor.shape[1]), largest=False, sorted=False).indices
        tried = torch.zeros_like(mask).scatter_(1, first, True)
        known = _best_of(tried, weight, goes, comes, gram)[0]
        # The floor and the known change may differ by rounding where they are equal.
        slack = SMALLEST_GAIN * (weight.abs() * norm).sum(1).square()
        bar = known.clamp(max=0.0) + slack
        return _best_of(floor <= bar[:, None], weight, goes, comes, gram)

    return find


def _single_changes(
    weight: Tensor, mask: Tensor, product: Tensor, gram: Tensor
) -> tuple[Tensor, Tensor]:
    """The parts a and b of the change, each infinite where a weight cannot go or come."""
    cross, own = 2 * weight * product, weight.square() * gram.diagonal()
    infinite = float("inf")
    return (own + cross).masked_fill_(~mask, infinite), (own - cross).masked_fill_(mask, infinite)


def _least_after(comes: Tensor, size: Tensor, slope: Tensor) -> Tensor:
    """A floor under min_r (b_r - t u_r) for every slope t; `[rows, in]`.

    As a minimum of straight lines it is concave in t, so between two slopes at which it is known
    it lies nowhere under their chord.
    """
    steepest = slope.amax(1, keepdim=True)
    steepest = torch.where(steepest > 0, steepest, torch.ones_like(steepest))
    # Closer where slopes are small: weights that are cheap to remove are there.
    grid = torch.linspace(0, 1, SLOPES, dtype=slope.dtype, device=slope.device).square() * steepest
    least = torch.stack([(comes - grid[:, k : k + 1] * size).amin(1) for k in range(SLOPES)], dim=1)
    place = ((slope / steepest).sqrt() * (SLOPES - 1)).long().clamp(max=SLOPES - 2)
    left, right = grid.gather(1, place), grid.gather(1, place + 1)
    share = (slope - left) / (right - left)
    return torch.lerp(least.gather(1, place), least.gather(1, place + 1), share)


def _best_of(
    candidates: Tensor, weight: Tensor, goes: Tensor, comes: Tensor, gram: Tensor
) -> Exchange:
    """The best exchange of every row among those in which a candidate goes, pair by pair.

    The change is infinite where a row has no candidate.
    """
    row, gone = candidates.nonzero(as_tuple=True)
    size = max(1, _tile_numbers(gram) // gram.shape[0])
    change = weight.new_empty(len(row))
    back = torch.empty_like(gone)
    for start in range(0, len(row), size):
        part = slice(start, start + size)
        some, leaving = row[part], gone[part]
        pairs = gram.index_select(0, leaving).mul_(weight.index_select(0, some))
        pairs.mul_(-2 * weight[some, leaving, None]).add_(comes.index_select(0, some))
        least, back[part] = pairs.min(1)
        change[part] = least + goes[some, leaving]
    best = change.new_full((len(weight),), float("inf")).scatter_reduce(0, row, change, "amin")
    winners = change == best[row]
    pair = (gone * weight.shape[1] + back)[winners]
    first = pair.new_zeros(len(weight)).scatter_reduce(
        0, row[winners], pair, "amin", include_self=False
    )
    return best, first // weight.shape[1], first % weight.shape[1]


def _pattern_finder(gram: Tensor, pattern: Pattern) -> Finder:
    width, groups = pattern.of, gram.shape[0] // pattern.of
    blocks = gram.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def find(weight: Tensor, mask: Tensor, product: Tensor) -> Exchange:
        goes, comes = _single_changes(weight, mask, product, gram)
        grouped = weight.view(-1, groups, width)
        pairs = grouped[..., None] * grouped[:, :, None] * blocks
        pairs = pairs.mul_(-2).add_(goes.view_as(grouped)[..., None])
        pairs += comes.view_as(grouped)[:, :, None]
        change, place = pairs.flatten(1).min(1)
        gone = place // width
        return change, gone, gone // width * width + place % width

    return find


def _tile_numbers(tensor: Tensor) -> int:
    return TILE_NUMBERS.get(tensor.device.type, TILE_NUMBERS["cuda"])
