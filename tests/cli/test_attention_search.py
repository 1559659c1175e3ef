"""`prunezero search` in a space of keys: a front of recipes, gone on with after a kill, shown."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from typer.testing import CliRunner, Result

from prunezero.cli import app
from prunezero.errors import PruneZeroError, RecipeError, SearchError
from prunezero.pruning.recipes.documents import write_document
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.report.tracking import database
from prunezero.searching.attending.front import dominates
from prunezero.searching.spaces.space import SearchSpace
from tests.cli.conftest import Run, flat
from tests.tiny_models import save_tiny_model

SIZES = "--sequence-length 112 --calibration-tokens 224 --evaluation-tokens 224 --threads 1"
BEGUN = "search --space keys.yaml --sparsity 0.5 --seed 2"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved tiny model, a text and a space in small generations."""
    folder = tmp_path_factory.mktemp("keys")
    save_tiny_model("llama", folder / "model", max_position_embeddings=256)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(80)]
    documents = [" ".join(rng.choices(words, k=80)) for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    fields = SearchSpace.load("attention").model_dump(mode="json")
    fields |= {"name": "keys", "generation": 4, "measured": 3}
    write_document(fields, folder / "keys.yaml")
    return folder


def type_in(folder: Path, command: str) -> Result:
    words = f"{command} --model {folder / 'model'} --text {folder / 'text.txt'} {SIZES}".split()
    return CliRunner().invoke(app, words)


@pytest.fixture(scope="module")
def whole(files: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that ended, `runs/whole`; to look at, not to change."""
    place = tmp_path_factory.mktemp("whole")
    (place / "runs").mkdir()
    shutil.copy(empty_database, place / "runs" / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        shutil.copy(files / "keys.yaml", place)
        result = type_in(files, f"{BEGUN} --budget 14 --name whole --json out.json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    (place / "output").write_text(result.output)
    return place / "runs" / "whole"


@pytest.fixture
def here(whole: Path, run: Run) -> Path:
    """A copy of it, as `runs/whole` of the folder at hand."""
    shutil.copytree(whole, "runs/whole")
    return Path("runs/whole")


def results(folder: Path) -> list[dict[str, Any]]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_search_leaves_a_front_of_recipes_beside_its_published_rivals(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names == {
        *("search.json", "journal.jsonl", "candidates.parquet", "candidates.csv"),
        *("front", "front.md", "results.json", "pareto.png"),
    }
    rows = results(whole)
    assert {"snapkv", "keydiff", "tova"} <= {row["recipe"] for row in rows}
    found = {row["recipe"] for row in rows if row["is_found"]}
    assert found == {path.stem for path in (whole / "front").glob("*.yaml")}
    for path in (whole / "front").glob("*.yaml"):
        recipe = Recipe.load(path)
        assert recipe.unit.word == "kv_column" and recipe.provenance["kept"] == 0.5
    points = {row["recipe"]: (row["text_kl"], row["recall_kl"]) for row in rows if "rank" in row}
    for row in rows:
        if "rank" in row:
            beaten = any(dominates(one, points[row["recipe"]]) for one in points.values())
            assert (row["rank"] == 0) == (not beaten)
    table = parquet.read_table(whole / "candidates.parquet").to_pylist()
    measured = [row for row in table if row["status"] == "measured"]
    assert len(measured) == 14 and all(row["text_kl"] >= 0 for row in measured)
    assert {row["origin"] for row in measured} > {"seed"}
    told = json.loads((whole / "search.json").read_text())
    assert (told["sparsity"], told["seed"], told["sequence_length"]) == (0.5, 2, 112)
    data = json.loads((whole.parents[1] / "out.json").read_text())
    assert {row["recipe"] for row in data["rows"]} == {row["recipe"] for row in rows}
    assert (whole / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_mlflow_has_the_search_its_candidates_and_the_front_under_common_names(whole: Path) -> None:
    client, experiment = database.open_client(
        f"sqlite:///{whole.parent / 'mlflow.db'}", whole.parent
    )
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    by_role: dict[str, list[Any]] = {}
    for one in runs:
        by_role.setdefault(one.data.tags["role"], []).append(one)
    assert len(by_role["search"]) == 1 and len(by_role["candidate"]) == 14
    assert by_role["search"][0].data.params["space"] == "keys"
    assert by_role["search"][0].data.metrics["search/best_recall_kl"] > 0
    front = {path.stem for path in (whole / "front").glob("*.yaml")}
    assert {one.info.run_name for one in by_role["champion"]} == front
    snapkv = next(one for one in by_role["baseline"] if one.info.run_name == "snapkv")
    assert snapkv.data.params["signal"] == "activations"
    assert snapkv.data.params["unit"] == "kv_column"
    row = next(row for row in results(whole) if row["recipe"] == "snapkv")
    told = snapkv.data.metrics
    assert told["eval/text_kl"] == row["text_kl"] and told["eval/recall_kl"] == row["recall_kl"]
    assert told["units/removed"] == 0.5
    assert told["units/kv_bytes_per_token"] == row["kv_bytes"] / 84


@pytest.fixture
def process(files: Path, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts the command in a process of its own."""
    begun: list[subprocess.Popen[str]] = []

    def start(command: str) -> subprocess.Popen[str]:
        places = f"--model {files / 'model'} --text {files / 'text.txt'} {SIZES}"
        words = [sys.executable, "-m", "prunezero", *f"{command} {places}".split()]
        around = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        begun.append(
            subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=around)
        )
        return begun[-1]

    yield start
    for one in begun:
        one.kill()
        one.wait()
        assert one.stdout is not None
        one.stdout.close()


def test_a_search_that_was_killed_ends_where_the_whole_one_does(
    files: Path, whole: Path, run: Run, process: Callable[[str], subprocess.Popen[str]]
) -> None:
    shutil.copy(files / "keys.yaml", Path())
    child = process(f"{BEGUN} --budget 14 --name whole")
    journal = Path("runs/whole/journal.jsonl")
    size = (whole / "journal.jsonl").stat().st_size
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.stat().st_size < size / 3:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not Path("runs/whole/results.json").exists()
    assert "go on with --resume" in flat(run("list runs").output)
    shown = run("show whole")
    assert shown.exit_code == 0 and "not finished; go on with: prunezero search --name whole" in (
        flat(shown.output)
    )
    # Without the options of before, and on the same threads.
    resumed = run("search --name whole --resume --budget 14 --threads 1")
    assert resumed.exit_code == 0, resumed.exception
    assert results(Path("runs/whole")) == results(whole)
    for path in (whole / "front").glob("*.yaml"):
        assert Path("runs/whole/front", path.name).read_text() == path.read_text()
    table = [parquet.read_table(one / "candidates.parquet") for one in (Path("runs/whole"), whole)]
    assert table[0].equals(table[1])


def test_what_a_search_found_is_shown_without_its_model(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunezero.models.loading import load as loading

    monkeypatch.setattr(loading, "_load_network", None)
    result = run("show whole --json shown.json")
    assert result.exit_code == 0, result.exception
    data = json.loads(Path("shown.json").read_text())
    assert data["finished"] and data["answers"]["measured"] == 14
    assert data["config"]["seed"] == 2
    said = flat(result.output)
    assert "0.5 of a prompt's keys" in said and "snapkv" in said
    for recipe in data["front"]:
        assert f"{recipe['name']}.yaml: {recipe['criterion']}" in said
    assert "finished" in flat(run("list runs").output)
    refused = run("show whole --latex")
    assert isinstance(refused.exception, SearchError) and "front.md" in str(refused.exception)
    refused = run("verify whole")
    assert isinstance(refused.exception, PruneZeroError)
    assert "unit: kv_column" in str(refused.exception)


REFUSED = [
    ("--pattern 2:4", "--pattern says nothing of that"),
    ("--also 0.7", "--also says nothing of that"),
    ("--also-model demo", "--also-model says nothing of that"),
    ("--draws 3", "--draws says nothing of that"),
    ("--targets q_proj", "--targets says nothing of that"),
    ("--strategy random", "--strategy says nothing of that"),
    ("--objective kl", "--objective says nothing of that"),
    ("--stop-early", "--stop-early says nothing of that"),
    ("--memory-limit 4GiB", "in this process and its memory; leave --memory-limit out"),
    ("--test-tokens 4096", "reads no test text"),
    ("--workers 2", "in this process and its memory; leave --workers out"),
    ("--cluster local", "in this process and its memory; leave --cluster out"),
    ("--sequence-length 8", "windows of 8 tokens are too short"),
    ("--start-from wanda", "recipe wanda cannot start a search of space attention: it is of unit"),
    ("--start-from duo_heads", "STREAM is of whole heads, which no rung sees"),
    ("--start-from h2o_mean", "it looks at 'full map'"),
]


@pytest.mark.parametrize(("typed", "sentence"), REFUSED, ids=[typed for typed, _ in REFUSED])
def test_options_that_make_no_sense_are_refused_before_any_work(
    typed: str, sentence: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunezero.models.loading import load as loading

    monkeypatch.setattr(loading, "_load_network", None)
    command = "search --space attention --sparsity 0.5 --budget 5 --name x --model nowhere"
    result = run(f"{command} {typed}")
    assert isinstance(result.exception, PruneZeroError), result.exception
    assert sentence in str(result.exception)
    assert not Path("runs/x/journal.jsonl").exists()


def test_a_share_of_keys_is_asked_for_and_a_running_search_keeps_its_own(
    here: Path, run: Run
) -> None:
    for typed in ("", "--sparsity 0"):
        result = run(f"search --space attention --budget 5 --name x {typed} --model nowhere")
        assert "which share of a prompt's keys goes" in str(result.exception)
    result = run("search --name whole --resume --budget 14 --sparsity 0.6")
    assert isinstance(result.exception, SearchError)
    assert "--sparsity 0.5, now 0.6" in str(result.exception)
    result = run(f"search --name whole --budget 14 --space attention --sparsity 0.5 {SIZES}")
    assert isinstance(result.exception, PruneZeroError)


def test_a_search_starts_from_the_front_of_another(files: Path, here: Path, run: Run) -> None:
    shutil.copy(files / "keys.yaml", Path())
    more = "--from-scratch --start-from whole --budget 3 --name second"
    result = type_in(files, f"{BEGUN} {more}")
    assert result.exit_code == 0, result.exception
    told = json.loads(Path("runs/second/search.json").read_text())
    formulas = [
        Recipe.load(path).criterion.text for path in sorted(Path("runs/whole/front").glob("*"))
    ]
    assert [one["formula"] for one in told["start"]] == formulas
    table = parquet.read_table("runs/second/candidates.parquet").to_pylist()
    seeds = [row["formula"] for row in table if row["origin"] == "seed"]
    assert seeds and set(seeds) <= set(formulas)
    assert isinstance(run("search --space tiny --start-from whole").exception, RecipeError)
