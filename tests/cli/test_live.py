"""What a search tells of itself while it runs."""

from __future__ import annotations

import pytest

from prunezero.cli.live import SearchView
from prunezero.formula import Criterion
from prunezero.searching.experiment.candidate import Candidate


def view_of(count: int) -> SearchView:
    """A view of so many candidates whose KL orders them as their layer error does but for two."""
    view = SearchView([], budget=None, seconds=None)
    for slot in range(count):
        view.show(
            Candidate(
                slot,
                0,
                Criterion.parse("abs(W)"),
                "random",
                (),
                "new",
                layer_error=float(slot),
                kl=float({0: 3, 3: 0}.get(slot, slot)),
                search_perplexity=10.0 + slot,
                validation_perplexity=11.0 + slot if slot < 3 else None,
            )
        )
    return view


def test_tau_and_recall_are_logged_of_rungs_with_enough_candidates() -> None:
    points = view_of(8).progress()
    # Of 28 pairs the five between 0, 3 and those between them are out of order.
    assert points["tau_layer_error_kl"] == pytest.approx((23 - 5) / 28)
    # Of the best two by KL, 3 and 1, the layer error has 0 and 1 as its best.
    assert points["recall_layer_error_kl"] == 0.5
    assert {"tau_kl_perplexity", "recall_kl_perplexity"} <= set(points)
    # Three stand on validation text, of which nothing follows.
    assert "tau_perplexity_validation" not in points
    assert not [name for name in view_of(7).progress() if name.startswith(("tau", "recall"))]


def test_rungs_on_which_nobody_stands_are_not_spoken_of() -> None:
    told = view_of(8)._trusted()
    assert "layer error foretells KL: tau 0.64, recall 0.50 over 8" in told
    assert "perplexity foretells validation: tau 1.00" in told
    assert view_of(0)._trusted() == "no rung foretells another yet"
