"""A search over several models, as a user runs it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from prunezero.errors import SearchError
from prunezero.pruning.recipes.recipe import Recipe
from tests.cli.conftest import Run, flat, small_space, typing
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def finished(tiny_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a search over two models that ended, and what it printed."""
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("PRUNEZERO_CACHE", str(folder / "cache"))
        save_tiny_model("opt", Path("other"))
        small_space(Path("small.yaml"))
        command = (
            "search MODEL --also-model other --sparsity 0.5 --space small.yaml --budget 6 "
            "--name both --json both.json"
        )
        result = typing(tiny_files)(command)
    assert result.exit_code == 0, (result.output, result.exception)
    (folder / "output").write_text(result.output)
    return folder


@pytest.fixture
def both(finished: Path, run: Run, tmp_path: Path) -> Path:
    """A copy of it in the folder at hand; the folder of the search."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs" / "both"


def test_a_search_over_models_reports_geometric_means_and_each_model(
    both: Path, tiny_files: tuple[Path, Path]
) -> None:
    told = json.loads(Path("both.json").read_text())
    assert told["also_models"] == ["other"]
    names = [str(tiny_files[0]), "other"]
    for row in told["rows"]:
        parts = [part["test_perplexity"] for part in row["regimes"]]
        assert [part["model"] for part in row["regimes"]] == names
        assert math.isclose(row["test_perplexity"], math.sqrt(math.prod(parts)), rel_tol=1e-9)
    output = flat(Path("output").read_text())
    assert f"geometric mean of the perplexities of {names[0]} and other in " in output
    assert f"perplexity, geometric mean over {names[0]} and other" in output
    assert "perplexity on test text on each model" in output
    assert "other: OPTForCausalLM" in output
    # What takes long is told of each model by itself.
    assert "other: gradients of sequence: 4 of 4" in output
    # Both dense models stand in the table of the models.
    dense = [f"{part['test_perplexity']:.2f}" for part in told["rows"][0]["regimes"]]
    table = Path("output").read_text().split("on each model")[1]
    assert ["dense", *dense] in [line.split()[1:6:2] for line in table.splitlines()]
    recipe = Recipe.load(both / "recipe.yaml")
    (other,) = recipe.provenance["also_models"]
    assert other["name"] == "other" and len(other["fingerprint"]) == 32
    assert "geometric mean of test perplexity" in (both / "pruner.py").read_text()
    assert json.loads((both / "search.json").read_text())["also_model"] == ["other"]


def test_it_goes_on_without_typing_the_models_and_refuses_others(run: Run, both: Path) -> None:
    before = Recipe.load(both / "recipe.yaml")
    assert run("search --name both --resume --budget 6").exit_code == 0
    assert Recipe.load(both / "recipe.yaml") == before
    assert run("search --name both --resume --budget 6 --also-model ./other").exit_code == 0
    save_tiny_model("gpt2", Path("third"))
    for typed, told in (
        ("--also-model third", "--also-model other, now third"),
        ("--also-model other --also-model third", "--also-model other, now other and third"),
    ):
        refused = run(f"search --name both --resume --budget 6 {typed}")
        assert isinstance(refused.exception, SearchError) and told in str(refused.exception)


def test_a_second_model_that_was_moved_is_looked_for_where_it_is_now(run: Run, both: Path) -> None:
    Path("far").mkdir()
    shutil.move("other", "far/other")
    assert "other" in str(run("search --name both --resume --budget 6").exception)
    result = run("search --name both --resume --budget 6 --also-model far/other")
    assert result.exit_code == 0, result.exception
    assert json.loads(Path("runs/both/search.json").read_text())["also_model"] == ["far/other"]
    # Others of the same name have another fingerprint.
    shutil.rmtree("far/other")
    save_tiny_model("opt", Path("far/other"), seed=1)
    refused = run("search --name both --resume --budget 6")
    assert isinstance(refused.exception, SearchError)
    assert "also_models: " in str(refused.exception)


def test_show_tells_all_models_whether_it_ended_or_not(
    run: Run, both: Path, tiny_files: tuple[Path, Path]
) -> None:
    for file in ("recipe.yaml", "search.json"):
        shown = run("show both")
        assert shown.exit_code == 0, shown.exception
        output = flat(shown.output)
        assert f"model {tiny_files[0]} and other text" in output
        assert "on each model" in output and "other" in shown.output.split("on each model")[1]
        (both / file).unlink()
    # Without its options, the journal says the names as well.
    assert f"model {tiny_files[0]} and other text" in flat(run("show both").output)


def test_verify_measures_on_all_models(run: Run, both: Path) -> None:
    result = run("verify both --top 1 --json o.json")
    assert result.exit_code == 0, (result.output, result.exception)
    rows = json.loads(Path("o.json").read_text())["rows"]
    assert sum(row["is_reported"] for row in rows) >= 3
    assert all(abs(row["difference"]) < 1e-9 for row in rows if row["is_reported"])


@pytest.mark.parametrize("models", [[], ["third"], ["other", "third"]])
def test_verify_refuses_other_further_models(models: list[str], run: Run, both: Path) -> None:
    save_tiny_model("gpt2", Path("third"))
    options = json.loads((both / "search.json").read_text())
    (both / "search.json").write_text(json.dumps({**options, "also_model": models}))
    result = run("verify both")
    assert isinstance(result.exception, SearchError)
    assert "also_models: " in str(result.exception) and "put back" in str(result.exception)


def test_a_faulty_list_of_models_is_one_sentence(
    run: Run, tiny_files: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_files[0], "copy")
    save_tiny_model("opt", Path("odd"), ffn_dim=66)
    begun = "search MODEL --pattern 2:4 --budget 4 --name faulty"
    for typed, told in (
        (f"--also-model {tiny_files[0]}", "is named twice"),
        ("--also-model odd --also-model odd", "model odd is named twice"),
        ("--also-model copy", "copy are the same model"),
        ("--also-model odd", "model odd: layer"),
        ("--also-model ./nowhere", "nowhere"),
    ):
        refused = run(f"{begun} {typed}")
        assert told in str(refused.exception), refused.exception
        assert "\n" not in str(refused.exception)
        assert not Path("runs/faulty").exists()
