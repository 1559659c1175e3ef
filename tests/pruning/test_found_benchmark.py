"""benchmarks/found.py holds a found recipe against rivals as published and with its own choices."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from prunezero.pruning.recipes.recipe import Recipe
from tests.cli.conftest import tiny_files

__all__ = ["tiny_files"]

ROOT = Path(__file__).resolve().parents[2]
FOUND = sorted((ROOT / "docs" / "results" / "found").glob("*.yaml"))
TINY = "--sequence-length 16 --calibration-tokens 64 --evaluation-tokens 64 --test-tokens 64"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def script(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.parametrize("file", FOUND, ids=lambda file: file.stem)
def test_a_rival_with_the_choices_of_the_found_recipe_differs_from_it_by_its_formula_alone(
    file: Path,
) -> None:
    rivals, found = script("found_rivals"), Recipe.load(file)
    told = {"name", "source", "published", "note", "command", "provenance"}
    names = rivals.FORMULAS + (rivals.PIPELINES if found.mends else ())
    for name in names:
        one = rivals.around(name, found)
        assert one.recipe.criterion == Recipe.load(name).criterion and one.recipe.criteria == {}
        mine, theirs = (recipe.model_dump(mode="json") for recipe in (found, one.recipe))
        differing = {key for key in mine if mine[key] != theirs[key]}
        assert differing <= told | {"criterion", "criteria"}, name
    roles = [(one.role, one.name) for one in rivals.contenders(found)]
    assert roles == [
        *((role, name) for role in (rivals.PUBLISHED, rivals.AROUND) for name in names),
        (rivals.FOUND, found.name),
    ]


def test_recipes_that_rank_alike_are_measured_once() -> None:
    rivals = script("found_rivals")
    free, pattern, pipeline = (
        Recipe.load(ROOT / f"docs/results/found/{name}.yaml")
        for name in ("criterion-50", "criterion-2-4", "pipeline-2-4")
    )
    # Inside a group of four it matters neither who else competes nor whether scores are squared.
    deeds = {
        one.ranks_as for one in map(lambda name: rivals.published(name, pattern), ("wanda", "obd"))
    }
    assert deeds == {rivals.around("wanda", pattern).ranks_as}
    assert rivals.published("wanda", free).ranks_as != rivals.around("wanda", free).ranks_as
    assert rivals.around("wanda", free).ranks_as == rivals.around("obd", free).ranks_as
    # What the search ended at is GBLM's formula with other choices.
    assert rivals.around("gblm", pipeline).ranks_as == rivals.deed(pipeline)
    assert rivals.published("gblm", pipeline).ranks_as != rivals.deed(pipeline)


def test_a_rival_that_cannot_take_the_choices_is_refused_with_the_reason(tmp_path: Path) -> None:
    rivals, found = script("found_rivals"), Recipe.load(FOUND[0])
    assert found.compare == "row"
    path = tmp_path / "rows.yaml"
    path.write_text("name: rows\ncriterion: R1\ncompare: layer\n")
    one = rivals.around(str(path), found)
    assert one.recipe is None and one.name == "rows"
    assert "ranks nothing" in one.refused and one.choices == rivals.choices_of(found)


def test_a_tiny_model_is_measured_once_and_then_only_told_of(
    tiny_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, (model, text) = script("found"), tiny_files
    recipe = tmp_path / "mine.yaml"
    provenance = "provenance: {sparsity: 0.5}\n"
    recipe.write_text(f"name: mine\ncriterion: abs(W)*sqrt(X)\ncompare: model\n{provenance}")
    words = (
        f"{recipe} --model {model} --text {text} {TINY} --draws 2 --threads 1 --results {tmp_path}"
    )
    found.main(words.split())
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * (2 * 7 + 1)
    copied = {
        (row["role"], row["recipe"], row["measured_as"]) for row in rows if "measured_as" in row
    }
    assert copied == {("around", "obd", "wanda")}
    page = (tmp_path / "found.md").read_text()
    assert "## mine on" in page and "the formula's own share" in page
    monkeypatch.setattr(found, "set_up", lambda *_, **__: pytest.fail("measured again"))
    found.main(words.split())
    assert (tmp_path / "found.md").read_text() == page


def rows_of(
    role: str, name: str, validation: float, losses: list[float], choices: str = "compare model"
) -> dict[str, Any]:
    return {
        **dict.fromkeys(script("found_report").CONDITIONS, 1),
        "role": role,
        "recipe": name,
        "formula": "abs(W)",
        "choices": choices,
        "sparsity": 0.5,
        "pattern": "free",
        "seed": 3,
        "validation_perplexity": validation,
        "test_perplexity": sum(losses),
        "window_losses": {"test": losses},
    }


def test_the_formulas_own_gain_is_that_over_the_best_rival_with_the_same_choices() -> None:
    report = script("found_report")
    rows = [
        # The best on validation text, and not on test text, which nothing is chosen by.
        rows_of("published", "wanda", 50.0, [30.0, 30.0], "compare row"),
        rows_of("published", "gblm", 55.0, [28.0, 28.0], "compare row"),
        rows_of("around", "wanda", 90.0, [50.0, 50.0]),
        rows_of("around", "gblm", 45.0, [24.0, 24.0]),
        rows_of("around", "gblm", 1.0, [1.0, 1.0], "compare another"),
        rows_of("found", "mine", 40.0, [20.0, 20.0]),
    ]
    (found,) = report.gathered(rows)
    assert found.is_fair and report.whole_gain(found) == 60 - 40
    assert report.own_gain(found) == 48 - 40 and report.share(found) == "40 %"
    page = "\n".join(report.report(rows))
    assert "Better than gblm with these choices, the strongest rival on validation text" in page
    # Each rival by the stronger of its two: Wanda as published, GBLM with the same choices.
    (wanda,) = [line for line in page.splitlines() if line.startswith("| wanda |")]
    (gblm,) = [line for line in page.splitlines() if line.startswith("| gblm |")]
    assert f"{40 / 60 - 1:+.1%}" in wanda and f"{40 / 48 - 1:+.1%}" in gblm


def test_what_was_not_measured_or_refused_is_said_by_name() -> None:
    report = script("found_report")
    rows = [
        rows_of("published", "wanda", 50.0, [30.0, 30.0], "compare row"),
        rows_of("published", "gblm", 55.0, [28.0, 28.0], "compare row"),
        rows_of("found", "mine", 40.0, [20.0, 20.0]),
    ]
    (found,) = report.gathered(rows)
    assert not found.is_fair
    page = "\n".join(report.report(rows))
    assert "Not measured with these choices: wanda, gblm." in page and "share:" not in page
    # Of what was measured in part, a bound is known.
    (found,) = report.gathered([*rows, rows_of("around", "gblm", 45.0, [24.0, 24.0])])
    assert not found.is_fair
    assert report.own_cells(found) == ["gblm 48.0", "at most 8.0", "at most 40 %"]
    assert "Not measured with these choices: wanda." in "\n".join(report.verdict(found))
    refused = [
        rows_of("around", "wanda", 45.0, [24.0, 24.0]),
        rows_of("around", "gblm", 0.0, []) | {"refused": "it has no rows"},
    ]
    (found,) = report.gathered([*rows, *refused])
    assert found.is_fair and report.own_gain(found) == 8
    assert "gblm cannot take these choices: it has no rows." in "\n".join(
        report.report([*rows, *refused])
    )
