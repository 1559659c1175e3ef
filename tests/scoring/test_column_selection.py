"""Keys stay in exact counts, with sinks and recent ones inside, as plain loops choose them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import SelectionError
from prunezero.scoring.column_selection import (
    falling_counts,
    keep_blocks,
    keep_columns,
    keep_highest,
    keep_in_two_stages,
    keep_together,
    kept_count,
    protected,
)

HEADS, KEYS = 3, 40
SINKS, RECENT = 2, 5
ALWAYS = protected(KEYS, SINKS, RECENT)
FIXED = {*range(SINKS), *range(KEYS - RECENT, KEYS)}


def scores(seed: int = 0, heads: int = HEADS) -> Tensor:
    """Coarse scores, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(heads, KEYS, generator=generator) * 4).round() / 4


def kept(mask: Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in mask]


def highest(values: list[float], count: int, among: set[int]) -> set[int]:
    """The highest of some places; of equals the later one."""
    ranked = sorted(among, key=lambda place: (values[place], place), reverse=True)
    return set(ranked[:count])


def test_a_share_to_keep_is_what_is_left_when_less_is_rounded_down_to_go() -> None:
    assert [kept_count(768, share) for share in (0.5, 0.25, 0.1, 1.0)] == [384, 192, 77, 768]
    assert kept_count(100, 0.29) == 29
    for share in (0.0, -0.1, 1.5):
        with pytest.raises(SelectionError, match="above 0 and at most 1"):
            kept_count(100, share)


def test_sinks_and_recent_keys_count_inside_the_budget() -> None:
    for count in (len(FIXED), 11, 20, KEYS):
        for row, values in zip(kept(keep_columns(scores(), count, ALWAYS)), scores(), strict=True):
            free = set(range(KEYS)) - FIXED
            assert row == FIXED | highest(values.tolist(), count - len(FIXED), free)
            assert len(row) == count
    with pytest.raises(SelectionError, match="6 of 40 keys may stay, but 7 always do"):
        keep_columns(scores(), 6, ALWAYS)


def test_of_equal_scores_the_lower_index_goes_first() -> None:
    assert kept(keep_highest(torch.zeros(1, 6), 2)) == [{4, 5}]
    assert kept(keep_highest(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), 2)) == [{1, 2}]


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.5, 1.0])
def test_heads_compete_for_what_is_not_safe(safeguard: float) -> None:
    values, count = scores(1), 15
    values[0] += 2
    found = kept(keep_together(values, count, ALWAYS, safeguard))
    own = int(safeguard * (count - len(FIXED)))
    free = set(range(KEYS)) - FIXED
    safe = [FIXED | highest(row.tolist(), own, free) for row in values]
    left = [
        (float(values[head, key]), head, key)
        for head in range(HEADS)
        for key in range(KEYS)
        if key not in safe[head]
    ]
    for _, head, key in sorted(left, reverse=True)[: HEADS * (count - len(FIXED) - own)]:
        safe[head].add(key)
    assert found == safe
    assert sum(map(len, found)) == HEADS * count
    assert safeguard == 1.0 or len({*map(len, found)}) > 1


def test_one_score_spends_its_part_before_another() -> None:
    first, then, count = scores(2), scores(3), 17
    free = set(range(KEYS)) - FIXED
    for head, row in enumerate(kept(keep_in_two_stages(first, then, count, ALWAYS, 0.5))):
        early = FIXED | highest(first[head].tolist(), (count - len(FIXED)) // 2, free)
        late = highest(then[head].tolist(), count - len(early), set(range(KEYS)) - early)
        assert row == early | late and len(row) == count
    alone = keep_in_two_stages(first, then, count, ALWAYS, 1.0)
    assert torch.equal(alone, keep_columns(first, count, ALWAYS))


@pytest.mark.parametrize("block", [4, 7, 16])
def test_blocks_stay_or_go_whole_by_their_mean(block: int) -> None:
    values, count = scores(4), 33
    places = [set(range(at, min(at + block, KEYS))) for at in range(0, KEYS, block)]
    fixed = [own for own in places if own & FIXED or len(own) < block]
    for head, row in enumerate(kept(keep_blocks(values, count, ALWAYS, block))):
        means = {
            at: float(values[head, sorted(own)].double().mean())
            for at, own in enumerate(places)
            if own not in fixed
        }
        expected = set().union(*fixed)
        for at in sorted(means, key=lambda at: (means[at], at), reverse=True):
            if len(expected) + block <= count:
                expected |= places[at]
        assert row == expected and len(row) <= count
    with pytest.raises(SelectionError, match="1 of 3 blocks of 16 keys may stay, but 2 always do"):
        keep_blocks(values, 20, ALWAYS, 16)


def test_a_block_of_one_key_is_a_key() -> None:
    found = keep_blocks(scores(5), 19, ALWAYS, 1)
    assert torch.equal(found, keep_columns(scores(5), 19, ALWAYS))


@pytest.mark.parametrize(("kept_keys", "layers"), [(77, 30), (192, 30), (500, 30), (100, 1)])
def test_budgets_fall_linearly_and_sum_to_equal_ones(kept_keys: int, layers: int) -> None:
    keys, fixed, ratio = 768, 36, 20.0
    found = falling_counts(keys, kept_keys, fixed, layers, ratio)
    assert sum(found) == layers * kept_keys and sorted(found, reverse=True) == found
    assert all(fixed <= count <= keys for count in found)
    mean = kept_keys - fixed
    if layers > 1 and 2 * mean - mean / ratio <= keys - fixed:
        assert found[-1] - fixed == pytest.approx(mean / ratio, abs=1)
        assert found[0] - fixed == pytest.approx(2 * mean - mean / ratio, abs=1)
    np.testing.assert_allclose(found, np.linspace(found[0], found[-1], layers), atol=2)
