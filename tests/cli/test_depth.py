"""`prunezero prune` takes parts of the depth out of a model, or says in one sentence why not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prunezero.errors import ModelError, PruneZeroError
from prunezero.models.observing import depth
from prunezero.pruning import requirements
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


def test_sub_blocks_go_from_a_folder_with_a_class_of_its_own_or_are_zeros_on_request(
    run: Run,
) -> None:
    from transformers import AutoModelForCausalLM

    result = run("prune MODEL --recipe block_pruner --sparsity 0.4 --output out")
    assert result.exit_code == 0, result.output
    said = flat(result.output)
    assert 'load it by AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)' in said
    assert "read anew, its logits differ by at most 0 from those in memory" in said
    told = json.loads(Path("out/config.json").read_text())
    skipped = [part for one in told["per_layer_config"].values() for part in one["skip"]]
    assert f"{len(skipped)} of 4 blocks are gone" in said and skipped
    report = json.loads(Path("out/report.json").read_text())
    assert report["saved"]["kind"] == "own_class"
    assert report["costs"]["flops"] < report["dense_costs"]["flops"]
    again = run("prune MODEL --model out --recipe magnitude --sparsity 0.5 --output again")
    assert again.exit_code == 0, again.output
    assert Path("again/modeling_pruned.py").is_file()
    result = run("prune MODEL --recipe block_pruner --sparsity 0.4 --padded --output padded")
    assert result.exit_code == 0, result.output
    assert "take as much room and time" in flat(result.output)
    model = AutoModelForCausalLM.from_pretrained("padded")
    assert model.config.num_hidden_layers == 2
    writers = [
        part.weight
        for one in model.model.layers
        for part in (one.self_attn.o_proj, one.mlp.down_proj)
    ]
    assert sum(not bool(weight.any()) for weight in writers) == len(skipped)


def test_what_cannot_be_saved_is_refused_before_the_work(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: object) -> None:
        raise ModelError("keep tensors at full size (--padded)")

    monkeypatch.setattr(depth, "depth_statistics", None)
    monkeypatch.setattr(requirements, "refuse_without_class", refuse)
    refused = run("prune MODEL --recipe block_pruner --sparsity 0.4 --output out")
    assert isinstance(refused.exception, ModelError)
    assert "--padded" in str(refused.exception) and not os.path.exists("out")


def test_compare_counts_what_a_model_without_parts_of_its_depth_takes(run: Run) -> None:
    command = "compare MODEL --recipes shortgpt,block_pruner --sparsity 0.5 --json o.json"
    result = run(command)
    assert result.exit_code == 0, result.output
    dense, layer, block = json.loads(Path("o.json").read_text())["rows"]
    assert layer["parameters"] < dense["parameters"] > block["parameters"]
    assert layer["flops"] < dense["flops"] > block["flops"]


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
    assert "protect_first" in units["layer"]["numbers"] and "attention" in units
    words = {row["word"] for row in lists["choices"] if row["key"] == "schedule"}
    assert {"greedy", "span"} <= words
    features = {row["name"]: row for row in lists["features"]}
    assert (features["NLL"]["of"], features["NLL"]["needs"]) == ("block", "oracle")
    recipes = {row["name"]: row for row in lists["recipes"]}
    assert recipes["gromov"]["around it"] == "unit layer, span"
