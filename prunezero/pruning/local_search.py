"""Which units stay, so that refitted columns lose the least? Local search by swaps.

A selection that was made by scores is improved: of all pairs of a unit that stays and one that
goes, the one whose exchange lowers the least-squares loss the most changes places, until none
lowers it. All pairs are scored at once, in closed form. With H the damped Gram matrix, S the
channels that stay and R the others, one symmetric matrix holds what is needed of inverses,

    A_SS = -(H_SS)^-1,  A_SR = (H_SS)^-1 H_SR,  A_RR = H_RR - H_RS (H_SS)^-1 H_SR,

and D = F F^T the rest: F has the refitted columns in S, and in R what the outputs still have to do
with those channels, (H W^T)_R - H_RS F_S. If unit r returns and unit i goes then, the loss becomes

    loss - tr(C^-1 D_rr) + tr(B^-1 (D_ii - U D_ri - D_ir U^T + U D_rr U^T)),
    C = A_rr,  U = A_ir C^-1,  B = U A_ir^T - A_ii,

which for units of one channel is an expression of numbers. A swap moves two blocks between S and R,
and both matrices follow by updates of low rank, without a new inverse.

Sources: Meng et al. 2024, OSSCAR (ICML), arXiv:2403.12983 (the objective, exchanges by low-rank
updates); the symmetric sweep of A: Goodnight 1979, A tutorial on the SWEEP operator.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunezero.errors import FactorizationError
from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.selection import Selection
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.unit_options import Units
from prunezero.pruning.recipes.word_options import Refit
from prunezero.pruning.rescoring import reader_of
from prunezero.scoring.second_order import damped_gram
from prunezero.scoring.statistics import Statistics, sum_of
from prunezero.scoring.unit_features import centred

# A swap must gain more than rounding could: this share of the loss, and of the squared outputs.
_SMALLEST_GAIN = 1e-9, 1e-14


def improved(
    selection: Selection,
    recipe: Recipe,
    statistics: Mapping[str, Statistics],
    *,
    before: Selection | None = None,
) -> Selection:
    """The selection after the swaps that a recipe asks for; as many units of each group stay.

    The loss is the one that the recipe's refit minimises: with its damping, and of inputs without
    their mean where biases take that over.

    Args:
        statistics: by the name of the matrix that reads a group's units.
        before: an earlier selection; what it took does not return.

    Raises:
        StatisticsError: a sum that the refit needs was not collected.
        FactorizationError: as `swapped`.
    """
    options = recipe.unit.options
    if not isinstance(options, Units) or not options.swaps:
        return selection
    damping = next(one.options.damping for one in recipe.update if isinstance(one.options, Refit))
    gone = {group.name: ~kept for group, kept in before or Selection()}
    found = []
    for group, kept in selection:
        reader = reader_of(group, statistics)
        gram, known = sum_of(reader.statistics, "gram"), reader.statistics
        if recipe.needs_biases:
            assert known is not None  # sum_of refused it; for the type checker
            gram = centred(gram, sum_of(known, "input_sum"), known.tokens)
        out = gone.get(group.name)
        found.append(
            swapped(reader.weight, kept, group, gram, damping=damping, most=options.swaps, gone=out)
        )
    return Selection(selection.groups, tuple(found))


def swapped(
    weight: Tensor,
    kept: Tensor,
    group: Group,
    gram: Tensor,
    *,
    damping: float,
    most: int,
    gone: Tensor | None = None,
) -> Tensor:
    """Which units stay after swaps, bool [units]; no swap is left that lowers the loss.

    Ties go to the lower index of the unit that goes, then of the one that returns. Units of a
    stratum change places among themselves.

    Args:
        weight: [out, in] of the matrix that reads the units, in whose columns they lie from the
            first on; what lies behind them stays.
        kept: bool [units], where the search begins; not modified.
        gram: [in, in], sum of x x^T over tokens, at any positive scale.
        damping: share of its mean diagonal that is added.
        most: swaps at most.
        gone: bool [units], those that may not return.

    Raises:
        FactorizationError: the Gram matrix of the columns that stay is singular.
    """
    may_return = ~kept if gone is None else ~kept & ~gone.to(kept.device)
    if not bool(kept.any()) or not bool(may_return.any()):
        return kept
    state = _State(weight, kept, group, damped_gram(gram, damping))
    kept, smallest, whole = kept.clone(), *_SMALLEST_GAIN
    for _ in range(most):
        stay, back = kept.nonzero()[:, 0], (~kept & may_return).nonzero()[:, 0]
        changes = state.changes(stay, back)
        place = int(changes.argmin())
        change, pair = float(changes.flatten()[place]), divmod(place, len(back))
        if not change < -smallest * state.loss - whole * state.outputs:
            break
        goes, returns = stay[pair[0]], back[pair[1]]
        state.move(returns, enters=True)
        state.move(goes, enters=False)
        state.loss += change
        kept[goes], kept[returns] = False, True
        may_return[goes] = True
    return kept


class _State:
    """What is known of the loss while units change places."""

    def __init__(self, weight: Tensor, kept: Tensor, group: Group, matrix: Tensor) -> None:
        """Begin with a selection.

        Args:
            matrix: H, float64 [in, in], damped.
        """
        units = group.units
        self._width = group.reader.width
        device = matrix.device
        self._channels = torch.arange(units * self._width, device=device).reshape(units, -1)
        self._stratum = torch.arange(units, device=device) // (units // group.strata)
        stays = torch.ones(len(matrix), dtype=torch.bool, device=device)
        stays[self._channels] = kept.to(device)[:, None]
        columns = weight.detach().double().T
        wanted = matrix @ columns
        inside, outside = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
        factor, failed = torch.linalg.cholesky_ex(matrix[inside][:, inside])
        if int(failed) != 0:
            raise FactorizationError(
                f"the Gram matrix of the columns that stay of {group.name} is not positive "
                "definite; use more damping, or calibrate with more text"
            )
        across = matrix[inside][:, outside]
        solved = torch.cholesky_solve(across, factor)
        # A of the module's text.
        self._sweep = torch.empty_like(matrix)
        self._sweep[inside[:, None], inside] = -torch.cholesky_inverse(factor)
        self._sweep[inside[:, None], outside] = solved
        self._sweep[outside[:, None], inside] = solved.T
        self._sweep[outside[:, None], outside] = matrix[outside][:, outside] - across.T @ solved
        fitted = torch.empty_like(wanted)
        fitted[inside] = torch.cholesky_solve(wanted[inside], factor)
        fitted[outside] = wanted[outside] - across.T @ fitted[inside]
        # D of the module's text.
        self._products = fitted @ fitted.T
        self.outputs = float((columns * wanted).sum())
        """the squared outputs, damping included"""
        self.loss = self.outputs - float((wanted[inside] * fitted[inside]).sum())
        """what is lost of them"""

    def changes(self, stay: Tensor, back: Tensor) -> Tensor:
        """By how much the loss changes when units swap, float64 [stay, back].

        Args:
            stay: places of units that stay.
            back: places of units that go.
        """
        of_pairs = self._of_channels if self._width == 1 else self._of_blocks
        changes = of_pairs(stay, back)
        apart = self._stratum[stay][:, None] != self._stratum[back]
        return changes.masked_fill_(apart, torch.inf)

    def _of_channels(self, stay: Tensor, back: Tensor) -> Tensor:
        """The module's formula for units of one channel, above one denominator for each pair."""
        own, products = self._sweep.diagonal(), self._products.diagonal()
        across = self._sweep[stay][:, back]
        above = self._products[stay][:, back].mul_(across).mul_(-2)
        above += products[stay][:, None] * own[back]
        gain = products[back] / own[back]
        squares = across.square_()
        above.addcmul_(squares, gain[None])
        below = squares.sub_(own[stay][:, None] * own[back])
        return above.div_(below).sub_(gain)

    def _of_blocks(self, stay: Tensor, back: Tensor) -> Tensor:
        """The module's formula for units of several channels, for all that stay at once."""
        found = []
        rows = self._channels[stay]
        own, products = (
            matrix[rows[:, :, None], rows[:, None]] for matrix in (self._sweep, self._products)
        )
        for columns in self._channels[back]:
            inside = self._sweep[columns][:, columns]
            beside = self._products[columns][:, columns]
            across, shared = self._sweep[:, columns][rows], self._products[:, columns][rows]
            share = torch.linalg.solve(inside, across, left=False)
            left = products - share @ shared.mT - shared @ share.mT + share @ beside @ share.mT
            lost = _trace(torch.linalg.solve(share @ across.mT - own, left))
            found.append(lost - _trace(torch.linalg.solve(inside, beside)))
        return torch.stack(found, dim=1)

    def move(self, unit: Tensor, *, enters: bool) -> None:
        """Let a unit join those that stay, or leave them."""
        block = self._channels[int(unit)]
        columns = self._sweep[:, block]
        pivot, sign = columns[block], 1.0 if enters else -1.0
        share = torch.linalg.solve(pivot, columns, left=False)
        self._sweep.addmm_(share, columns.T, alpha=-1)
        self._sweep[:, block] = sign * share
        self._sweep[block] = sign * share.T
        self._sweep[block[:, None], block] = -torch.linalg.inv(pivot)
        known = self._products[:, block]
        own = known[block]
        # (F - U F_p)(F - U F_p)^T, as one product of the double rank.
        half = known - share @ own / 2
        left, right = torch.cat([share, half], dim=1), torch.cat([half, share], dim=1)
        self._products.addmm_(left, right.T, alpha=-1)
        known = sign * torch.linalg.solve(pivot, known - share @ own, left=False)
        known[block] = torch.linalg.solve(pivot, torch.linalg.solve(pivot, own).T)
        self._products[:, block] = known
        self._products[block] = known.T


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
