"""The mask of a row whose scores are in registers, as text that joins every generated file.

`row_kernel` holds a whole row as integers that order as the scores do, and narrows down the row's
threshold by counting what lies under a guess. Guesses follow the counts (the rule of false position
in its Illinois form, from the mean of the integers on), which takes about half as many counts as
halving does; after `PATIENCE` of them halving takes over, whatever the scores are. Every guess
inside the bracket is as right as any other, so none of them can change a mask.

Source: Dowell & Jarratt 1971, A modified regula falsi method for computing the root of an equation.
"""

from __future__ import annotations

ROWS = """INFINITE = tl.constexpr(0x7F800000)
PATIENCE = tl.constexpr(12)


@triton.jit
def score_at(key):
    # The score that `order_of` makes a key of.
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def guess(low, high, below, above, mean, step):
    # Where to look next. Keys are dense around 0, so between scores of both signs the scores
    # themselves are divided.
    share = below / (below + above)
    if step >= PATIENCE:
        share = 0.5
    middle = low + ((high - low).to(tl.float32) * share).to(tl.int64)
    if (low < 0) & (high > 0):
        if (step < PATIENCE) & (low > -INFINITE) & (high < INFINITE):
            score = score_at(low) * (1 - share) + score_at(high) * share
            middle = order_of(score).to(tl.int64)
    else:
        if step == 0:
            middle = mean.to(tl.int64)
    return tl.minimum(tl.maximum(middle, low), high - 1)


@triton.jit
def narrowed(low, high, under, upto, below, above, moved, middle, count, remove):
    # The bracket after `count` keys were found up to `middle`. What an end misses counts half
    # while the other end alone moves.
    if count >= remove:
        high, upto, above = middle, count, count - remove + 0.5
        below = tl.where(moved == 1, below * 0.5, below)
        moved = 1
    else:
        low, under, below = middle + 1, count, remove - count + 0.5
        above = tl.where(moved == -1, above * 0.5, above)
        moved = -1
    return low, high, under, upto, below, above, moved


@triton.jit
def row_kernel(
    kept, extremes, tied, columns, stride, remove, $PARAMETERS,
    PIECE: tl.constexpr, PIECES: tl.constexpr, PACKED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PIECE)
    keys = ()
    least, most = tl.full([PIECE], HIGHEST, tl.int32), tl.full([PIECE], LOWEST, tl.int32)
    total = tl.zeros([PIECE], tl.float32)
    for piece in tl.static_range(PIECES):
        inside = piece * PIECE + place < columns
        key = key_of(score_of(row, piece * PIECE + place, inside, $ARGUMENTS), inside)
        least = tl.minimum(least, key)
        most = tl.maximum(most, tl.where(inside, key, LOWEST))
        total += tl.where(inside, key.to(tl.float32), 0.0)
        keys = keys + (key,)
    lowest, highest = tl.min(least, axis=0), tl.max(most, axis=0)
    mean = tl.sum(total, axis=0) / columns
    low, high, under, upto = lowest.to(tl.int64), highest.to(tl.int64), 0, columns
    below, above, moved = remove + 0.5, columns - remove + 0.5, 0
    count, step = -1, 0
    while (low < high) & (count != remove):
        middle = guess(low, high, below, above, mean, step)
        lower = (keys[0] <= middle.to(tl.int32)).to(tl.int32)
        for piece in tl.static_range(1, PIECES):
            lower += (keys[piece] <= middle.to(tl.int32)).to(tl.int32)
        count = tl.sum(lower, axis=0)
        low, high, under, upto, below, above, moved = narrowed(
            low, high, under, upto, below, above, moved, middle, count, remove
        )
        step += 1
    bound = high.to(tl.int32)
    # Of the weights at the threshold the first go; where all of them go, no order is needed.
    missing = remove - under
    note(extremes, tied, row, lowest, highest, ((upto != remove) & (missing > 0)).to(tl.int32))
    seen = 0
    for piece in tl.static_range(PIECES):
        removed = keys[piece] <= bound
        if upto != remove:
            equal = (keys[piece] == bound).to(tl.int32)
            goes = (tl.cumsum(equal, axis=0) + seen <= missing) & (equal > 0)
            removed = (keys[piece] < bound) | goes
            seen += tl.sum(equal, axis=0)
        inside = piece * PIECE + place < columns
        at = row * stride + piece * PIECE + place
        store(kept, at, removed == 0, inside, PIECE, PACKED)


@triton.jit
def long_row_kernel(
    kept, extremes, tied, columns, stride, remove, $PARAMETERS,
    PIECE: tl.constexpr, PACKED: tl.constexpr,
):
    # The same for rows that do not fit one program's registers: every pass reads them in pieces.
    row = tl.program_id(0).to(tl.int64)
    lowest, highest, mean = HIGHEST, LOWEST, 0.0
    for start in range(0, columns, PIECE):
        column = start + tl.arange(0, PIECE)
        inside = column < columns
        key = key_of(score_of(row, column, inside, $ARGUMENTS), inside)
        lowest = tl.minimum(lowest, tl.min(key, axis=0))
        highest = tl.maximum(highest, tl.max(tl.where(inside, key, LOWEST), axis=0))
        mean += tl.sum(tl.where(inside, key.to(tl.float32), 0.0), axis=0) / columns
    low, high, under, upto = lowest.to(tl.int64), highest.to(tl.int64), 0, columns
    below, above, moved = remove + 0.5, columns - remove + 0.5, 0
    count, step = -1, 0
    while (low < high) & (count != remove):
        middle = guess(low, high, below, above, mean, step)
        count = 0
        for start in range(0, columns, PIECE):
            column = start + tl.arange(0, PIECE)
            inside = column < columns
            key = key_of(score_of(row, column, inside, $ARGUMENTS), inside)
            count += tl.sum((inside & (key <= middle.to(tl.int32))).to(tl.int32), axis=0)
        low, high, under, upto, below, above, moved = narrowed(
            low, high, under, upto, below, above, moved, middle, count, remove
        )
        step += 1
    bound = high.to(tl.int32)
    missing = remove - under
    note(extremes, tied, row, lowest, highest, ((upto != remove) & (missing > 0)).to(tl.int32))
    seen = 0
    for start in range(0, columns, PIECE):
        column = start + tl.arange(0, PIECE)
        inside = column < columns
        key = key_of(score_of(row, column, inside, $ARGUMENTS), inside)
        equal = (inside & (key == bound)).to(tl.int32)
        goes = (tl.cumsum(equal, axis=0) + seen <= missing) & (equal > 0)
        removed = tl.where(upto == remove, key <= bound, (key < bound) | goes)
        seen += tl.sum(equal, axis=0)
        store(kept, row * stride + column, removed == 0, inside, PIECE, PACKED)
"""
