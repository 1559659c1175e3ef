"""The mask of N:M groups whose scores are in registers, as text that joins every generated file.

Groups of four and eight lie within a thread, so that ranking them by pairs moves nothing between
threads; groups of any other size are ranked by a table of all pairs.
"""

from __future__ import annotations

PATTERNS = """@triton.jit
def apart(values, SIZE: tl.constexpr):
    # The values at even and at odd places.
    return tl.split(tl.reshape(values, [SIZE // 2, 2]))


@triton.jit
def woven(even, odd, SIZE: tl.constexpr):
    # What `apart` takes apart.
    return tl.reshape(tl.join(even, odd), [SIZE])


@triton.jit
def fourths(values, SIZE: tl.constexpr):
    # Of groups of four, one behind the other: all first values, all second ones, and so on.
    even, odd = apart(values, SIZE)
    first, third = apart(even, SIZE // 2)
    second, fourth = apart(odd, SIZE // 2)
    return first, second, third, fourth


@triton.jit
def slots_of(values, SIZE: tl.constexpr, OF: tl.constexpr):
    # The same for groups of four or eight.
    if OF == 4:
        slots = fourths(values, SIZE)
    else:
        even, odd = apart(values, SIZE)
        a, c, e, g = fourths(even, SIZE // 2)
        b, d, f, h = fourths(odd, SIZE // 2)
        slots = (a, b, c, d, e, f, g, h)
    return slots


@triton.jit
def in_order(slots, SIZE: tl.constexpr, OF: tl.constexpr):
    # What `slots_of` takes apart.
    if OF == 4:
        even, odd = woven(slots[0], slots[2], SIZE // 2), woven(slots[1], slots[3], SIZE // 2)
    else:
        a = woven(slots[0], slots[4], SIZE // 4)
        b = woven(slots[1], slots[5], SIZE // 4)
        c = woven(slots[2], slots[6], SIZE // 4)
        d = woven(slots[3], slots[7], SIZE // 4)
        even, odd = woven(a, c, SIZE // 2), woven(b, d, SIZE // 2)
    return woven(even, odd, SIZE)


@triton.jit
def slot_kernel(
    kept, extremes, tied, columns, stride, remove, $PARAMETERS,
    OF: tl.constexpr, SIZE: tl.constexpr,
):
    # Groups of four or eight: a thread holds whole groups, and ranks them by all pairs.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < columns
    keys = key_of(score_of(row, column, inside, $ARGUMENTS), inside)
    lowest = tl.min(keys, axis=0)
    highest = tl.max(tl.where(inside, keys, LOWEST), axis=0)
    slots = slots_of(keys, SIZE, OF)
    last_gone = tl.full([SIZE // OF], LOWEST, tl.int32)
    first_kept = tl.full([SIZE // OF], HIGHEST, tl.int32)
    marks = ()
    for mine in tl.static_range(OF):
        before = tl.zeros([SIZE // OF], tl.int32)
        for other in tl.static_range(OF):
            if other < mine:
                before += (slots[other] <= slots[mine]).to(tl.int32)
            if other > mine:
                before += (slots[other] < slots[mine]).to(tl.int32)
        stays = before >= remove
        last_gone = tl.maximum(last_gone, tl.where(stays, LOWEST, slots[mine]))
        first_kept = tl.minimum(first_kept, tl.where(stays, slots[mine], HIGHEST))
        marks = marks + (stays.to(tl.int8),)
    ties = tl.sum(((last_gone == first_kept) & (last_gone < HIGHEST)).to(tl.int32), axis=0)
    program = row * tl.num_programs(1) + tl.program_id(1)
    note_extremes(extremes, program, lowest, highest)
    tl.store(tied + program, ties)
    keep = in_order(marks, SIZE, OF) != 0
    tl.store(kept + row * stride + column, keep, mask=inside)


@triton.jit
def pattern_kernel(
    kept, extremes, tied, groups_per_row, stride, remove, $PARAMETERS,
    OF: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):
    # Groups of any other size, by a table of all pairs.
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    slot = tl.arange(0, WIDTH)
    column = (group * OF)[:, None] + slot[None, :]
    inside = (group < groups_per_row)[:, None] & (slot < OF)[None, :]
    keys = key_of(score_of(row, column, inside, $ARGUMENTS), inside)
    mine, other = keys[:, :, None], keys[:, None, :]
    is_earlier = slot[None, None, :] < slot[None, :, None]
    equal = other == mine
    goes_before = (other < mine) | (equal & is_earlier)
    keep = tl.sum(goes_before.to(tl.int32), axis=2) >= remove
    # A group is tied where a weight that stays has the score of one that goes.
    goes = (keep == 0)[:, None, :]
    ties = tl.max((equal & goes).to(tl.int32), axis=2) * (keep & inside).to(tl.int32)
    lowest = tl.min(tl.min(keys, axis=1), axis=0)
    highest = tl.max(tl.max(tl.where(inside, keys, LOWEST), axis=1), axis=0)
    program = row * tl.num_programs(1) + tl.program_id(1)
    note_extremes(extremes, program, lowest, highest)
    tl.store(tied + program, tl.sum(tl.max(ties, axis=1), axis=0))
    tl.store(kept + row * stride + column, keep, mask=inside)
"""
