"""Spaces of keys in a cache: what their formulas may look at, and who competes under a rule."""

from __future__ import annotations

from typing import Any

import pytest

from prunezero.errors import RecipeError
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import FEATURES
from prunezero.formula.ranking import AS_IT_IS
from prunezero.pruning.recipes.documents import validated
from prunezero.searching.experiment.config import SearchConfig
from prunezero.searching.session import make_task
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.spaces.space_choices import competing_units


def space_of(**changes: Any) -> SearchSpace:
    fields = SearchSpace.load("attention").model_dump(mode="json") | changes
    return validated(SearchSpace, fields, "mine.yaml")


def test_the_cheap_space_looks_at_no_attention_between_all_pairs() -> None:
    cheap, oracle = SearchSpace.load("attention"), SearchSpace.load("attention_oracle")
    costs = {FEATURES[name].cost for name in cheap.features}
    assert costs == {"none", "activations"}
    assert {"ATT_SUM", "ATT_NEXT"} <= set(oracle.features)
    for text in ("ATT_SUM", "ATT_MEAN*VN", "ATT_NEXT"):
        assert not cheap.speaks(Criterion.parse(text))
        assert oracle.speaks(Criterion.parse(text)) and oracle.holds(Criterion.parse(text))
    # Terminals and choices that cost more are left out when a file is read.
    unit = ["kv_column", {"kv_column": {"first": "ATT_SUM"}}]
    dearer = space_of(terminals=["ATT_W", "ATT_SUM"], choices={"unit": unit})
    assert dearer.features == ("ATT_W",) and dearer.choices == {"unit": ("kv_column",)}


def test_links_have_no_space_and_keys_no_search_of_weights() -> None:
    with pytest.raises(RecipeError, match="links are left out query by query"):
        space_of(unit="link")
    with pytest.raises(RecipeError, match="search space attention is of unit: kv_column"):
        make_task(SearchConfig.of(space="attention", sparsity=0.5))


def test_windows_of_keys_are_longer_and_as_many_whatever_their_length() -> None:
    usual = SearchConfig.of(space="attention", sparsity=0.5)
    assert usual.is_run_time and usual.settings.sequence_length == 1024
    assert (usual.calibration_tokens, usual.evaluation_tokens) == (8 * 1024, 6 * 1024)
    long = SearchConfig.of(space="attention", sparsity=0.5, sequence_length=4096)
    assert long.evaluation_tokens == 6 * 4096
    weights = SearchConfig.of(sparsity=0.5)
    assert not weights.is_run_time and weights.sequence_length == 256


def test_terminals_that_rank_no_keys_are_refused_in_one_sentence() -> None:
    with pytest.raises(RecipeError, match="says nothing of query x key"):
        space_of(terminals=["abs(W)"])
    with pytest.raises(RecipeError, match="none that varies by kv column .* or add AGE"):
        space_of(terminals=["ATT_SUM"])


@pytest.mark.parametrize(
    ("unit", "compare", "group"),
    [
        ("kv_column", "kv_head", "row"),
        ("kv_column", "layer", "model"),
        ({"kv_column": {"pool": 7}}, "kv_head", "row"),
        ({"kv_column": {"share": "layer"}}, "kv_head", AS_IT_IS),
        ({"kv_column": {"block": 16}}, "kv_head", AS_IT_IS),
    ],
)
def test_values_count_where_scores_are_averaged_and_their_order_elsewhere(
    unit: Any, compare: str, group: str
) -> None:
    assert competing_units(unit, compare) == group
