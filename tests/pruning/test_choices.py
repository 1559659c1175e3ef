"""Words and numbers of a recipe: known, spelled as written, and each with a function."""

from __future__ import annotations

from typing import Any

import pytest

from prunezero.errors import RecipeError
from prunezero.pruning.allocation import ALLOCATION_SUMS, ALLOCATIONS
from prunezero.pruning.permutation import PERMUTATIONS
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.words import WORDS, chosen
from prunezero.pruning.recovery import RECOVERIES
from prunezero.pruning.schedule import SCHEDULES
from prunezero.pruning.updates.mend import UPDATE_SUMS, UPDATES
from prunezero.scoring.statistics import SUMS

FUNCTIONS: dict[str, dict[str, Any]] = {
    "allocate": ALLOCATIONS,
    "update": UPDATES,
    "permute": PERMUTATIONS,
    "schedule": SCHEDULES,
    "recover": RECOVERIES,
}


def recipe(**choices: object) -> Recipe:
    from prunezero.pruning.recipes.documents import validated

    return validated(Recipe, {"name": "mine", "criterion": "abs(W)", **choices}, "mine.yaml")


@pytest.mark.parametrize("arrow", sorted(WORDS))
def test_every_word_has_a_function_and_every_function_a_word(arrow: str) -> None:
    assert list(WORDS[arrow]) == list(FUNCTIONS[arrow])
    assert all(row.meaning for row in WORDS[arrow].values())


def test_sums_that_words_need_are_sums_that_exist() -> None:
    for sums in (*ALLOCATION_SUMS.values(), *UPDATE_SUMS.values()):
        assert sums <= set(SUMS)
    assert set(UPDATE_SUMS) <= set(UPDATES)
    assert set(ALLOCATION_SUMS) <= set(ALLOCATIONS)


@pytest.mark.parametrize("arrow", sorted(WORDS))
def test_a_word_with_its_usual_numbers_is_spelled_as_the_word_alone(arrow: str) -> None:
    for word, row in WORDS[arrow].items():
        if any(number.is_required() for number in row.options.model_fields.values()):
            continue  # it has no usual numbers
        choice = chosen(arrow, {word: row.options().model_dump()})
        assert choice == chosen(arrow, word)
        assert choice.text == word


def test_choices_survive_the_way_through_a_file(tmp_path: Any) -> None:
    mine = recipe(
        allocate={"table": {"ratios": {"down_proj": 0.9, r"re:layers\.0\.": 0.5}}},
        update=["obs", {"admm": {"iterations": 3}}],
        statistics="sequential",
        schedule={"iterative": {"steps": 3, "shape": "linear"}},
        recover={"tune": {"learning_rate": 1e-3}},
        damping=0.1,
    )
    path = tmp_path / "mine.yaml"
    mine.save(path)
    assert Recipe.load(path) == mine
    assert mine.updates == ("obs", "admm")
    assert "recover:\n  tune:\n    learning_rate: 0.001\n" in path.read_text()


@pytest.mark.parametrize(
    ("choices", "complaint"),
    [
        ({"update": "ops"}, "update: 'ops' is not a known word; did you mean 'obs'"),
        (
            {"allocate": {"owl": {"spred": 0.1}}},
            "owl.spred' is not a known number; did you mean 'spread'",
        ),
        (
            {"allocate": {"owl": {"spread": 2}}},
            "owl.spread: input should be less than 1, but got 2",
        ),
        ({"allocate": "table"}, r"table needs its ratios \(removed share relative"),
        ({"allocate": {"table": {"ratios": {}}}}, "table.ratios: .*at least 1 item"),
        ({"sparsity": 0.5}, "no part of a recipe; say it with --sparsity"),
        ({"allocate": {"owl": {}, "table": {}}}, "one word with its numbers"),
        ({"recover": {"tune": {"learning_rate": float("nan")}}}, "finite number"),
        ({"update": ["obs", "swaps"]}, "order swaps or dsnot"),
        ({"update": ["bias", "obs"]}, "order swaps or dsnot"),
        ({"update": ["none", "obs"]}, "none alone"),
        ({"update": ["obs", "obs"]}, "may stand once"),
        ({"pattern": "2:4", "allocate": "owl"}, "cannot be allocated by owl"),
        ({"permute": "assignment"}, "needs an N:M pattern"),
        ({"pattern": "2:4", "schedule": "iterative"}, "other sparsities"),
        ({"update": "swaps", "schedule": "iterative"}, "brings removed weights back"),
        ({"compare": "model", "allocate": "owl"}, "all layers compete"),
        ({"damping": 0}, "damping: .*greater than 0"),
    ],
)
def test_faults_are_told_by_key_with_what_is_known(
    choices: dict[str, object], complaint: str
) -> None:
    with pytest.raises(RecipeError, match=complaint):
        recipe(**choices)
