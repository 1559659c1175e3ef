"""A search folder that the version before wrote is read, shown, started from and gone on with.

`older_run` holds what that version left of this search, beside the `archive.jsonl` of its runs
folder, on the model and text that `typed_here` makes again:

    prunezero search --model model --text letters.txt --sequence-length 16 --calibration-tokens 64
        --evaluation-tokens 64 --test-tokens 64 --dtype float32 --device cpu --sparsity 0.5
        --budget 8 --space formulas --name older
"""

from __future__ import annotations

import json
import platform
import random
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner, Result

from prunezero.cli import app
from prunezero.errors import SearchError
from prunezero.files.checked_lines import line_of, record_of
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.load import load_model
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import with_choices
from prunezero.report.runs.summary import counted, front, read_candidates, read_run, results
from prunezero.report.runs.warm_start import rules_of
from prunezero.searching.experiment.provenance import FORMAT, LIBRARIES
from prunezero.searching.spaces.space import SearchSpace
from tests.tiny_models import HIDDEN, save_tiny_model, tiny_batches, tiny_model

OLDER = Path(__file__).parent / "older_run"
BASELINES = ["dense", "magnitude", "wanda", "ria", "gblm", "pruner_zero"]
SPACE = """
name: older
terminals: [abs(W), X]
operators: [mul, sqrt]
glanced: 3
measured: 1
"""

Typed = Callable[[str], Result]


@pytest.fixture
def typed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Commands in a folder with a copy of the search, its model and its text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    rng = random.Random(0)
    paragraphs = ["".join(rng.choices("abcdefgh ,.", k=200)) for _ in range(60)]
    Path("letters.txt").write_text("\n\n".join(paragraphs))
    save_tiny_model("llama", Path("model"))
    shutil.copytree(OLDER, "runs/older", ignore=shutil.ignore_patterns("archive.jsonl"))
    shutil.copy(OLDER / "archive.jsonl", "runs")
    return lambda command: CliRunner().invoke(app, command.split())


def header_of(folder: Path) -> dict[str, Any]:
    """The header of a journal as it stands there."""
    record = record_of((folder / "journal.jsonl").read_bytes().partition(b"\n")[0])
    assert record is not None
    return dict(record["header"])


def test_an_older_folder_tells_its_experiment_baselines_and_winner() -> None:
    run = read_run(OLDER)
    assert run.has_names and (run.config.model, run.config.text) == ("model", "letters.txt")
    assert (run.config.space, run.config.strategy, run.config.seed) == ("formulas", "evolution", 0)
    assert (run.config.also, run.config.also_model, run.config.targets) == ((), (), ())
    assert (run.config.dtype, run.config.device, run.config.draws) == ("float32", "cpu", 1)
    assert vars(run.config.settings) == header_of(OLDER)["settings"]
    assert run.config.space_content == run.task.space == SearchSpace.load("formulas")
    assert [(one.amount, one.pattern) for one in run.task.budgets] == [(0.5, "free")]
    assert [rule.text for rule in run.task.seeds] == header_of(OLDER)["seeds"]
    assert [row["recipe"] for row in run.baselines] == BASELINES
    assert run.recipe is not None and run.recipe.criterion.text == "abs(W)*X"
    assert [row["recipe"] for row in run.measured] == [*BASELINES, "older"]
    assert [row["recipe"] for row in results(run)] == [*BASELINES, "older"]
    assert run.candidates is not None and len(run.candidates) == 9
    assert (counted(run.candidates)["screened"], counted(run.candidates)["measured"]) == (8, 2)
    assert [row["formula"] for row in front(run.candidates)] == ["abs(W)*X"]


def test_without_search_json_fingerprints_stand_for_names(tmp_path: Path) -> None:
    whole = read_run(OLDER)
    shutil.copy(OLDER / "journal.jsonl", tmp_path)
    run = read_run(tmp_path)
    header = header_of(OLDER)
    assert not run.has_names
    assert (run.config.model, run.config.text) == (header["model"], header["text"])
    assert run.config.settings == whole.config.settings
    assert (run.task.space, run.task.budgets) == (whole.task.space, whole.task.budgets)
    assert run.task.seeds == whole.task.seeds
    assert [row["recipe"] for row in run.baselines] == BASELINES
    assert run.recipe is None and run.candidates is None


def test_an_older_folder_is_shown_and_listed(typed_here: Typed) -> None:
    shown = typed_here("show older --json o.json")
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert "criterion: abs(W)*X" in shown.output and "letters.txt" in shown.output
    data = json.loads(Path("o.json").read_text())
    assert data["finished"] and data["config"]["space"] == "formulas"
    assert [row["recipe"] for row in data["rows"]] == [*BASELINES, "older"]
    listed = typed_here("list runs")
    assert listed.exit_code == 0 and "93.86" in listed.output and "finished" in listed.output


def test_a_search_starts_from_the_rules_of_an_older_one() -> None:
    assert {rule.text for rule in rules_of(str(OLDER), Path("runs"))} == {"abs(W)*X"}
    assert [rule.text for rule in rules_of(str(OLDER / "recipe.yaml"), Path("runs"))] == [
        "abs(W)*X"
    ]


def pruned_weights(recipe: Recipe) -> dict[str, Tensor]:
    """Of a tiny model, half of whose weights a recipe has removed."""
    model = tiny_model()
    sums = calibrate(model, tiny_batches(), find_linears(model.model), dense_sums([recipe]))
    prune(model, recipe, 0.5, statistics=sums)
    return dict(model.model.state_dict())


def test_an_older_recipe_prunes_a_model_as_the_published_one_that_it_equals() -> None:
    recipe = Recipe.load(OLDER / "recipe.yaml")
    assert recipe.provenance["model_fingerprint"] == header_of(OLDER)["model"]
    wanda = with_choices(Recipe.load("wanda"), statistics="dense")
    found, published = (pruned_weights(one) for one in (recipe, wanda))
    assert all(tensor.equal(published[name]) for name, tensor in found.items())
    kept = found["model.layers.0.mlp.up_proj.weight"].count_nonzero(dim=1)
    assert (kept == HIDDEN // 2).all()


def test_an_older_search_space_is_read(tmp_path: Path) -> None:
    path = tmp_path / "older.yaml"
    path.write_text(SPACE)
    space = SearchSpace.load(str(path))
    assert (space.quick_kl, space.measured) == (3, 1)
    assert "glanced" not in space.model_dump(mode="json")


def under_installed_versions(folder: Path) -> None:
    """Let the journal say that the libraries of this machine answered it."""
    path = folder / "journal.jsonl"
    lines = path.read_bytes().partition(b"\n")[2]
    installed = {name: version(name) for name in ("prunezero", *LIBRARIES)}
    python = {"python": ".".join(platform.python_version_tuple()[:2])}
    path.write_bytes(line_of({"header": header_of(folder) | installed | python}) + lines)


@pytest.mark.skipif(FORMAT != header_of(OLDER)["format"], reason="the format is another one now")
def test_an_older_search_goes_on_from_its_journal(typed_here: Typed) -> None:
    folder = Path("runs/older")
    if load_model("model", dtype="float32", device="cpu").fingerprint != header_of(folder)["model"]:
        pytest.skip("these libraries draw other weights")
    under_installed_versions(folder)
    journal = (folder / "journal.jsonl").read_bytes()
    before = read_candidates(OLDER) or []
    went_on = typed_here("search --name older --resume --budget 12")
    assert went_on.exit_code == 0, (went_on.output, went_on.exception)
    # Nothing that was known is asked again.
    after = (folder / "journal.jsonl").read_bytes()
    assert after.startswith(journal) and len(after) > len(journal)
    found = read_candidates(folder) or []
    told = ("slot", "origin", "status", "formula", "mask", "layer_error")
    assert [[row[key] for key in told] for row in found[: len(before)]] == [
        [row[key] for key in told] for row in before
    ]
    assert counted(found)["screened"] == 12
    run = read_run(folder)
    assert [row["recipe"] for row in run.baselines] == [*BASELINES, "fisher"]
    assert run.recipe is not None
    again = json.loads((folder / "search.json").read_text())
    assert again["space_content"]["quick_kl"] == 6 and "glanced" not in again["space_content"]


def test_an_older_search_refuses_other_settings_by_name(typed_here: Typed) -> None:
    under_installed_versions(Path("runs/older"))
    Path("runs/older/search.json").unlink()
    typed = "--model model --text letters.txt --sequence-length 16 --calibration-tokens 64"
    typed += " --evaluation-tokens 64 --test-tokens 64 --dtype float32 --sparsity 0.6"
    refused = typed_here(f"search {typed} --name older --resume --budget 12")
    assert isinstance(refused.exception, SearchError)
    assert "other settings (sparsity: 0.5, now 0.6)" in str(refused.exception)
