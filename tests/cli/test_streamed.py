"""`prunezero prune` within a memory limit, and what waits beside the output for the next run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prunezero.errors import ModelError, OutputError, PruneZeroError, RecipeError
from prunezero.models.measures import TO_DENSE
from prunezero.models.saving.resumable import ResumableCheckpoint
from prunezero.models.streaming import evaluation as streamed_evaluation
from prunezero.pruning import prune as pruning
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.stages import Stages
from tests.cli.conftest import Run

STREAMED = "prune MODEL --sparsity 0.5 --statistics sequential --memory-limit 900MiB --output out"


def stored(folder: str) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in Path(folder).glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def stopping_at(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """A function that is stopped by the user at its n-th call, counted from 1."""
    calls: list[None] = []

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return stopped


def test_within_a_memory_limit_the_result_is_that_of_the_way_in_memory(run: Run) -> None:
    result = run(f"{STREAMED} --json streamed.json")
    assert result.exit_code == 0, result.output
    whole = run(
        "prune MODEL --sparsity 0.5 --statistics sequential --dtype float32 --output whole "
        "--json whole.json"
    )
    assert whole.exit_code == 0, whole.output
    left, right = stored("out"), stored("whole")
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    row, expected = (json.loads(Path(f"{name}.json").read_text()) for name in ("streamed", "whole"))
    assert row.keys() - expected.keys() == {"peak_bytes", "estimated_bytes", "blocks_before"}
    assert not expected.keys() - row.keys()
    for split in ("validation", "test"):
        key = f"{split}_perplexity"
        assert row.pop(key) == pytest.approx(expected.pop(key), rel=1e-5)
    for key in expected.keys() - {"seconds", *TO_DENSE}:
        assert row[key] == expected[key], key
    assert [row[key] for key in TO_DENSE] == [None] * 4 and row["estimated_bytes"] < 900 * 2**20


def test_it_tells_of_memory_blocks_zeros_and_both_models(run: Run) -> None:
    output = run(STREAMED).output
    for line in (
        "pruning takes about ",
        "blocks pruned: 2 of 2",
        "blocks walked, dense model on validation text: 2 of 2",
        "blocks walked, pruned model on test text: 2 of 2",
        "peak memory: ",
        "the limit is 900.0 MiB",
        "9216 of 18432 weights of 14 layers are zero, counted from the files",
        "do not make a model smaller or faster",
    ):
        assert line in output
    assert "│ dense" in output and "│ wanda" in output
    assert "there already" not in output


def test_card_recipe_and_report_lie_beside_the_weights(run: Run) -> None:
    assert run(STREAMED).exit_code == 0
    assert Recipe.load(Path("out/recipe.yaml")).statistics == "sequential"
    rows = json.loads(Path("out/report.json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["dense", "wanda"]
    assert [row["sparsity_reached"] for row in rows] == [0.0, 0.5]
    card = Path("out/README.md").read_text()
    assert f"{rows[1]['test_perplexity']:.2f}" in card and "abs(W)*X" in card
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained("out").state_dict()
    assert (weights["model.layers.1.mlp.down_proj.weight"] == 0).float().mean() == 0.5


def test_a_stopped_run_goes_on_and_says_how_many_blocks_were_there(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ResumableCheckpoint, "write", stopping_at(ResumableCheckpoint.write, 2))
        assert run(STREAMED).exit_code != 0
    assert not Path("out").exists()
    result = run(f"{STREAMED} --json o.json")
    assert result.exit_code == 0, result.output
    assert "1 of 2 blocks were there already" in result.output
    assert json.loads(Path("o.json").read_text())["blocks_before"] == 1
    assert not Path("out.partial").exists()


def test_a_run_stopped_while_measuring_goes_on_measuring(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        measure = stopping_at(streamed_evaluation.evaluate_streamed, 3)
        patch.setattr(streamed_evaluation, "evaluate_streamed", measure)
        assert run(STREAMED).exit_code != 0
    assert not Path("out").exists()
    result = run(STREAMED)
    assert result.exit_code == 0, result.output
    assert "2 of 2 blocks were there already" in result.output
    assert Path("out/README.md").is_file()


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ("--output out", OutputError, "needs an --output folder"),
        ("900MiB", RecipeError, "such as 900MiB or 16GiB, but is '9'"),
        ("MODEL", ModelError, "hf download some/model --local-dir FOLDER"),
        ("--statistics sequential", RecipeError, "its formula takes gradients"),
        ("--memory-limit 900MiB", ModelError, "takes about"),
    ],
)
def test_what_cannot_be_done_within_a_limit_is_answered_in_one_sentence(
    changes: str, kind: type[PruneZeroError], sentence: str, run: Run
) -> None:
    exchanged = {
        "--output out": "",
        "900MiB": "9",
        "MODEL": "MODEL --model some/model",
        "--statistics sequential": "--recipe gblm",
        "--memory-limit 900MiB": "--memory-limit 100K",
    }
    result = run(STREAMED.replace(changes, exchanged[changes]))
    assert isinstance(result.exception, kind), result.output
    assert sentence in str(result.exception) and "\n" not in str(result.exception)
    assert not list(Path().glob("out*"))


def test_a_limit_that_measuring_would_break_is_refused_before_any_work(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_evaluation, "evaluation_bytes", lambda *args: 2**30)
    result = run(STREAMED)
    assert isinstance(result.exception, ModelError)
    assert "measuring" in str(result.exception) and "1024.0 MiB" in str(result.exception)
    assert not list(Path().glob("out*"))


STEPS = "prune MODEL --recipe steps.yaml --sparsity 0.5 --output out"


def write_steps() -> None:
    Path("steps.yaml").write_text(
        "schema: 1\nname: steps\ncriterion: abs(W)\nschedule: {iterative: {steps: 3}}\n"
    )


def test_a_stopped_pruning_of_several_steps_goes_on_and_leaves_nothing_behind(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps()
    usual = pruning.prune_layers
    seen: list[None] = []
    with monkeypatch.context() as patch:
        # two blocks in each step, and a stop in the third step
        patch.setattr(pruning, "prune_layers", stopping_at(pruning.prune_layers, 5))
        assert run(STEPS).exit_code != 0
    assert Path("out.partial/request.json").is_file() and not Path("out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(
            pruning, "prune_layers", lambda *args, **named: seen.append(usual(*args, **named))
        )
        result = run(f"{STEPS} --json o.json")
    assert result.exit_code == 0, result.output
    assert "going on with what an earlier run left in" in result.output
    assert len(seen) == 2
    assert json.loads(Path("o.json").read_text())["sparsity_reached"] == 0.5
    assert not Path("out.partial").exists()
    assert "going on" not in run(STEPS.replace("--output out", "--output again")).output
    left, right = stored("out"), stored("again")
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def test_steps_are_kept_only_where_a_stop_would_lose_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps()
    folders: list[Path | None] = []

    def remember(self: Stages, folder: Path | None, *args: Any, **named: Any) -> None:
        folders.append(folder)
        usual(self, folder, *args, **named)

    usual = Stages.__init__
    monkeypatch.setattr(Stages, "__init__", remember)
    assert run("prune MODEL --recipe steps.yaml --sparsity 0.5").exit_code == 0
    assert run("prune MODEL --sparsity 0.5 --output quick").exit_code == 0
    # what a crash leaves that came before the request was written
    Path("out.partial").mkdir()
    Path("out.partial/.request.json.1").write_text("{")
    assert run(STEPS).exit_code == 0
    assert folders == [None, None, Path("out.partial").absolute()]


def test_a_folder_of_something_else_is_left_alone(run: Run) -> None:
    write_steps()
    Path("out.partial").mkdir()
    Path("out.partial/mine.txt").write_text("keep me")
    for command in (STEPS, STREAMED):
        result = run(command)
        assert isinstance(result.exception, OutputError), result.output
        assert "out.partial" in str(result.exception)
    assert [path.name for path in Path("out.partial").iterdir()] == ["mine.txt"]


def test_an_allocation_is_chosen_by_a_word(run: Run) -> None:
    result = run("prune MODEL --sparsity 0.5 --allocate heavy_tail --json o.json")
    assert result.exit_code == 0, result.output
    assert "heavy_tail" in json.loads(Path("o.json").read_text())["allocate"]
    result = run("prune MODEL --sparsity 0.5 --allocate heavy")
    assert isinstance(result.exception, RecipeError)


@pytest.mark.parametrize("recipe", ["ria_permuted", "owl", "gblm"])
def test_recipes_that_need_the_whole_model_are_refused_before_it_is_looked_at(
    recipe: str, run: Run
) -> None:
    pattern = "--pattern 2:4" if recipe == "ria_permuted" else "--sparsity 0.5"
    result = run(f"prune MODEL --recipe {recipe} {pattern} --memory-limit 2GiB --output out")
    assert isinstance(result.exception, RecipeError)
    assert "cannot be run block by block" in str(result.exception)
    assert "takes about" not in result.output
