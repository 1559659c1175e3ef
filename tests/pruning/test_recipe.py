"""A recipe is plain data: read strictly, all faults reported at once, written as it was read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from prunezero.errors import OutputError, RecipeError
from prunezero.pruning.recipes.documents import read_document
from prunezero.pruning.recipes.recipe import Recipe, published_recipes
from prunezero.pruning.recipes.staged import load_recipe

GOOD = "name: mine\ncriterion: abs(W) * X\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", sorted(published_recipes()))
def test_a_saved_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    recipe.save(tmp_path / "copy.yaml")
    assert load_recipe(tmp_path / "copy.yaml") == recipe


def test_a_misspelt_recipe_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'wanda'"):
        Recipe.load("wandaa")


def test_all_faults_of_a_file_are_reported_together_with_key_and_nearest_word(
    tmp_path: Path,
) -> None:
    text = "name: mine\ncriterion: abss(W)\ncompare: rows\nstatistics: densee\nupdat: none\n"
    path = written(tmp_path, text + "allocate: unifrom\nschema: 2\npattern: 4:2\n")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    message = str(caught.value)
    for part in ("'abs'", "'row'", "'dense'", "'update'", "'uniform'", "schema", "4:2"):
        assert part in message
    assert message.count(str(path)) == 7


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch /tmp/prunezero-canary']",
        "a: &x [1, 1]\nb: [*x, *x]\nc: [*x]",
        "name: a\nname: b\ncriterion: W",
        "- a list",
        "just text",
        "{unclosed",
        "name: a\n\tcriterion: W",
        "a: " + "[" * 5000,
        "x" * 100_000,
        "\x00",
        "1: 2",
    ],
)
def test_yaml_that_is_more_than_plain_data_is_refused(text: str, tmp_path: Path) -> None:
    canary = Path("/tmp/prunezero-canary")
    canary.unlink(missing_ok=True)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(written(tmp_path, text))
    assert len(str(caught.value)) < 500
    assert not canary.exists()


def test_plain_yaml_reads_as_it_looks(tmp_path: Path) -> None:
    path = written(tmp_path, "a: 2:4\nb: 1e-3\nc: no\nd: 010\ne: true\nf: ~\ng: 12:30:00\n")
    expected = {"a": "2:4", "b": 0.001, "c": "no", "d": 10, "e": True, "f": None, "g": "12:30:00"}
    assert read_document(path) == expected


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("name: no\n", None),
        ("name: 3\n", "name"),
        ("name: ''\n", "name"),
        ("name: x\ntargets: q_proj\n", "targets"),
        ("name: x\ntargets: [q_proj, 3]\n", "targets"),
        ("name: x\nunit: nerve\n", "unit"),
        ("name: x\nprovenance: text\n", "provenance"),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_key(
    line: str, complaint: str | None, tmp_path: Path
) -> None:
    path = written(tmp_path, line + "criterion: abs(W)\n")
    if complaint is None:
        assert Recipe.load(path).name == "no"
        return
    with pytest.raises(RecipeError, match=f"{path}, {complaint}"):
        Recipe.load(path)


def test_a_missing_file_and_a_file_that_cannot_be_written_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "nowhere.yaml")
    with pytest.raises(OutputError, match="cannot be written"):
        Recipe.load("wanda").save(tmp_path / "nowhere" / "x.yaml")


@pytest.mark.parametrize("name", ["08", "1e3", "1.5e3", ".5e3", "+1e5", "1e-3", "12", "no", "~"])
def test_a_name_that_looks_like_a_number_is_saved_as_text(name: str, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"name": name, "criterion": "abs(W)", "provenance": {"a": name}})
    recipe.save(tmp_path / "mine.yaml")
    assert Recipe.load(tmp_path / "mine.yaml") == recipe


@pytest.mark.parametrize("text", ["{[]: 1, []: 2}", "{{}: 1}", "? [a]\n: 1\n"])
def test_a_key_that_is_no_word_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not plain YAML"):
        Recipe.load(written(tmp_path, text))


def test_many_keys_are_read_in_no_time(tmp_path: Path) -> None:
    path = written(tmp_path, "".join(f"{key:x}:\n" for key in range(2000)) + "1:\n")
    begin = time.process_time()
    with pytest.raises(RecipeError, match="'1' stands twice"):
        read_document(path)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("choices", ["", "pattern: 2:4\ncompare: layer\n"])
def test_a_formula_that_is_constant_along_rows_is_refused_where_rows_compete(
    choices: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="R1 is the same for all weights of a row"):
        Recipe.load(written(tmp_path, "name: mine\ncriterion: R1\n" + choices))
    path = written(tmp_path, "name: mine\ncriterion: R1\ncompare: layer\n")
    assert Recipe.load(path).criterion.shape == "row"


def test_a_tree_of_pruner_zero_is_a_recipe_too(tmp_path: Path) -> None:
    leaf = {"left": None, "right": None}
    scaled = {"data": "mms", "left": {"data": "G", **leaf}, "right": None}
    path = tmp_path / "best_tree.json"
    path.write_text(json.dumps({"data": "mul", "left": {"data": "W", **leaf}, "right": scaled}))
    recipe = Recipe.load(path)
    assert (recipe.name, recipe.criterion.text) == ("best_tree", "abs(W)*minmax(100*G)")
    for text in ("{", "[]", '{"data": "mull"}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(RecipeError, match="best_tree.json"):
            Recipe.load(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "nowhere.json")


def test_a_file_that_still_has_its_command_as_a_key_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "name: mine\ncriterion: abs(W)\ncommand: prunezero prune\n")
    assert "command" not in Recipe.load(path).to_yaml()
