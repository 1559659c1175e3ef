"""The mask of a row whose scores are in registers, as text that joins every generated file.

`row_kernel` holds the scores of a whole row, and narrows its threshold down by counting what lies
under a guess. Guesses are integers that order as the scores do, and follow the counts (the rule of
false position in its Illinois form, from the mean of the integers on), which takes about half as
many counts as halving does; after `PATIENCE` of them halving takes over, whatever the scores are.
Every guess inside the bracket is as right as any other, so none of them can change a mask.

Counts are sums of floats, exact as far as rows go, because half of that work is done by the units
for float arithmetic, which would be idle otherwise.

Source: Dowell & Jarratt 1971, A modified regula falsi method for computing the root of an equation.
"""

from __future__ import annotations

ROWS = """INFINITE = tl.constexpr(0x7F800000)
PATIENCE = tl.constexpr(12)


@triton.jit
def score_at(key):
    # The score that `order_of` makes a key of.
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def guess(low, high, below, above, mean, step):
    # Where to look next. Keys are dense around 0, so between scores of both signs the scores
    # themselves are divided; the difference of such keys would not fit either.
    share = below / (below + above)
    if (low < 0) & (high > 0):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        if (step < PATIENCE) & (low > -INFINITE) & (high < INFINITE):
            middle = order_of(score_at(low) * (1 - share) + score_at(high) * share)
    else:
        if step >= PATIENCE:
            share = 0.5
        middle = low + ((high - low).to(tl.float32) * share).to(tl.int32)
        if step == 0:
            middle = mean
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
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PIECE)
    scores = ()
    least = tl.full([PIECE], float("inf"), tl.float32)
    most = tl.full([PIECE], float("-inf"), tl.float32)
    total = tl.zeros([PIECE], tl.int32)
    for piece in tl.static_range(PIECES):
        # All pieces but the last are whole.
        inside = (place < PIECE) if piece < PIECES - 1 else (piece * PIECE + place < columns)
        score = score_of(row, piece * PIECE + place, inside, $ARGUMENTS)
        most = tl.maximum(
            most, tl.where(inside, score, float("-inf")), propagate_nan=tl.PropagateNan.ALL
        )
        score = tl.where(inside, score, float("inf"))
        least = tl.minimum(least, score)
        # Of the bits so many that their sum fits.
        total += tl.where(inside, score.to(tl.int32, bitcast=True) >> 15, 0)
        scores = scores + (score,)
    # NaN of either sign counts as infinite: as a key, one of them lies below all scores.
    most = tl.where(most == most, most, float("inf"))
    low, high = tl.min(order_of(least), axis=0), tl.max(order_of(most), axis=0)
    note_extremes(extremes, row, low, high)
    mean = (tl.sum(total, axis=0) // columns) << 15
    under, upto, below, above, moved = 0, columns, remove + 0.5, columns - remove + 0.5, 0
    count, step = -1, 0
    while (low < high) & (count != remove):
        middle = guess(low, high, below, above, mean, step)
        bound = score_at(middle)
        lower = (scores[0] <= bound).to(tl.float32)
        for piece in tl.static_range(1, PIECES):
            lower += (scores[piece] <= bound).to(tl.float32)
        # From 2**23 on a float's last bits are a whole number, read without a conversion.
        counted = (lower + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
        count = tl.sum(counted, axis=0)
        low, high, under, upto, below, above, moved = narrowed(
            low, high, under, upto, below, above, moved, middle, count, remove
        )
        step += 1
    bound = score_at(high)
    # Of the weights at the threshold the first go; where all of them go, no order is needed.
    missing = remove - under
    tl.store(tied + row, ((upto != remove) & (missing > 0)).to(tl.int32))
    seen = 0
    for piece in tl.static_range(PIECES):
        removed = scores[piece] <= bound
        if upto != remove:
            equal = (scores[piece] == bound).to(tl.int32)
            goes = (tl.cumsum(equal, axis=0) + seen <= missing) & (equal > 0)
            removed = (scores[piece] < bound) | goes
            seen += tl.sum(equal, axis=0)
        inside = (place < PIECE) if piece < PIECES - 1 else (piece * PIECE + place < columns)
        at = row * stride + piece * PIECE + place
        tl.store(kept + at, removed == 0, mask=inside)


@triton.jit
def long_row_kernel(
    kept, extremes, tied, columns, stride, remove, $PARAMETERS,
    PIECE: tl.constexpr,
):
    # The same for rows that do not fit one program's registers: every pass reads them in pieces.
    row = tl.program_id(0).to(tl.int64)
    low, high, mean = HIGHEST, LOWEST, 0
    for start in range(0, columns, PIECE):
        column = start + tl.arange(0, PIECE)
        inside = column < columns
        key = order_of(score_of(row, column, inside, $ARGUMENTS))
        low = tl.minimum(low, tl.min(tl.where(inside, key, HIGHEST), axis=0))
        high = tl.maximum(high, tl.max(tl.where(inside, key, LOWEST), axis=0))
        # The mean of the means of pieces is near enough.
        mean += tl.sum(tl.where(inside, key >> 15, 0), axis=0) // PIECE
    note_extremes(extremes, row, low, high)
    mean = (mean // ((columns + PIECE - 1) // PIECE)) << 15
    under, upto, below, above, moved = 0, columns, remove + 0.5, columns - remove + 0.5, 0
    count, step = -1, 0
    while (low < high) & (count != remove):
        middle = guess(low, high, below, above, mean, step)
        count = 0
        for start in range(0, columns, PIECE):
            column = start + tl.arange(0, PIECE)
            inside = column < columns
            score = score_of(row, column, inside, $ARGUMENTS)
            count += tl.sum((inside & (score <= score_at(middle))).to(tl.int32), axis=0)
        low, high, under, upto, below, above, moved = narrowed(
            low, high, under, upto, below, above, moved, middle, count, remove
        )
        step += 1
    bound = score_at(high)
    missing = remove - under
    tl.store(tied + row, ((upto != remove) & (missing > 0)).to(tl.int32))
    seen = 0
    for start in range(0, columns, PIECE):
        column = start + tl.arange(0, PIECE)
        inside = column < columns
        score = score_of(row, column, inside, $ARGUMENTS)
        equal = (inside & (score == bound)).to(tl.int32)
        goes = (tl.cumsum(equal, axis=0) + seen <= missing) & (equal > 0)
        removed = tl.where(upto == remove, score <= bound, (score < bound) | goes)
        seen += tl.sum(equal, axis=0)
        tl.store(kept + row * stride + column, removed == 0, mask=inside)
"""
