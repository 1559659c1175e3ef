"""In how many pruning steps is a sparsity reached, and how sparse is the model after each?

Functions of the recipe's words at `schedule`: sparsity and numbers in, growing sparsities out.
"""

from __future__ import annotations

import math
from fractions import Fraction

from prunezero.pruning.recipes.word_options import (
    Iterative,
    Options,
    Periods,
    Subsets,
    WhileTraining,
)

# Earlier steps are given in ten-thousandths: what they leave is removed by a later one.
PARTS = 10_000


def one_shot(sparsity: float, options: Options) -> tuple[float, ...]:
    """The sparsity itself, in one step."""
    return (sparsity,)


def greedy(sparsity: float, options: Options) -> tuple[float, ...]:
    """The sparsity itself: units go one by one, and how many there will be their costs decide."""
    return one_shot(sparsity, options)


def span(sparsity: float, options: Options) -> tuple[float, ...]:
    """The sparsity itself: neighbours go together."""
    return one_shot(sparsity, options)


def subsets(sparsity: float, options: Subsets) -> tuple[float, ...]:
    """The sparsity itself: the experts of a mixture go together."""
    return one_shot(sparsity, options)


def while_training(sparsity: float, options: WhileTraining) -> tuple[float, ...]:
    """The sparsity itself: how much is gone at which step of the training `part_gone` says."""
    return one_shot(sparsity, options)


def periods(sparsity: float, options: Periods) -> tuple[float, ...]:
    """The sparsity itself: when its parts go, `period_bounds` says."""
    return one_shot(sparsity, options)


def iterative(sparsity: float, options: Iterative) -> tuple[float, ...]:
    """Sparsities after each of several steps, each above the one before; the last is `sparsity`.

    Args:
        sparsity: fraction to remove in all, read as the decimal it is written as.
        options: how many steps; step k of n reaches k/n of the sparsity (linear), or
            1 - (1 - k/n)^3 of it (cubic), rounded down to four digits.

    Of a sparsity so small that steps round to the same number, the repeated ones are left out.

    Source: Zhu & Gupta 2017, arXiv:1710.01878, equation 1, from a dense model.
    """
    reached: list[float] = []
    for step in range(1, options.steps):
        share = _gone(Fraction(step, options.steps), options.shape)
        fraction = math.floor(Fraction(str(sparsity)) * share * PARTS) / PARTS
        if (reached[-1] if reached else 0.0) < fraction < sparsity:
            reached.append(fraction)
    return (*reached, sparsity)


def part_gone(done: int, total: int, options: WhileTraining) -> Fraction:
    """Which part of what goes in the end is to be gone after some steps of a training.

    Args:
        done: steps of the optimizer so far.
        total: steps in all.
    """
    begin, end = Fraction(str(options.begin)), Fraction(str(options.end))
    way = (Fraction(done, total) - begin) / (end - begin)
    return _gone(min(Fraction(1), max(Fraction(0), way)), options.shape)


def period_bounds(total: int, options: Periods, *, behind: int | None = None) -> tuple[int, ...]:
    """After how many steps each period of a training begins, and after how many the last ends.

    Args:
        total: steps in all.
        behind: steps after which the first begins; None is `begin` of them.

    Returns:
        rising, one more than there are periods, from there to `end` of the steps, rounded down.
    """
    begin = total * Fraction(str(options.begin)) if behind is None else Fraction(behind)
    return _parts(begin, total * Fraction(str(options.end)), options.periods)


def cycle_bounds(total: int, options: Periods) -> tuple[int, ...]:
    """After how many steps each trial before the first period begins, and the last ends.

    Args:
        total: steps in all.

    Returns:
        rising, one more than there are trials, from `begin` to `cycles_end`, rounded down.
    """
    begin, end = Fraction(str(options.begin)), Fraction(str(options.cycles_end))
    return _parts(total * begin, total * end, options.cycles)


def _parts(begin: Fraction, end: Fraction, count: int) -> tuple[int, ...]:
    """Where so many equal parts of a way begin, and where the last ends, rounded down."""
    parts = (Fraction(place, count) for place in range(count + 1))
    return tuple(math.floor(begin + part * (end - begin)) for part in parts)


def _gone(way: Fraction, shape: str) -> Fraction:
    """The share gone at a part of the way: as much of it, or by the cube of what is left."""
    return 1 - (1 - way) ** (3 if shape == "cubic" else 1)
