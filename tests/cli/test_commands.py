"""Every command does what its help says, and every mistake is one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunezero.errors import PruneZeroError
from prunezero.models.measures import TO_DENSE
from prunezero.pruning.recipes.recipe import Recipe
from tests.cli.conftest import Run, small_space

COMMANDS = ["search", "show", "verify", "compare", "prune", "export", "list", "ui", "doctor"]
ROW = [
    "recipe",
    "sparsity",
    "pattern",
    "statistics",
    "seed",
    "calibration_tokens",
    "sequence_length",
    "sparsity_reached",
    "validation_perplexity",
    "test_perplexity",
    *TO_DENSE,
    "seconds",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_examples_in_its_help(command: str, run: Run) -> None:
    result = run(f"{command} --help")
    assert result.exit_code == 0
    assert f"prunezero {command}" in result.output


def test_compare_writes_one_flat_row_per_recipe(run: Run) -> None:
    result = run("compare MODEL --recipes magnitude,wanda,gblm --sparsity 0.5 --json out.json")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("out.json").read_text())
    assert set(found) == {"model", "text", "rows"}
    assert [row["recipe"] for row in found["rows"]] == ["dense", "magnitude", "wanda", "gblm"]
    for row in found["rows"]:
        assert set(ROW) <= set(row)
        assert row["validation_perplexity"] > 1
        assert 0 <= row["top1_agreement"] <= row["top5_agreement"] <= 1 and row["acceptance"] > 0.5
    assert [found["rows"][0][key] for key in TO_DENSE] == [0.0, 1.0, 1.0, 1.0]
    assert all(row["acceptance"] < 1 for row in found["rows"][1:])
    assert found["rows"][2]["sparsity_reached"] == 0.5
    assert {row["statistics"] for row in found["rows"][1:]} == {"dense"}
    assert "windows of 16 tokens" in result.output


def test_compare_with_a_pattern_and_sequential_statistics(run: Run) -> None:
    result = run(
        "compare MODEL --recipes wanda --pattern 2:4 --statistics sequential --json o.json"
    )
    assert result.exit_code == 0, result.output
    row = json.loads(Path("o.json").read_text())["rows"][1]
    assert (row["pattern"], row["statistics"], row["sparsity"]) == ("2:4", "sequential", 0.5)


def test_prune_saves_a_folder_that_plain_transformers_loads(run: Run) -> None:
    result = run("prune MODEL --recipe wanda --sparsity 0.5 --output pruned --json o.json")
    assert result.exit_code == 0, result.output
    assert "do not make a model smaller or faster" in result.output
    assert "counted from the files" in result.output
    row = json.loads(Path("o.json").read_text())
    assert set(ROW) <= set(row) and row["sparsity_reached"] == 0.5
    assert {"README.md", "recipe.yaml", "report.json"} <= set(os.listdir("pruned"))
    assert Recipe.load(Path("pruned/recipe.yaml")).name == "wanda"
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained("pruned").state_dict()
    assert (weights["model.layers.0.mlp.down_proj.weight"] == 0).float().mean() == 0.5
    card = Path("pruned/README.md").read_text()
    assert card.split("---\n")[2].strip().startswith("Zeros do not make a model smaller")


def test_search_leaves_a_recipe_a_pruner_tables_and_pictures_then_resumes(run: Run) -> None:
    command = "search MODEL --sparsity 0.5 --budget 12 --name mine --json o.json"
    result = run(command)
    assert result.exit_code == 0, result.output
    files = ["recipe.yaml", "pruner.py", "results.json", "candidates.parquet", "candidates.csv"]
    files += ["pareto.png", "proxy.png", "progress.png", "journal.jsonl"]
    assert set(files) <= set(os.listdir("runs/mine"))
    assert str(Path("runs/mine/pruner.py")) in result.output
    first = json.loads(Path("o.json").read_text())
    names = [row["recipe"] for row in first["rows"]]
    published = ["magnitude", "wanda", "ria", "gblm", "pruner_zero", "fisher"]
    assert [name for name in names if not name.endswith(" +")] == ["dense", *published, "mine"]
    recipe = Recipe.load(Path("runs/mine/recipe.yaml"))
    assert recipe.provenance["measured"][-1]["recipe"] == "mine"
    refused = run(command)
    assert isinstance(refused.exception, PruneZeroError) and "--resume" in str(refused.exception)
    again = run(f"{command} --resume")
    assert again.exit_code == 0, again.output
    assert json.loads(Path("o.json").read_text())["rows"][-1]["formula"] == recipe.criterion.text
    listed = run("list runs")
    assert "mine" in listed.output and "finished" in listed.output
    exported = run("export --recipe mine --output page.py")
    assert exported.exit_code == 0
    assert "prunezero" not in "".join(
        line for line in Path("page.py").read_text().splitlines() if "import" in line
    )


def test_a_strategy_that_screens_nothing_is_watched_and_measured_like_others(run: Run) -> None:
    small_space(Path("small.yaml"))
    options = "--sparsity 0.5 --space small.yaml --strategy plain-gp --budget 12 --name plain"
    result = run(f"search MODEL {options} --json o.json")
    assert result.exit_code == 0, result.exception
    assert "0 by quick KL" in result.output
    assert json.loads(Path("o.json").read_text())["rows"][-1]["recipe"] == "plain"
    shown = run("show plain")
    assert "strategy plain-gp" in shown.output and "12 proposed" in shown.output


def test_list_names_everything(run: Run) -> None:
    result = run("list --json all.json")
    assert result.exit_code == 0
    lists = json.loads(Path("all.json").read_text())
    kinds = {"recipes", "choices", "spaces", "strategies", "features", "operators", "runs"}
    assert set(lists) == kinds
    assert {"wanda", "pruner_zero"} <= {row["name"] for row in lists["recipes"]}
    assert {"formulas", "pruner_zero", "tiny"} <= {row["name"] for row in lists["spaces"]}
    assert {"evolution", "plain-gp"} <= {row["name"] for row in lists["strategies"]}


def test_doctor_shows_the_trial_of_dtypes(run: Run) -> None:
    result = run("doctor --json doctor.json")
    assert result.exit_code == 0
    facts = json.loads(Path("doctor.json").read_text())
    assert "float32" in facts["one product"] and "bfloat16" in facts["one product"]


MISTAKES = [
    ("prune MODEL --recipe wandaa --sparsity 0.5", "did you mean 'wanda'"),
    ("prune MODEL --recipe wanda", "say how much to remove"),
    ("prune MODEL --recipe wanda --sparsity 1.5", "below 1"),
    ("prune MODEL --recipe wanda --sparsity 0.6 --pattern 2:4", "0.5"),
    ("prune MODEL --recipe wanda --pattern 5:4", "1 <= N < M"),
    ("prune MODEL --recipe wanda --sparsity 0.5 --targets qproj", "did you mean 'q_proj'"),
    ("prune MODEL --recipe wanda --sparsity 0.5 --ignore nothing", "matches no layer"),
    ("prune MODEL --recipe wanda --sparsity 0.5 --statistics dens", "dense or sequential"),
    ("prune MODEL --recipe wanda --sparsity 0.5 --output full", "not empty"),
    ("prune MODEL --recipe wanda --sparsity 0.5 --json no/where.json", "cannot be written"),
    ("prune MODEL --recipe wanda --sparsity 0.5 --sequence-length 65", "64"),
    ("prune --model no/such/folder --recipe wanda --sparsity 0.5", "no/such/folder"),
    ("prune --model full --recipe wanda --sparsity 0.5", "full"),
    ("prune MODEL --text nowhere.txt --recipe wanda --sparsity 0.5", "nowhere.txt"),
    ("compare MODEL --recipes , --sparsity 0.5", "names no recipe"),
    ("compare MODEL --sparsity 0.5 --calibration-tokens 8", "at least one window"),
    ("compare MODEL --sparsity 0.5 --test-tokens 9999999", "test split"),
    ("search MODEL --sparsity 0.5", "--budget"),
    ("search MODEL --sparsity 0.5 --time soon", "10m"),
    ("search MODEL --sparsity 0.5 --budget 5 --space formula", "did you mean 'formulas'"),
    ("search MODEL --sparsity 0.5 --budget 5 --strategy evolutoin", "did you mean 'evolution'"),
    ("search MODEL --sparsity 0.5 --budget 5 --name ../x", "--name"),
    ("search MODEL --sparsity 0.5 --budget 5 --name new --resume", "no search to go on with"),
    ("search MODEL --sparsity 0.5 --budget 5 --resume", "needs the --name"),
    ("search MODEL --sparsity 0.5 --budget 5 --runs-dir full/file", "is a file"),
    ("show nothing", "there is no search 'nothing' in runs"),
    ("verify full", "there is no search 'full' in runs"),
    ("export --recipe wanda", "sequential"),
    ("export --recipe nobody", "not a known recipe"),
    ("list recipe", "did you mean 'recipes'"),
    ("ui --runs-dir empty", "holds no runs yet"),
]


@pytest.mark.parametrize(("command", "sentence"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_answered_in_one_sentence(command: str, sentence: str, run: Run) -> None:
    Path("full").mkdir()
    Path("full/file").write_text("")
    result = run(command)
    assert isinstance(result.exception, PruneZeroError), result.output
    message = str(result.exception)
    assert sentence in message
    assert "\n" not in message and len(message) < 600


def test_the_process_prints_the_sentence_and_no_traceback() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "prunezero", "prune", "--recipe", "wandaa", "--sparsity", "0.5"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.startswith(
        "prunezero: 'wandaa' is not a known recipe; did you mean 'wanda'"
    )
    assert "Traceback" not in result.stderr + result.stdout


@pytest.mark.parametrize("name", ["../x", "/abs", "a\nb", "x" * 300, "abs(W)*X", "", ".hidden"])
def test_a_name_that_could_not_be_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    from prunezero.errors import OutputError
    from prunezero.report.runs.folder import run_folder

    with pytest.raises(OutputError):
        run_folder(tmp_path, name)
