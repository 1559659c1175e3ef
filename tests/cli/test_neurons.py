"""`prunezero prune` takes neurons out of a model, or says in one sentence why it cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prunezero.errors import PruneZeroError, RecipeError
from prunezero.pruning import prune as pruning
from prunezero.pruning.recipes.recipe import Recipe
from tests.cli.conftest import Run, flat


def test_prune_saves_a_smaller_model_and_says_what_is_gone(run: Run) -> None:
    from transformers import AutoModelForCausalLM

    result = run("prune MODEL --recipe wanda_sp --sparsity 0.2 --output out --json o.json")
    assert result.exit_code == 0, result.output
    assert "24 of 128 neurons are gone" in flat(result.output)
    assert "removed" in result.output and "18.75 %" in result.output
    assert "sparsity" not in result.output and "zeros do not make" not in result.output.lower()
    row = json.loads(Path("o.json").read_text())
    assert (row["removed"], row["units_removed"], row["sparsity_reached"]) == (0.1875, 24, None)
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.config.intermediate_size == 52
    assert Recipe.load(Path("out/recipe.yaml")).name == "wanda_sp"


def test_query_heads_go_and_plain_transformers_loads_what_is_left(run: Run) -> None:
    from transformers import AutoModelForCausalLM

    result = run("prune MODEL --recipe minitron_heads --sparsity 0.5 --output out --json o.json")
    assert result.exit_code == 0, result.output
    assert "4 of 8 heads are gone" in flat(result.output)
    row = json.loads(Path("o.json").read_text())
    assert (row["removed"], row["units_removed"]) == (0.5, 4)
    model = AutoModelForCausalLM.from_pretrained("out")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 2)
    # One head of each key-value head is half of them: less takes none.
    assert run("prune MODEL --recipe minitron_heads --sparsity 0.49 --json o.json").exit_code == 0
    assert json.loads(Path("o.json").read_text())["removed"] == 0


def test_without_an_output_neurons_are_removed_for_the_measurement(run: Run) -> None:
    result = run("prune MODEL --recipe flap --sparsity 0.2 --json o.json")
    assert result.exit_code == 0, result.output
    row = json.loads(Path("o.json").read_text())
    assert (row["compare"], row["update"], row["units"]) == ("model", "bias", 128)
    assert row["removed"] == 25 / 128


def test_unequal_widths_are_saved_with_a_class_of_their_own_and_at_full_size_on_request(
    run: Run,
) -> None:
    from transformers import AutoModelForCausalLM

    result = run("prune MODEL --recipe flap --sparsity 0.2 --output smaller --json o.json")
    assert result.exit_code == 0, result.output
    said = flat(result.output)
    assert 'load it by AutoModelForCausalLM.from_pretrained("smaller", trust_remote_code=True)' in (
        said
    )
    assert "read anew, its logits differ by at most 0 from those in memory" in said
    told = json.loads(Path("smaller/config.json").read_text())
    widths = {one["intermediate_size"] for one in told["per_layer_config"].values()}
    assert len(widths) == 2 and sum(64 - width for width in widths) == 25
    assert Path("smaller/modeling_pruned.py").is_file()
    again = run("prune MODEL --model smaller --recipe wanda_sp --sparsity 0.2 --output again")
    assert again.exit_code == 0, again.output
    zeros = run("prune MODEL --model smaller --sparsity 0.5 --memory-limit 900MiB --output zeros")
    assert zeros.exit_code == 0, zeros.output
    assert Path("zeros/modeling_pruned.py").is_file()
    part = run("prune MODEL --recipe wanda_sp --sparsity 0.2 --targets re:layers.0. --output part")
    assert part.exit_code == 0, part.output
    result = run("prune MODEL --recipe flap --sparsity 0.2 --padded --output out")
    assert result.exit_code == 0, result.output
    assert "take as much room and time" in flat(result.output)
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.config.intermediate_size == 64 and model.config.mlp_bias
    gone = sum(int((block.mlp.gate_proj.weight == 0).all(1).sum()) for block in model.model.layers)
    assert gone == 25
    card = Path("out/README.md").read_text()
    assert "Zeros do not make a model smaller" in card
    assert "the neurons with the lowest value of this formula are exact zeros" in card


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--gguf it.gguf", "name an --output"),
        ("--gguf it.gguf --output out --memory-limit 900MiB", "leave --memory-limit out"),
        ("--gguf it.bin --output out", "let it end in .gguf"),
        ("--gguf nowhere/it.gguf --output out", "--gguf nowhere/it.gguf cannot be written"),
        ("--gguf it.gguf --output it.gguf", "both name it.gguf"),
        ("--gguf it.gguf --output out", "tokenizer.json, so its tokenizer cannot be written"),
    ],
)
def test_a_gguf_file_that_cannot_be_is_refused_before_the_work(
    command: str, said: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "prune_layers", None)
    result = run(f"prune MODEL --recipe flap --sparsity 0.2 {command}")
    assert isinstance(result.exception, PruneZeroError), result.output
    assert said in str(result.exception)
    assert set(os.listdir()) <= {"cache"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("prune MODEL --sparsity 0.2 --memory-limit 900MiB --output out", "unit neuron takes rows"),
        ("prune MODEL --pattern 2:4", "pattern: 2:4 says nothing of unit: neuron"),
        ("prune MODEL --sparsity 0.2 --allocate owl", "allocate: owl is for unit weight"),
        ("prune MODEL --sparsity 0.2 --targets q_proj", "is part of an MLP, so no neuron can go"),
        ("prune MODEL --sparsity 0.2 --ignore up_proj", "takes a part of it along"),
        ("export --output page.py", "looks at the dense model alone; add --statistics dense"),
        ("export --kernel page.py", "a kernel file scores single weights"),
    ],
)
def test_what_cannot_be_done_to_neurons_is_said_in_one_sentence(
    command: str, said: str, run: Run
) -> None:
    result = run(f"{command} --recipe wanda_sp")
    assert isinstance(result.exception, PruneZeroError), result.output
    assert said in str(result.exception)
    # What a file was found to hold is remembered in the cache, once the file rests.
    assert set(os.listdir()) <= {"cache"}


def test_a_search_does_not_start_from_neurons(run: Run) -> None:
    result = run("search MODEL --sparsity 0.5 --budget 4 --start-from wanda_sp --name it")
    assert isinstance(result.exception, RecipeError)
    assert "a search writes formulas of single weights" in str(result.exception)


def test_compare_shows_units_and_weights_in_columns_of_their_own(run: Run) -> None:
    result = run("compare MODEL --recipes wanda,neuron_magnitude --sparsity 0.25 --json o.json")
    assert result.exit_code == 0, result.output
    dense, weights, units = json.loads(Path("o.json").read_text())["rows"]
    assert weights["sparsity_reached"] == 0.25 and "removed" not in weights
    assert units["removed"] == 0.25 and units["sparsity_reached"] is None
    assert dense["sparsity_reached"] == 0.0
    assert "sparsity" in result.output and "removed" in result.output


def test_the_lists_tell_of_neurons(run: Run) -> None:
    choices = run("list choices --json c.json")
    assert choices.exit_code == 0
    rows = json.loads(Path("c.json").read_text())["choices"]
    (neuron,) = (row for row in rows if (row["key"], row["word"]) == ("unit", "neuron"))
    assert "members" in neuron["numbers"] and "multiple_of" in neuron["numbers"]
    run("list features --json f.json")
    features = json.loads(Path("f.json").read_text())["features"]
    assert {row["name"]: row["of"] for row in features}["A"] == "unit"
    run("list recipes --json r.json")
    recipes = json.loads(Path("r.json").read_text())["recipes"]
    assert "unit neuron" in {row["name"]: row["around it"] for row in recipes}["wanda_sp"]


def test_compare_counts_and_draws_what_is_left_and_takes_recipes_to_other_units(run: Run) -> None:
    words = "compare MODEL --recipes wanda,flap,mask_fisher --sparsity 0.25 --json o.json"
    result = run(f"{words} --plot sizes.png --unit kv_group")
    assert result.exit_code == 0, result.output
    dense, weights, *units = json.loads(Path("o.json").read_text())["rows"]
    assert weights["parameters"] == dense["parameters"] > units[0]["parameters"]
    assert {row["unit"] for row in units} == {"kv_group"} and "unit" not in weights
    assert dense["kv_bytes"] > units[1]["kv_bytes"]
    assert Path("sizes.png").read_bytes().startswith(b"\x89PNG")
    for command, said in (
        (
            "compare MODEL --recipes wanda --unit neuron --sparsity 0.5",
            "is for recipes that remove",
        ),
        ("prune MODEL --recipe flap --unit neurons --sparsity 0.5", "did you mean 'neuron'"),
        ("compare MODEL --recipes flap --sparsity 0.2 --plot no/where.png", "no"),
    ):
        refused = run(command)
        assert isinstance(refused.exception, PruneZeroError), refused.output
        assert said in str(refused.exception)
