"""`prunezero show` tells what the folder of a search holds, whatever state it is in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from prunezero.errors import PruneZeroError, SearchError
from prunezero.formula import Criterion
from prunezero.models.loading import load as loading
from prunezero.pruning.recipes.recipe import Recipe
from tests.cli.conftest import Run


@pytest.fixture(autouse=True)
def no_models(monkeypatch: pytest.MonkeyPatch, finished_search: Path) -> None:
    """Nothing here may load a model; the search itself was before."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "_load_network", refused)


def test_a_finished_search_is_shown_with_its_counts_front_and_winner(run: Run, mine: Path) -> None:
    result = run("show mine --json o.json")
    assert result.exit_code == 0, result.output
    data = json.loads(Path("o.json").read_text())
    rows = parquet.read_table(mine / "candidates.parquet").to_pylist()
    known = sum(row["status"] == "known" for row in rows)
    measured = sum(row["search_perplexity"] is not None for row in rows)
    assert f"{len(rows)} proposed, {known} known" in result.output
    assert f"12 screened, {data['counts']['by quick KL']} by quick KL, {measured} measured" in (
        result.output
    )
    recipe = Recipe.load(mine / "recipe.yaml")
    assert f"criterion: {recipe.criterion.text}" in result.output
    assert "seed 3" in result.output and "strategy evolution" in result.output
    published = ["magnitude", "wanda", "ria", "gblm", "pruner_zero", "fisher"]
    on_same_terms = [f"{name} +" for name in published]
    names = [row["recipe"] for row in data["rows"]]
    assert names == ["dense", *published, *on_same_terms, "mine"]
    assert all(row["validation_perplexity"] and row["test_perplexity"] for row in data["rows"])
    # No search text is spent on rows that are read once it is over.
    searched = {row["recipe"] for row in data["rows"] if row["search_perplexity"]}
    assert searched == {*names} - {*on_same_terms}
    assert data["finished"] and data["config"]["seed"] == 3
    assert "--resume" not in result.output


def test_the_front_holds_what_nothing_of_its_size_beats(run: Run, mine: Path) -> None:
    run("show mine --json o.json")
    front = json.loads(Path("o.json").read_text())["front"]
    rows = parquet.read_table(mine / "candidates.parquet").to_pylist()
    measured = [row for row in rows if row["search_perplexity"] is not None]
    assert front and len(measured) > len(front)
    for row in front:
        small = [one for one in measured if one["complexity"] <= row["complexity"]]
        assert row["search_perplexity"] == min(one["search_perplexity"] for one in small)
    run("show mine --top 1 --json o.json")
    (best,) = json.loads(Path("o.json").read_text())["front"]
    assert best["search_perplexity"] == min(one["search_perplexity"] for one in measured)


def test_more_than_the_best_of_each_size_is_shown_where_it_was_asked_for(
    run: Run, mine: Path
) -> None:
    fronts = {}
    for each in (1, 2):
        result = run(f"show mine --each {each} --json o.json")
        fronts[each] = json.loads(Path("o.json").read_text())["front"]
    assert "front: the best 2 of each size on search text" in result.output
    rows = parquet.read_table(mine / "candidates.parquet").to_pylist()
    measured = [row for row in rows if row["status"] == "new" and row["search_perplexity"]]
    assert len(fronts[2]) > len(fronts[1])
    for size in {row["complexity"] for row in fronts[1]}:
        alike = sorted(row["search_perplexity"] for row in measured if row["complexity"] == size)
        of_size = [row["search_perplexity"] for row in fronts[2] if row["complexity"] == size]
        assert of_size == alike[:2]
    lines = run("show mine --each 2 --latex").output.splitlines()
    assert len([line for line in lines if "&" in line]) == len(fronts[2]) + 1


def test_the_latex_table_is_balanced_and_holds_the_formulas(run: Run, mine: Path) -> None:
    result = run("show mine --latex --json o.json")
    assert result.exit_code == 0, result.output
    front = json.loads(Path("o.json").read_text())["front"]
    assert r"\begin{tabular}{rrrl}" in result.output
    assert result.output.rstrip().endswith(r"\end{tabular}")
    lines = [line for line in result.output.splitlines() if "&" in line][1:]
    assert len(lines) == len(front)
    for line, row in zip(lines, front, strict=True):
        assert f"${Criterion.parse(row['formula']).latex}$" in line
        assert line.startswith(f"{row['complexity']} & {row['search_perplexity']:.2f} & ")
        assert line.endswith(r"\\") and line.count("&") == 3
        plain = line.replace(r"\{", "").replace(r"\}", "")
        assert plain.count("{") == plain.count("}")
        assert "_" not in re.sub(r"\$[^$]*\$", "", line)


def test_a_path_is_as_good_as_a_name(run: Run, mine: Path) -> None:
    for typed in (str(mine), str(mine.absolute()), "mine"):
        assert (
            run(f"show {typed}").output.splitlines()[1:]
            == (run("show mine").output.splitlines()[1:])
        )


def unfinished(folder: Path) -> str:
    (folder / "recipe.yaml").unlink()
    return "not finished; go on with: prunezero search --name mine --resume"


def killed(folder: Path) -> str:
    unfinished(folder)
    (folder / "candidates.parquet").unlink()
    return "of layer error"


def from_before(folder: Path) -> str:
    (folder / "search.json").unlink()
    return "12 screened"


def torn(folder: Path) -> str:
    journal = folder / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    return "12 screened"


@pytest.mark.parametrize("change", [unfinished, killed, from_before, torn])
def test_a_search_is_shown_as_far_as_it_is(
    change: Callable[[Path], str], run: Run, mine: Path
) -> None:
    sentence = change(mine)
    result = run("show mine")
    assert result.exit_code == 0, result.exception
    assert sentence in result.output
    assert "wanda" in result.output and "pattern free" in result.output


@pytest.mark.parametrize("file", ["candidates.parquet", "recipe.yaml", "search.json"])
def test_a_damaged_file_is_one_sentence(file: str, run: Run, mine: Path) -> None:
    (mine / file).write_text("{[")
    result = run("show mine")
    assert isinstance(result.exception, PruneZeroError)
    assert file in str(result.exception) and "\n" not in str(result.exception)


def test_a_search_that_is_not_there_is_answered_with_the_nearest(run: Run, mine: Path) -> None:
    result = run("show mime")
    assert isinstance(result.exception, SearchError)
    assert str(result.exception) == "there is no search 'mime' in runs; did you mean 'mine'?"
