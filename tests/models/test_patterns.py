"""A layer pattern means names, and no regular expression takes longer than its budget."""

from __future__ import annotations

import threading
import time

import pytest

from prunezero.errors import ModelError, RecipeError
from prunezero.models.anatomy.patterns import MAX_LENGTH, check_pattern, fits
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.searching.spaces.space import SearchSpace

NAME = "model.layers.10.self_attn.q_proj"
ENDLESS = [
    "re:^(([a-z_.0-9])+)+!",
    "re:.*.*.*.*.*.*.*.*x!",
    "re:(?:.|..|...)*!",
    "re:(?=((.+)+)!)",
    "re:(?:(?:(?:.{0,9}){0,9}){0,9}){0,9}!",
]


def test_a_pattern_means_a_name_or_its_end_or_what_an_expression_finds() -> None:
    assert fits("q_proj", NAME) and fits("self_attn.q_proj", NAME) and fits(NAME, NAME)
    assert not fits("proj", NAME)
    assert fits(r"re:layers\.(\d+)\..*\.(q|k)_proj$", NAME) and fits("re:^(?!lm_head)", NAME)
    assert not fits(r"re:layers\.(\d)\.self", NAME)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_an_expression_that_would_not_end_is_refused_by_its_processor_time(pattern: str) -> None:
    begin = time.process_time()
    for _ in range(50):
        with pytest.raises(ModelError, match="takes too long on names such as"):
            fits(pattern, NAME)
    assert time.process_time() - begin < 0.5


def test_outside_the_main_thread_a_child_process_has_the_budget() -> None:
    found: list[object] = []

    def look(pattern: str) -> None:
        try:
            found.append(fits(pattern, NAME + ".in_a_thread"))
        except ModelError as error:
            found.append(str(error))

    for pattern in ("re:q_pr+oj", "re:^k", "re:^(([a-z_.0-9])+)+!!"):
        thread = threading.Thread(target=look, args=[pattern])
        thread.start()
        thread.join()
    assert found[:2] == [True, False] and "takes too long" in str(found[2])


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"targets": [ENDLESS[0]]}, "targets.0: .* takes too long"),
        ({"ignore": ["re:("]}, "ignore.0: .* is not a regular expression"),
        ({"criteria": {"re:" + "a" * MAX_LENGTH: "abs(W)"}}, "a layer pattern has 259 characters"),
        ({"allocate": {"table": {"ratios": {"re:(a+)+[": 1.0}}}}, "is not a regular expression"),
        ({"targets": ["q_proj"] * 300}, "300 entries are too many"),
    ],
)
def test_a_recipe_with_such_a_pattern_is_refused_when_it_is_read(
    fields: dict[str, object], fault: str
) -> None:
    with pytest.raises(RecipeError, match=fault):
        validated(Recipe, {"name": "a", "criterion": "abs(W)", **fields}, "r.yaml")


def test_a_space_with_such_a_pattern_is_refused_when_it_is_read() -> None:
    fields = {"name": "a", "terminals": ["abs(W)"], "operators": ["add"], "ratios": [ENDLESS[1]]}
    with pytest.raises(RecipeError, match="takes too long"):
        validated(SearchSpace, fields, "s.yaml")


def test_a_pattern_that_can_be_searched_passes() -> None:
    assert check_pattern("q_proj") == "q_proj"
    with pytest.raises(ModelError, match="0 characters"):
        check_pattern("")
