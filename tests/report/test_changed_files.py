"""Whatever stands in the files of a search, they are read or refused in a sentence of ours."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunezero.errors import PruneZeroError, RecipeError
from prunezero.files.checked_lines import line_of
from prunezero.pruning.recipes.documents import write_document
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.report.export.page import pruner_page
from prunezero.report.runs.folder import list_runs
from prunezero.report.runs.search_file import read_config
from prunezero.report.runs.summary import read_run, results
from prunezero.report.runs.verification import claims
from prunezero.report.tracking.records import RunRecord, record_to_line
from prunezero.report.tracking.spool import read_record
from prunezero.searching import session as sessions
from prunezero.searching.evaluation.request import Request
from prunezero.searching.experiment.baselines import baselines
from prunezero.searching.experiment.provenance import header
from tests.report.test_search_file import OPTIONS
from tests.searching.testbed import make_task, tiny_space, tiny_testbed

ROW = {
    "recipe": "mine",
    "sparsity": 0.5,
    "pattern": "free",
    "seed": 0,
    "sequence_length": 16,
    "calibration_tokens": 64,
    "test_perplexity": 8.25,
    "regimes": [{"sparsity": 0.5, "pattern": "free", "test_perplexity": 8.25}],
}
TASK = make_task(tiny_space(), 0.5)
HEADER = json.loads(json.dumps(header(TASK, [tiny_testbed()])))
CONFIG = {
    **OPTIONS,
    "space_content": HEADER["config"]["space_content"],
    "start": [{"formula": "W", "choices": {}}],
}
BASELINE = Request.of(baselines(TASK)[0], ("search", "validation"))
RECORDS = [
    {"header": HEADER},
    {"kind": BASELINE.kind, "key": BASELINE.key, "result": {**ROW, "search_perplexity": 9.0}},
]
RECIPE = {
    "schema_version": 1,
    "name": "mine",
    "criterion": "abs(W)*X",
    "provenance": {"slot": 0, "measured": [ROW, {**ROW, "regimes": None}]},
}
LINE = json.loads(
    record_to_line(
        RunRecord(
            "night/1",
            "c1",
            "candidate",
            params={"seed": 1},
            metrics={"a": 1.0},
            curves={"b": [(0, 1.0)]},
            tags={"status": "new"},
            artifacts=(Path("a"),),
        )
    )
)
OTHERS: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 1.5, 10**30, "", "x", "nan", [], [1], ["x"], [[]], {}, {"x": 1}, [{}]]
)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside plain data."""
    inside: Any = data.items() if isinstance(data, dict) else ()
    inside = enumerate(data) if isinstance(data, list) else inside
    for key, value in inside:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(data: Any, way: tuple[Any, ...], value: Any, is_gone: bool) -> Any:
    """A copy of plain data with another value at one place, or none."""
    copy = json.loads(json.dumps(data))
    holder = copy
    for key in way[:-1]:
        holder = holder[key]
    if is_gone:
        del holder[way[-1]]
    else:
        holder[way[-1]] = value
    return copy


FILES = {"journal": RECORDS, "search": CONFIG, "recipe": RECIPE, "line": LINE}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_files_with_any_value_changed_are_read_or_refused_in_a_sentence(
    data: st.DataObject, tmp_path: Path
) -> None:
    name = data.draw(st.sampled_from(sorted(FILES)))
    way = data.draw(st.sampled_from(list(places(FILES[name]))))
    is_gone = data.draw(st.booleans())
    files = FILES | {name: changed(FILES[name], way, data.draw(OTHERS), is_gone)}
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "journal.jsonl").write_bytes(b"".join(map(line_of, files["journal"])))
    (folder / "search.json").write_text(json.dumps(files["search"]))
    write_document(files["recipe"], folder / "recipe.yaml")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list_runs(folder.parent)
        read_record(json.dumps(files["line"]))
        with contextlib.suppress(PruneZeroError):
            config = read_config(folder)
            assert config is not None
            sessions.make_task(config)
        with contextlib.suppress(PruneZeroError):
            run = read_run(folder)
            results(run)
            claims(run, 3)
            assert run.recipe is not None
            pruner_page(run.recipe)


def test_the_files_that_are_changed_here_are_sound_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b"".join(map(line_of, RECORDS)))
    (tmp_path / "search.json").write_text(json.dumps(CONFIG))
    write_document(RECIPE, tmp_path / "recipe.yaml")
    run = read_run(tmp_path)
    assert run.baselines[0]["search_perplexity"] == 9.0
    assert run.has_names and results(run)[-1]["test_perplexity"] == 8.25
    assert read_record(json.dumps(LINE)) is not None


@pytest.mark.parametrize("lacking", ["recipe", "sparsity", "pattern", "seed", "sequence_length"])
def test_provenance_without_a_key_is_one_sentence(lacking: str, tmp_path: Path) -> None:
    row = {key: value for key, value in ROW.items() if key != lacking}
    write_document({**RECIPE, "provenance": {"measured": [row]}}, tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match=rf"provenance: measured.0.{lacking} is not as a search"):
        Recipe.load(tmp_path / "recipe.yaml")
