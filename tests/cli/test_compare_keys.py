"""`prunezero compare` of recipes of keys and links: several texts, a pruned model, MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import PruneZeroError, RecipeError
from prunezero.pruning.attention import kept_row
from prunezero.pruning.prompts import texts_of
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import Settings, set_up
from prunezero.report.tracking import database
from tests.cli.conftest import Run, flat
from tests.tiny_models import save_tiny_model

SIZES = "--sequence-length 256 --calibration-tokens 512 --evaluation-tokens 512"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_tiny_model("llama", tmp_path / "model", max_position_embeddings=320)
    words = ["alpha", "beta", "gamma", "delta", "omega"]
    documents = [
        " ".join(words[(at * step + step) % 5] for at in range(90)) for step in range(1, 40)
    ]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    return folder


def test_recipes_of_keys_are_compared_on_several_texts_also_on_a_pruned_model(
    run: Run, model: Path
) -> None:
    result = run(
        f"prune --model {model} --text text.txt --recipe wanda_sp --sparsity 0.25 --output smaller "
        "--sequence-length 64 --calibration-tokens 256 --evaluation-tokens 128 --test-tokens 128"
    )
    assert result.exit_code == 0, result.exception
    command = f"compare --model smaller --text text.txt {SIZES} --sparsity 0.5"
    result = run(f"{command} --recipes snapkv,adakv,quest --json out.json --plot front.png")
    assert result.exit_code == 0, result.output + repr(result.exception)
    rows = {row["recipe"]: row for row in json.loads(Path("out.json").read_text())["rows"]}
    assert list(rows) == ["dense", "snapkv", "adakv", "quest"]
    testbed = set_up("smaller", "text.txt", Settings(256, 512, 512, 512))
    texts = texts_of(testbed, "validation", ("text", "needle", "cloze"))
    alone = kept_row(testbed.language_model, Recipe.load("snapkv"), 0.5, texts)
    row = rows["snapkv"]
    for key in ("text_kl", "text_kl_late", "text_perplexity", "needle_answered", "cloze_kl"):
        assert row[key] == alone[key], key
    assert row["kv_bytes"] == alone["kv_bytes"] / 192 == rows["dense"]["kv_bytes"] / 2
    assert (row["removed"], row["unit"], row["signal"]) == (0.5, "kv_column", "activations")
    assert not row["simulated"] and rows["adakv"]["simulated"] and rows["quest"]["simulated"]
    assert rows["quest"]["links"] < 0.7 and rows["quest"]["unit"] == "link"
    for name in ("recall", "needle", "needles", "cloze"):
        assert rows["dense"][f"{name}_perplexity"] > 1 and row[f"{name}_kl"] >= 0
    said = flat(result.output)
    assert "snapkv" in said and "64 tokens behind prompts of 192" in said
    assert Path("front.png").read_bytes().startswith(b"\x89PNG")
    _is_in_mlflow(row)


def _is_in_mlflow(row: dict[str, Any]) -> None:
    client, _ = database.open_client(
        f"sqlite:///{Path('runs/mlflow.db').resolve()}", Path("runs").resolve()
    )
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    (found,) = [one for one in runs if one.info.run_name == "snapkv 0.5 keys"]
    assert found.data.tags["role"] == "baseline"
    told = found.data.metrics
    assert told["eval/text_kl"] == row["text_kl"] and told["eval/recall_kl"] == row["recall_kl"]
    assert told["eval/needle_answered"] == row["needle_answered"]
    assert told["units/removed"] == 0.5 and told["keys/links"] == row["links"]
    assert told["units/kv_bytes_per_token"] == row["kv_bytes"]
    assert found.data.params["signal"] == "activations"
    assert found.data.params["unit"] == "kv_column"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--recipes snapkv,wanda --sparsity 0.5", "compare them apart, or prune by wanda first"),
        ("--recipes snapkv", "which share of a prompt's keys goes"),
        ("--recipes snapkv --sparsity 0.5 --pattern 2:4", "--pattern says nothing of that"),
        ("--recipes snapkv --sparsity 0.5 --unit head", "--unit says nothing of that"),
        ("--recipes snapkv --sparsity 0.5 --test-tokens 512", "--test-tokens says nothing"),
        ("--recipes snapkv --sparsity 0.5 --statistics sequential", "--statistics says nothing"),
        ("--recipes snapkv --sparsity 0.5 --no-rounding", "--no-rounding says nothing"),
        ("--recipes snapkv --sparsity 0.5 --sequence-length 8", "windows of 8 tokens are too"),
    ],
)
def test_what_says_nothing_of_keys_is_refused_before_a_model_is_loaded(
    typed: str, said: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunezero.models.loading import load as loading

    monkeypatch.setattr(loading, "_load_network", None)
    result = run(f"compare --model nowhere {typed}")
    assert isinstance(result.exception, PruneZeroError), result.exception
    assert said in str(result.exception)


def test_a_stage_of_keys_is_refused_with_the_way_to_have_both(run: Run) -> None:
    Path("both.yaml").write_text("name: both\nstages:\n- recipe: wanda_sp\n- recipe: snapkv\n")
    result = run("compare --model nowhere --recipes both.yaml --sparsity 0.5")
    assert isinstance(result.exception, RecipeError)
    assert "compare this recipe on the saved model" in str(result.exception)
