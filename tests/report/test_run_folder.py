"""The folder of a search: refused before the work, and readable whatever the results were."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import OutputError
from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import with_choices
from prunezero.report.export.saved_model import save_pruned
from prunezero.report.runs.folder import check_runs_dir, list_runs, refuse_foreign, write_winner
from prunezero.report.runs.search_file import forget_config, write_config
from prunezero.searching.experiment.config import SearchConfig
from tests.report.test_search_file import OPTIONS
from tests.searching.testbed import tiny_testbed


def row(**changes: Any) -> dict[str, Any]:
    """A row of results as a search measures it."""
    known = {"recipe": "mine", "sparsity": 0.5, "pattern": "free", "seed": 0}
    known |= {"sequence_length": 16, "calibration_tokens": 64, "sparsity_reached": 0.5}
    return {**known, "validation_perplexity": 9.5, "test_perplexity": 8.25, **changes}


def saved_run(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A folder as a finished search leaves it."""
    folder.mkdir(parents=True)
    (folder / "journal.jsonl").write_text("")
    recipe = Recipe.load("wanda").model_copy(update={"statistics": "dense"})
    write_winner(recipe, rows, folder)


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below", "/proc/runs", "x" * 300])
def test_a_runs_folder_that_cannot_be_written_is_one_sentence(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(OutputError, match="--runs-dir .* (is a file|cannot be written)"):
        check_runs_dir(Path(place))


def test_a_new_runs_folder_is_tried_and_not_left(tmp_path: Path) -> None:
    check_runs_dir(tmp_path / "new" / "runs")
    assert list(tmp_path.iterdir()) == []


def test_a_baseline_without_a_perplexity_does_not_stop_the_winner_from_being_written(
    tmp_path: Path,
) -> None:
    broken = row(recipe="magnitude", validation_perplexity=None, test_perplexity=None)
    saved_run(tmp_path / "runs" / "one", [broken, row()])
    page = (tmp_path / "runs" / "one" / "pruner.py").read_text()
    assert "magnitude: test perplexity not finite" in page
    assert "mine: test perplexity 8.25" in page


def test_a_winner_that_no_page_can_follow_is_kept_without_one(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    saved_run(folder, [row()])
    assert (folder / "pruner.py").is_file()
    mending = with_choices(Recipe.load("wanda"), statistics="dense", update="admm")
    # The page of the winner before it would be that of another rule.
    write_winner(mending, [row()], folder)
    assert not (folder / "pruner.py").exists()
    assert Recipe.load(folder / "recipe.yaml").updates == ("admm",)
    assert json.loads((folder / "results.json").read_text())["rows"] == [row()]


def test_a_winner_of_units_has_a_page_that_says_what_was_measured(tmp_path: Path) -> None:
    recipe = Recipe.load("mask_fisher")
    (tmp_path / "one").mkdir()
    write_winner(recipe, [row(recipe="mask_fisher", sparsity=0.2)], tmp_path / "one")
    page = " ".join((tmp_path / "one" / "pruner.py").read_text().split())
    assert page.startswith('"""mask_fisher: remove neurons and key-value heads')
    assert "test perplexity 8.25" in page and "0.2 (neurons and key-value groups)" in page


def test_a_pruned_model_without_a_perplexity_is_saved_with_a_report_that_is_json(
    tmp_path: Path,
) -> None:
    testbed = tiny_testbed()
    layers = find_linears(testbed.language_model.model)
    rows = [row(recipe="dense"), row(test_perplexity=math.nan, kl=math.inf)]
    save_pruned(testbed, Recipe.load("wanda"), rows, layers, tmp_path / "out")
    report = (tmp_path / "out" / "report.json").read_text()
    assert json.loads(report)["rows"][1]["test_perplexity"] is None
    assert "NaN" not in report and "Infinity" not in report


def test_one_damaged_run_does_not_hide_the_others_from_the_list(tmp_path: Path) -> None:
    for name in ("good", "torn", "bare"):
        saved_run(tmp_path / name, [row()])
    (tmp_path / "torn" / "recipe.yaml").write_text("name: [")
    (tmp_path / "bare" / "recipe.yaml").write_text("name: bare\ncriterion: abs(W)\n")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "journal.jsonl").write_text("")
    rows = {row["name"]: row for row in list_runs(tmp_path)}
    assert rows["good"]["test"] == "8.25" and rows["good"]["state"] == "finished"
    assert rows["torn"]["state"] == rows["bare"]["state"] == "recipe.yaml cannot be read"
    assert rows["half"]["state"] == "go on with --resume"


@pytest.mark.parametrize("name", ["recipe.yaml", "notes.txt", "optuna.log", "search.json"])
def test_a_folder_that_no_search_made_is_never_searched_into(name: str, tmp_path: Path) -> None:
    refuse_foreign(tmp_path / "new")
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=f"holds {name} but no journal of a search.*--name"):
        refuse_foreign(tmp_path)
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(OutputError, match=f"holds {name} but no journal"):
        refuse_foreign(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        refuse_foreign(tmp_path / name)


def test_what_a_search_left_that_could_not_begin_is_no_hindrance(tmp_path: Path) -> None:
    write_config(SearchConfig.of(**OPTIONS), tmp_path)
    refuse_foreign(tmp_path)
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(OutputError, match="holds recipe.yaml but no journal"):
        refuse_foreign(tmp_path)
    (tmp_path / "journal.jsonl").write_text("of a search")
    refuse_foreign(tmp_path)


def test_a_search_that_could_not_begin_leaves_no_trace(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    write_config(SearchConfig.of(**OPTIONS), folder)
    forget_config(folder)
    assert not folder.exists()
    folder.mkdir()
    write_config(SearchConfig.of(**OPTIONS), folder)
    (folder / "journal.jsonl").touch()
    forget_config(folder)
    assert (folder / "search.json").is_file()
