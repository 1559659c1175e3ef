"""Words and numbers of a recipe: known, spelled as written, and each with a function."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest

from prunezero.errors import RecipeError
from prunezero.formula.feature_row import SIGNALS
from prunezero.formula.features import FEATURES
from prunezero.pruning.recipes.choices import chosen
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.words import WORDS
from prunezero.scoring.request import GROUPS
from prunezero.scoring.statistics import SUMS

# What the functions of an arrow's words are given by position.
ARGUMENTS = {
    "allocate": ["layers", "sparsity", "options", "evidence"],
    "update": ["works", "options"],
    "permute": ["scores", "pattern"],
    "schedule": ["sparsity", "options"],
    "recover": ["language_model", "layers", "windows", "options"],
}


def recipe(**choices: object) -> Recipe:
    from prunezero.pruning.recipes.documents import validated

    return validated(Recipe, {"name": "mine", "criterion": "abs(W)"} | choices, "mine.yaml")


@pytest.mark.parametrize("arrow", sorted(WORDS))
def test_every_word_names_a_function_of_its_own_that_takes_what_those_of_its_arrow_take(
    arrow: str,
) -> None:
    rows = WORDS[arrow].values()
    assert len({row.function for row in rows}) == len(rows)
    for row in rows:
        taken = inspect.signature(row.function).parameters.values()
        by_position = [one.name for one in taken if one.kind is one.POSITIONAL_OR_KEYWORD]
        assert by_position == ARGUMENTS[arrow], row.code


@pytest.mark.parametrize("arrow", sorted(WORDS))
def test_a_row_says_what_there_is(arrow: str) -> None:
    rows = WORDS[arrow].values()
    assert all(row.meaning and row.sums <= SUMS.keys() and row.cost in SIGNALS for row in rows)
    (usual,) = (word for word, row in WORDS[arrow].items() if row.is_usual)
    of_recipe = getattr(recipe(), arrow)
    choices = of_recipe if isinstance(of_recipe, tuple) else (of_recipe,)
    assert [choice.word for choice in choices] == [usual]
    for row in rows:
        assert arrow == "update" or not (row.order or row.changes_mask or row.mends)
        # What is mended is solved for on a mask, so masks are changed before.
        assert not (row.changes_mask and (row.mends or row.order))


def test_a_choice_or_feature_of_another_unit_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads = replace(WORDS["allocate"]["owl"], units=frozenset({"head"}))
    monkeypatch.setitem(WORDS["allocate"], "owl", heads)
    with pytest.raises(RecipeError, match="allocate: owl is for unit head, not for weight"):
        recipe(allocate="owl")
    monkeypatch.setitem(FEATURES, "Y", replace(FEATURES["Y"], kinds=("head",)))
    with pytest.raises(RecipeError, match="feature Y is for unit head, not for weight"):
        recipe(criterion="abs(W)*Y", criteria={"mlp": "abs(W)"})
    with pytest.raises(RecipeError, match="feature Y is for unit head"):
        recipe(criteria={"mlp": "abs(W)*Y"})


def test_a_group_that_is_not_known_is_told_what_competes_in_those_that_are() -> None:
    with pytest.raises(RecipeError) as told:
        recipe(compare="colums")
    for word, meaning in GROUPS.items():
        assert f"{word} ({meaning})" in str(told.value)


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
