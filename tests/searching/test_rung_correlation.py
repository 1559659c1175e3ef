"""Rungs are compared where both spoke, and a gain counts only as far as its windows agree."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from prunezero.formula import Criterion
from prunezero.searching.evaluation.rung_correlation import (
    RungCorrelation,
    chance_of_no_gain,
    kendall_tau,
    rung_correlation,
    width,
)
from prunezero.searching.experiment.candidate import Candidate


def candidates(pairs: list[tuple[float | None, float | None]]) -> list[Candidate]:
    fields: Any = {"generation": 0, "origin": "random", "parents": (), "status": "new"}
    return [
        Candidate(slot, criterion=Criterion.parse("abs(W)"), layer_error=low, kl=high, **fields)
        for slot, (low, high) in enumerate(pairs)
    ]


def test_kendall_tau_counts_pairs_in_the_same_order() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    # 5 of 6 pairs agree, one does not
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    # one pair tied on the left: 2 agreeing of sqrt(2 * 3)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(6))
    assert math.isnan(kendall_tau([], [])) and math.isnan(kendall_tau([1, 1], [1, 2]))


def test_fidelity_is_over_candidates_on_both_rungs_and_the_last_of_them() -> None:
    good = [(float(place), float(place)) for place in range(8)]
    seen = rung_correlation(candidates([*good, (9.0, None)]), "layer_error", "kl")
    assert seen.count == 8 and seen.tau == pytest.approx(1) and seen.recall == 1
    assert rung_correlation(candidates([(1.0, None)]), "layer_error", "kl").count == 0
    wrong = [(float(place), float(-place)) for place in range(40)]
    assert rung_correlation(candidates([*good, *wrong]), "layer_error", "kl").tau == pytest.approx(
        -1
    )


def test_the_layer_error_is_asked_only_about_what_it_sees() -> None:
    plain = candidates([(float(place), float(place)) for place in range(9)])
    # Mended, all are better than what their masks promise.
    mended = [
        replace(one, slot=20 + one.slot, kl=-float(one.slot), choices={"update": ["admm"]})
        for one in plain[:8]
    ]
    both = [*plain, *mended]
    seen = rung_correlation(both, "layer_error", "kl")
    assert seen.count == 9 and seen.tau == pytest.approx(1)
    # Who competes changes the mask, so it is seen.
    wide = [replace(one, choices={"compare": "model"}) for one in plain]
    assert rung_correlation([*plain, *wide], "layer_error", "kl").count == 18
    # A measurement sees it all.
    measured = [replace(one, search_perplexity=one.kl) for one in both]
    assert rung_correlation(measured, "kl", "search_perplexity").count == 17


def test_rungs_are_narrow_where_the_one_before_is_right_and_wide_where_it_errs() -> None:
    assert width(6, RungCorrelation(0.9, 1.0, 20)) == 3
    assert width(6, RungCorrelation(0.5, 0.5, 20)) == 6
    assert width(6, RungCorrelation(0.1, 0.0, 20)) == 12
    assert width(6, RungCorrelation(0.1, 0.0, 5)) == 6
    assert width(6, RungCorrelation(math.nan, 0.0, 20)) == 6
    assert width(1, RungCorrelation(0.9, 1.0, 20)) == 1


def test_a_gain_on_every_window_is_not_by_chance_and_one_on_half_of_them_may_be() -> None:
    others = [3.0 + place / 100 for place in range(16)]
    assert chance_of_no_gain([loss - 0.1 - loss / 1000 for loss in others], others) < 1e-3
    mixed = [loss + (-1) ** place * (0.1 + place / 1000) for place, loss in enumerate(others)]
    assert 0.2 < chance_of_no_gain(mixed, others) < 0.8
    assert chance_of_no_gain(others, others) == 1
    assert chance_of_no_gain([loss + 0.1 + loss / 1000 for loss in others], others) > 0.99
