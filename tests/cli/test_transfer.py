"""`prunezero transfer` measures a recipe on other models and texts, beside fair rivals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import Settings, set_up
from prunezero.searching.experiment.baselines import SAME_TERMS, rivals_of
from tests.cli.conftest import SMALL, Run
from tests.tiny_models import save_tiny_model

FOUND = {
    "weight": {"criterion": "abs(W)*X*sqrt(G)", "compare": "layer"},
    "width": {"criterion": "M2/sqrt(PARAMS)", "compare": "model", "update": "refit"},
}


def saved(unit: str, folder: Path) -> Path:
    path = folder / f"{unit}.yaml"
    fields = {"name": f"found-{unit}", "unit": unit, "provenance": {"sparsity": 0.4}}
    Recipe.model_validate({**fields, **FOUND[unit]}).save(path)
    return path


@pytest.mark.parametrize("unit", FOUND)
def test_every_place_has_the_recipe_and_its_rivals_twice_as_compare_measures_them(
    unit: str, run: Run, tiny_files: tuple[Path, Path], tmp_path: Path
) -> None:
    model, text = tiny_files
    other = save_tiny_model("gpt2", tmp_path / "gpt2")
    path = saved(unit, tmp_path)
    result = run(
        f"transfer {path} --models {model},{other} --texts {text} {SMALL} "
        f"--json {tmp_path / 'out.json'}"
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    recipe = Recipe.load(path)
    expected = ["dense", *(one.name for one in rivals_of(recipe)), recipe.name]
    for place in (model, other):
        here = [row for row in rows if row["model"] == str(place)]
        assert [row["recipe"] for row in here] == expected
        assert all(row["sparsity"] == 0.4 for row in here[1:])
    testbed = set_up(str(other), str(text), Settings(16, 64, 64, 64), dtype="float32")
    from prunezero.pruning.compare import compare

    (_, row) = compare(testbed, [recipe], 0.4)
    assert rows[-1]["test_perplexity"] == pytest.approx(row["test_perplexity"])
    assert "as published" in result.output and "better than" in result.output


def test_rivals_stand_there_as_published_and_on_the_terms_of_the_recipe(tmp_path: Path) -> None:
    recipe = Recipe.load(saved("width", tmp_path))
    rivals = {one.name: one for one in rivals_of(recipe)}
    published = {name for name in rivals if not name.endswith(SAME_TERMS)}
    assert published == set(UNITS["width"].baselines)
    for name in published - {"random_units"}:
        if fair := rivals.get(f"{name}{SAME_TERMS}"):
            assert fair.criterion == rivals[name].criterion
            assert (fair.compare, fair.updates) == ("model", ("refit",))
    assert len({json.dumps(one.effect, sort_keys=True) for one in rivals.values()}) == len(rivals)


def test_what_nobody_said_is_asked_for_before_a_model_is_loaded(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    Recipe(name="mine", criterion="abs(W)*X").save(path)  # type: ignore[arg-type]
    result = run(f"transfer {path} --models nowhere")
    assert result.exit_code == 1
    assert "does not say how much its search removed; give --sparsity" in str(result.exception)
