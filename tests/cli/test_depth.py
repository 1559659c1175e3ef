"""`prunezero prune` takes parts of the depth out of a model, or says in one sentence why not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prunezero.errors import ModelError, PruneZeroError
from prunezero.models.observing import depth
from prunezero.pruning.recipes.recipe import Recipe
from tests.cli.conftest import Run, flat


def test_prune_saves_a_model_with_fewer_layers_and_says_what_is_gone(run: Run) -> None:
    from transformers import AutoModelForCausalLM

    result = run("prune MODEL --recipe shortgpt --sparsity 0.5 --output out --json o.json")
    assert result.exit_code == 0, result.output
    assert "1 of 2 layers are gone" in flat(result.output)
    row = json.loads(Path("o.json").read_text())
    assert (row["removed"], row["units"], row["units_removed"]) == (0.5, 2, 1)
    assert (row["removed_of"], row["signal"]) == ("parameters of layers", "activations")
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.config.num_hidden_layers == len(model.model.layers) == 1
    assert Recipe.load(Path("out/recipe.yaml")).schedule.is_usual
    report = json.loads(Path("out/report.json").read_text())
    assert report["costs"]["parameters"] < report["dense_costs"]["parameters"]


def test_sub_blocks_are_refused_before_the_work_and_saved_at_full_size_on_request(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    with monkeypatch.context() as patch:
        patch.setattr(depth, "depth_statistics", None)
        refused = run("prune MODEL --recipe block_pruner --sparsity 0.4 --output out")
        assert isinstance(refused.exception, ModelError)
        assert "--padded" in str(refused.exception) and not os.path.exists("out")
    result = run("prune MODEL --recipe block_pruner --sparsity 0.4 --padded --output out")
    assert result.exit_code == 0, result.output
    assert "take as much room and time" in flat(result.output)
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.config.num_hidden_layers == 2
    writers = [
        part.weight
        for one in model.model.layers
        for part in (one.self_attn.o_proj, one.mlp.down_proj)
    ]
    assert 0 < sum(not bool(weight.any()) for weight in writers) < 4


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("prune MODEL --sparsity 0.5 --memory-limit 900MiB --output out", "unit layer takes out"),
        ("prune MODEL --pattern 2:4", "pattern: 2:4 says nothing of unit: layer"),
        ("prune MODEL --sparsity 0.5 --statistics sequential", "ranks all layers before the first"),
        ("prune MODEL --sparsity 0.5 --ignore up_proj", "but it goes with model.layers.0"),
        ("export --output page.py", "which a one-page pruner cannot follow"),
        ("export --kernel page.py", "a kernel file scores single weights"),
        (
            "search MODEL --sparsity 0.5 --budget 4 --name it --start-from",
            "formulas of single weights",
        ),
    ],
)
def test_what_cannot_be_done_to_layers_is_said_in_one_sentence(
    command: str, said: str, run: Run
) -> None:
    recipe = "shortgpt" if command.endswith("--start-from") else "--recipe shortgpt"
    result = run(f"{command} {recipe}")
    assert isinstance(result.exception, PruneZeroError), result.output
    assert said in str(result.exception)


def test_the_lists_tell_of_the_depth(run: Run) -> None:
    run("list --json all.json")
    lists = json.loads(Path("all.json").read_text())
    units = {row["word"]: row for row in lists["choices"] if row["key"] == "unit"}
    assert "keep_first" in units["layer"]["numbers"] and "attention" in units
    words = {row["word"] for row in lists["choices"] if row["key"] == "schedule"}
    assert {"greedy", "span"} <= words
    features = {row["name"]: row for row in lists["features"]}
    assert (features["NLL"]["of"], features["NLL"]["needs"]) == ("block", "oracle")
    recipes = {row["name"]: row for row in lists["recipes"]}
    assert recipes["gromov"]["around it"] == "unit layer, span"
